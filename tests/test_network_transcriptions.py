"""DDPM++ and EDM2 against transcriptions of their published definitions, written without the package's layers.

Each transcription computes in float64 from the stored weights alone and follows the order of operations that the
sources give: for DDPM++ a block filters before its first convolution (Score SDE, arXiv 2011.13456, appendix H, BigGAN
blocks with a box filter; EDM, arXiv 2206.00364, appendix F, table 7), for EDM2 the configuration G of arXiv 2312.02696
(equations 21, 69 to 103). What sCM changes (arXiv 2410.11081, section 4.1) is transcribed too: the time itself
in sinusoids of ``max_period`` 10,000, and double normalization.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from scm_sdk.model.consistency import make_network
from scm_sdk.model.ddpmpp import DDPMpp, DDPMppConfig
from scm_sdk.model.edm2 import EDM2Config

Weights = dict[str, Tensor]

DDPMPP = {
    "three levels, attention in the middle": DDPMppConfig(
        image_size=16, in_channels=2, channels=16, channel_mult=(1, 2, 3), num_blocks=2, attention_resolutions=(8,)
    ),
    "attention at the lowest level, labels": DDPMppConfig(
        image_size=8, channels=16, channel_mult=(2, 1), num_blocks=1, attention_resolutions=(4,), num_classes=3
    ),
    "no level to go down to": DDPMppConfig(
        image_size=8, channels=16, channel_mult=(2,), num_blocks=2, attention_resolutions=(8,), head_channels=8
    ),
}
EDM2 = {
    "three levels, attention in the middle": EDM2Config(
        image_size=16, channels=16, channel_mult=(1, 2, 3), num_blocks=2, attention_resolutions=(8,), head_channels=16
    ),
    "labels, attention at the lowest level": EDM2Config(
        image_size=8, channels=16, channel_mult=(2, 1), num_blocks=1, attention_resolutions=(4,), num_classes=3,
        head_channels=8,
    ),
}  # fmt: skip


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def box(x: Tensor) -> Tensor:
    """The mean of each 2x2 square."""
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def nearest(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def rms(x: Tensor, dim: int | tuple[int, ...] = 1) -> Tensor:
    return (x * x).mean(dim=dim, keepdim=True).sqrt()


def sinusoids(t: Tensor, channels: int, max_period: float) -> Tensor:
    half = channels // 2
    angles = np.outer(t.numpy(), max_period ** -(np.arange(half) / (half - 1)))
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention over the pixels of maps (B, C, H, W)."""
    B, C, H, W = q.shape
    q, k, v = (part.reshape(B, heads, C // heads, H * W) for part in (q, k, v))
    logits = torch.einsum("bhcq,bhck->bhqk", q, k) / np.sqrt(C // heads)
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(B, C, H, W)


def group_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Groups of at least 4 channels, at most 32 groups, eps 1e-6: EDM's settings of DDPM++."""
    B, C, H, W = x.shape
    groups = min(32, C // 4)
    parts = x.reshape(B, groups, -1)
    mean = parts.mean(dim=2, keepdim=True)
    parts = (parts - mean) / torch.sqrt(((parts - mean) ** 2).mean(dim=2, keepdim=True) + 1e-6)
    return parts.reshape(B, C, H, W) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def convolve(w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def ddpmpp(config: DDPMppConfig, w: Weights, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    emb = silu(linear(w, "time_linear0", sinusoids(t, config.channels, config.time_max_period)))
    emb = linear(w, "time_linear1", emb)
    emb = silu(emb if labels is None else emb + w["label_embedding.weight"][labels])
    depth, per_level = len(config.channel_mult), config.num_blocks

    def block(name: str, x: Tensor, *, filtered: Callable[[Tensor], Tensor] = lambda x: x, attends: bool) -> Tensor:
        h = convolve(w, f"{name}.conv0", filtered(silu(group_norm(w, f"{name}.norm0", x))))
        if config.double_norm:
            scale, shift = linear(w, f"{name}.modulation.affine", emb).chunk(2, dim=1)
            scale, shift = (one / (one.square().mean(dim=1, keepdim=True) + 1e-8).sqrt() for one in (scale, shift))
            h = group_norm(w, f"{name}.modulation.norm", h) * scale[:, :, None, None] + shift[:, :, None, None]
        else:
            h = group_norm(w, f"{name}.norm1", h + linear(w, f"{name}.affine", emb)[:, :, None, None])
        h = convolve(w, f"{name}.conv1", silu(h))
        x = filtered(x)
        if f"{name}.skip.weight" in w:
            x = convolve(w, f"{name}.skip", x)
        x = (x + h) / np.sqrt(2)
        assert attends == (f"{name}.attention.qkv.weight" in w), f"attention of {name}"
        if attends:
            q, k, v = convolve(w, f"{name}.attention.qkv", group_norm(w, f"{name}.attention.norm", x)).chunk(3, dim=1)
            out = softmax_attention(q, k, v, max(1, x.shape[1] // config.head_channels))
            x = (x + convolve(w, f"{name}.attention.proj", out)) / np.sqrt(2)
        return x

    def attention_at(level: int) -> bool:
        return config.image_size >> level in config.attention_resolutions

    h = convolve(w, "conv_in", x)
    kept, number = [h], 0
    for level in range(depth):
        if level > 0:
            h = block(f"down.{number}", h, filtered=box, attends=False)
            kept, number = [*kept, h], number + 1
        for _ in range(per_level):
            h = block(f"down.{number}", h, attends=attention_at(level))
            kept, number = [*kept, h], number + 1
    h = block("middle.0", h, attends=True)  # whatever attention_resolutions says
    h = block("middle.1", h, attends=False)
    number = 0
    for level in reversed(range(depth)):
        for i in range(per_level + 1):
            h = torch.cat([h, kept.pop()], dim=1)
            h = block(f"up.{number}", h, attends=attention_at(level) and i == per_level)
            number += 1
        if level > 0:
            h = block(f"up.{number}", h, filtered=nearest, attends=False)
            number += 1
    return convolve(w, "conv_out", silu(group_norm(w, "norm_out", h)))


def edm2(config: EDM2Config, w: Weights, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    def weight(name: str) -> Tensor:
        """A layer's weight with every output at unit magnitude, over the root of its fan-in (equation 66)."""
        stored = w[f"{name}.weight"]
        axes, fan_in = tuple(range(1, stored.ndim)), stored[0].numel()
        return stored / (rms(stored, axes) + 1e-4) / np.sqrt(fan_in) * w.get(f"{name}.gain", torch.ones(1).double())

    def layer(name: str, x: Tensor) -> Tensor:
        applied = weight(name)
        return x @ applied.T if applied.ndim == 2 else conv2d(x, applied, padding=applied.shape[-1] // 2)

    def unit(x: Tensor, dim: int = 1) -> Tensor:
        return x / (rms(x, dim) + 1e-4)

    def mp_silu(x: Tensor) -> Tensor:
        return silu(x) / 0.596

    def blend(a: Tensor, b: Tensor, share: float) -> Tensor:
        return ((1 - share) * a + share * b) / np.sqrt((1 - share) ** 2 + share**2)

    def join(a: Tensor, b: Tensor) -> Tensor:
        """Equation 103 with t = 0.5."""
        na, nb = a.shape[1], b.shape[1]
        scale = np.sqrt((na + nb) / 0.5)
        return scale * torch.cat([0.5 / np.sqrt(na) * a, 0.5 / np.sqrt(nb) * b], dim=1)

    emb = layer("time_linear", np.sqrt(2) * sinusoids(t, config.channels, config.time_max_period))
    if labels is not None:
        one_hot = torch.eye(config.num_classes).double()[labels]
        emb = blend(emb, layer("label_linear", one_hot * np.sqrt(config.num_classes)), 0.5)
    emb = mp_silu(emb)

    def block(name: str, x: Tensor, *, side: str, attends: bool) -> Tensor:
        if side == "encoder":
            x = unit(layer(f"{name}.conv_skip", x) if f"{name}.conv_skip.weight" in w else x)
        h = layer(f"{name}.conv0", mp_silu(x))
        if config.double_norm:
            scale, shift = layer(f"{name}.modulation", emb).chunk(2, dim=1)
            h = unit(h) * unit(scale)[:, :, None, None] + unit(shift)[:, :, None, None]
        else:
            h = h * (1 + layer(f"{name}.modulation", emb))[:, :, None, None]
        h = layer(f"{name}.conv1", mp_silu(h))
        if side == "decoder" and f"{name}.conv_skip.weight" in w:
            x = layer(f"{name}.conv_skip", x)
        x = blend(x, h, 0.3)
        assert attends == (f"{name}.qkv.weight" in w), f"attention of {name}"
        if attends:
            B, C, H, W = x.shape
            heads = max(1, C // config.head_channels)
            parts = unit(layer(f"{name}.qkv", x).reshape(B, 3, heads, C // heads, H, W), dim=3)
            q, k, v = (part.reshape(B, C, H, W) for part in parts.unbind(1))
            x = blend(x, layer(f"{name}.proj", softmax_attention(q, k, v, heads)), 0.3)
        return x.clamp(-256, 256)

    def attention_at(level: int) -> bool:
        return config.image_size >> level in config.attention_resolutions

    depth, per_level = len(config.channel_mult), config.num_blocks
    h = layer("conv_in", torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
    kept, number = [h], 0
    for level in range(depth):
        if level > 0:
            h = block(f"down.{number}", box(h), side="encoder", attends=False)
            kept, number = [*kept, h], number + 1
        for _ in range(per_level):
            h = block(f"down.{number}", h, side="encoder", attends=attention_at(level))
            kept, number = [*kept, h], number + 1
    h = block("middle.0", h, side="decoder", attends=True)
    h = block("middle.1", h, side="decoder", attends=False)
    number = 0
    for level in reversed(range(depth)):
        for _ in range(per_level + 1):
            h = block(f"up.{number}", join(h, kept.pop()), side="decoder", attends=attention_at(level))
            number += 1
        if level > 0:
            h = block(f"up.{number}", nearest(h), side="decoder", attends=False)
            number += 1
    return layer("conv_out", h)


CASES = [
    *(pytest.param(ddpmpp, config, id=f"ddpmpp, {name}") for name, config in DDPMPP.items()),
    *(pytest.param(edm2, config, id=f"edm2, {name}") for name, config in EDM2.items()),
]


def with_random_weights(config: Any) -> nn.Module:
    """A network in float64 in which every weight counts."""
    torch.manual_seed(0)
    network = make_network(config).eval().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    return network


@pytest.mark.parametrize("double_norm", [True, False])
@pytest.mark.parametrize(("transcription", "config"), CASES)
def test_a_network_is_its_published_definition(
    transcription: Callable[..., Tensor], config: Any, double_norm: bool
) -> None:
    config = msgspec.structs.replace(config, double_norm=double_norm)
    network = with_random_weights(config)
    torch.manual_seed(1)
    x = torch.randn(3, *config.sample_shape, dtype=torch.float64)
    t = torch.tensor([0.03, 0.8, 1.56], dtype=torch.float64)
    labels = torch.tensor([0, 2, 1]) if config.num_classes else None
    weights = dict(network.state_dict())
    with torch.inference_mode():
        wanted, found = transcription(config, weights, x, t, labels), network(x, t, labels)
    # The network's frequencies are float32 constants; everything else is float64 on both sides.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.square().mean().sqrt()))


def test_a_filter_after_the_convolution_is_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees what parameter counts do not: the place of the filter in a block."""
    block = type(DDPMpp(DDPMPP["three levels, attention in the middle"]).down[0])
    resample = block._resample

    def late(self: Any, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(block, "_resample", lambda self, x: x)
            return resample(self, forward(self, x_BCHW, emb_BE))

    forward = block.forward
    monkeypatch.setattr(
        block, "forward", lambda self, x, emb: (late if self.place.resample == "down" else forward)(self, x, emb)
    )
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_a_network_is_its_published_definition(ddpmpp, DDPMPP["three levels, attention in the middle"], True)
