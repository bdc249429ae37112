"""The networks against independent transcriptions of published networks: one weight file, one function of formulas.

Each transcription reads a ``state_dict`` in float64 and shares no code with the package. ``Rules`` holds what such
transcriptions get wrong without a size or a shape that shows it; every one of them, changed, has to be seen.

DDPM++: Song et al. 2021, arXiv 2011.13456, appendix H, and Karras et al. 2022, arXiv 2206.00364, appendix F: blocks of
BigGAN's kind resample, with a box filter, before their first convolution. EDM2: Karras et al. 2024, arXiv 2312.02696,
appendix B. Adaptive double normalization: arXiv 2410.11081, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scm_sdk.model.consistency import make_network
from scm_sdk.model.networks.ddpmpp import DDPMppConfig
from scm_sdk.model.networks.edm2 import EDM2Config
from scm_sdk.model.networks.transformer import TransformerConfig
from scm_sdk.model.networks.unet import UNetConfig

TOLERANCE = 1e-7
"""As a share of the largest output; the networks keep the frequencies of the time in float32."""


class Rules(NamedTuple):
    """The published values that no shape depends on."""

    filter_first: bool = True
    skip_scale: float = math.sqrt(0.5)
    group_eps: float = 1e-6
    pixel_eps: float = 1e-8
    magnitude_eps: float = 1e-4
    residual_share: float = 0.3
    attention_share: float = 0.3
    concat_share: float = 0.5
    silu_rms: float = 0.596
    group_channels: int = 4
    old_first: bool = False


class Weights:
    """A ``state_dict`` below a prefix."""

    def __init__(self, state: dict[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __truediv__(self, name: Any) -> Weights:
        return Weights(self.state, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(self.prefix + name) for key in self.state)

    def linear(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self["weight"]) + self["bias"]

    def conv(self, x: Tensor, stride: int = 1) -> Tensor:
        return functional.conv2d(x, self["weight"], self["bias"], stride, self["weight"].shape[-1] // 2)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sinusoids(t: Tensor, size: int, max_period: float) -> Tensor:
    frequencies = torch.tensor([max_period ** (-i / (size // 2 - 1)) for i in range(size // 2)])
    angles = torch.outer(t, frequencies.double())
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def group_norm(w: Weights | None, x: Tensor, rules: Rules) -> Tensor:
    channels = x.shape[1]
    count = max(n for n in range(1, min(32, channels // rules.group_channels) + 1) if channels % n == 0)
    parts = torch.stack(x.chunk(count, dim=1)).flatten(2)
    spread = torch.sqrt(parts.var(dim=2, unbiased=False, keepdim=True) + rules.group_eps)
    parts = (parts - parts.mean(dim=2, keepdim=True)) / spread
    out = parts.transpose(0, 1).reshape(x.shape)
    return out if w is None or "weight" not in w else out * w["weight"][:, None, None] + w["bias"][:, None, None]


def pixel_norm(x: Tensor, rules: Rules, dim: int = 1) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=dim, keepdim=True) + rules.pixel_eps)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Softmax over keys j of q_i k_j / sqrt(d); channels are (q, k, v), then heads, then d."""
    batch, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(batch, 3, heads, channels // 3 // heads, height * width).unbind(1)
    shares = torch.exp(torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(q.shape[2]))
    shares = shares / shares.sum(dim=3, keepdim=True)
    return torch.einsum("bhij,bhcj->bhci", shares, v).reshape(batch, -1, height, width)


def box(x: Tensor, *, up: bool) -> Tensor:
    """The 2x2 box filter, as a depthwise convolution and its transpose."""
    kernel = torch.ones(x.shape[1], 1, 2, 2, dtype=x.dtype) * (1.0 if up else 0.25)
    convolve = functional.conv_transpose2d if up else functional.conv2d
    return convolve(x, kernel, None, 2, groups=x.shape[1])


def embedding(w: Weights, c: Any, size: int, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
    emb = (w / "time_linear1").linear(silu((w / "time_linear0").linear(sinusoids(t, size, c.time_max_period))))
    if "label_embedding" in w:
        emb = emb + (w / "label_embedding")["weight"][labels]
    if "guidance_linear" in w:
        emb = emb + (w / "guidance_linear").linear(sinusoids(guidance, size, c.time_max_period))
    return silu(emb)


def modulated(w: Weights, h: Tensor, emb: Tensor, rules: Rules, *, double: bool) -> Tensor:
    scale, shift = (w / "affine").linear(emb).chunk(2, dim=1)
    scale, shift = (pixel_norm(scale, rules), pixel_norm(shift, rules)) if double else (1 + scale, shift)
    return group_norm(w / "norm", h, rules) * scale[:, :, None, None] + shift[:, :, None, None]


def attention_block(w: Weights, x: Tensor, head_channels: int, rules: Rules) -> Tensor:
    heads = max(1, x.shape[1] // head_channels)
    mixed = attend((w / "qkv").conv(group_norm(w / "norm", x, rules)), heads)
    return (x + (w / "proj").conv(mixed)) * rules.skip_scale


def ddpmpp(w: Weights, c: DDPMppConfig, rules: Rules, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
    emb = embedding(w, c, c.channels, t, labels, guidance)

    def block(w: Weights, x: Tensor, resample: str = "") -> Tensor:
        h = silu(group_norm(w / "norm0", x, rules))
        if resample and (rules.filter_first or resample == "up"):
            h = box(h, up=resample == "up")
        h = (w / "conv0").conv(h)
        if resample == "down" and not rules.filter_first:
            h = box(h, up=False)
        if c.double_norm:
            h = modulated(w / "modulation", h, emb, rules, double=True)
        else:
            h = group_norm(w / "norm1", h + (w / "affine").linear(emb)[:, :, None, None], rules)
        h = (w / "conv1").conv(silu(h))
        x = box(x, up=resample == "up") if resample else x
        x = (x if "skip" not in w else (w / "skip").conv(x)) + h
        x = x * rules.skip_scale
        return attention_block(w / "attention", x, c.head_channels, rules) if "attention" in w else x

    return u_net(w, c, rules, x, block, lambda a, b: torch.cat((b, a) if rules.old_first else (a, b), dim=1))


def u_net(
    w: Weights, c: Any, rules: Rules, x: Tensor, block: Callable[..., Tensor], join: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The way down, two blocks in the middle, the way up with one block more for each resolution."""
    x = (w / "conv_in").conv(x)
    kept, levels = [x], len(c.channel_mult)
    at = iter(range(1000))
    for level in range(levels):
        for step in range(c.num_blocks + (level > 0)):
            x = block(w / "down" / next(at), x, "down" if level and not step else "")
            kept.append(x)
    x = block(w / "middle" / 1, block(w / "middle" / 0, x))
    at = iter(range(1000))
    for level in reversed(range(levels)):
        for _ in range(c.num_blocks + 1):
            x = block(w / "up" / next(at), join(x, kept.pop()))
        if level:
            x = block(w / "up" / next(at), x, "up")
    assert not kept
    return (w / "conv_out").conv(silu(group_norm(w / "norm_out", x, rules)))


def edm2(w: Weights, c: EDM2Config, rules: Rules, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
    def unit(x: Tensor, dims: tuple[int, ...] = (1,)) -> Tensor:
        return x / (rules.magnitude_eps + torch.sqrt((x * x).mean(dim=dims, keepdim=True)))

    def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
        return ((1 - share) * a + share * b) / math.sqrt((1 - share) ** 2 + share**2)

    def act(x: Tensor) -> Tensor:
        return silu(x) / rules.silu_rms

    def apply(w: Weights, x: Tensor) -> Tensor:
        weight = w["weight"]
        weight = unit(weight, tuple(range(1, weight.ndim))) / math.sqrt(weight[0].numel())
        if "gain" in w:
            weight = weight * w["gain"]
        if weight.ndim == 2:
            return x @ weight.T
        return functional.conv2d(x, weight, padding=weight.shape[-1] // 2)

    emb = apply(w / "time_linear", math.sqrt(2) * sinusoids(t, c.channels, c.time_max_period))
    if c.num_classes:
        one_hot = torch.eye(c.num_classes + 1, c.num_classes, dtype=x.dtype)[labels]
        emb = mix(emb, apply(w / "label_linear", one_hot * math.sqrt(c.num_classes)), 0.5)
    if c.guidance:
        emb = emb + apply(w / "guidance_linear", math.sqrt(2) * sinusoids(guidance, c.channels, c.time_max_period))
    emb = act(emb)

    def block(w: Weights, x: Tensor, encoder: bool, resample: str = "") -> Tensor:
        x = box(x, up=resample == "up") if resample else x
        if encoder:
            x = unit(apply(w / "conv_skip", x) if "conv_skip" in w else x)
        h = apply(w / "conv0", act(x))
        if c.double_norm:
            scale, shift = apply(w / "modulation", emb).chunk(2, dim=1)
            h = unit(h) * unit(scale)[:, :, None, None] + unit(shift)[:, :, None, None]
        else:
            h = h * (1 + apply(w / "modulation", emb))[:, :, None, None]
        h = apply(w / "conv1", act(h))
        if not encoder and "conv_skip" in w:
            x = apply(w / "conv_skip", x)
        x = mix(x, h, rules.residual_share)
        if "qkv" in w:
            heads = max(1, x.shape[1] // c.head_channels)
            qkv = apply(w / "qkv", x)
            parts = unit(qkv.unflatten(1, (3, heads, -1)), (3,))
            x = mix(x, apply(w / "proj", attend(parts.reshape(qkv.shape), heads)), rules.attention_share)
        return torch.minimum(torch.maximum(x, torch.tensor(-256.0)), torch.tensor(256.0))

    def join(a: Tensor, b: Tensor) -> Tensor:
        share, na, nb = rules.concat_share, a.shape[1], b.shape[1]
        common = math.sqrt((na + nb) / ((1 - share) ** 2 + share**2))
        return torch.cat([a * common * (1 - share) / math.sqrt(na), b * common * share / math.sqrt(nb)], dim=1)

    x = apply(w / "conv_in", torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
    kept, down, up = [x], iter(range(1000)), iter(range(1000))
    for level in range(len(c.channel_mult)):
        for step in range(c.num_blocks + (level > 0)):
            x = block(w / "down" / next(down), x, True, "down" if level and not step else "")
            kept.append(x)
    x = block(w / "middle" / 1, block(w / "middle" / 0, x, False), False)
    for level in reversed(range(len(c.channel_mult))):
        for _ in range(c.num_blocks + 1):
            x = block(w / "up" / next(up), join(x, kept.pop()), False)
        if level:
            x = block(w / "up" / next(up), x, False, "up")
    return apply(w / "conv_out", x)


def unet(w: Weights, c: UNetConfig, rules: Rules, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
    emb, patch = embedding(w, c, c.channels, t, labels, guidance), c.patch_size

    def stage(w: Weights, x: Tensor) -> Tensor:
        r = w / "res"
        h = (r / "conv0").conv(silu(group_norm(r / "norm", x, rules)))
        h = (r / "conv1").conv(silu(modulated(r / "modulation", h, emb, rules, double=c.double_norm)))
        x = (((r / "skip").conv(x) if "skip" in r else x) + h) * rules.skip_scale
        return attention_block(w / "attention", x, c.head_channels, rules) if "attention" in w else x

    batch, channels, side, _ = x.shape
    cells = x.reshape(batch, channels, side // patch, patch, side // patch, patch)
    x = (w / "conv_in").conv(cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, side // patch, side // patch))
    x = x + w["position"] if "position" in w else x
    kept, at = [x], iter(range(1000))
    for level in range(len(c.channel_mult)):
        for step in range(c.num_blocks + (level > 0)):
            here = w / "down" / next(at)
            x = here.conv(x, 2) if level and not step else stage(here, x)
            kept.append(x)
    x, at = stage(w / "middle", x), iter(range(1000))
    for level in reversed(range(len(c.channel_mult))):
        for _ in range(c.num_blocks + 1):
            x = stage(w / "up" / next(at), torch.cat([x, kept.pop()], dim=1))
        if level:
            x = (w / "up" / next(at)).conv(box(x, up=True))
    x = (w / "conv_out").conv(silu(group_norm(w / "norm_out", x, rules)))
    cells = x.reshape(batch, channels, patch, patch, side // patch, side // patch)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, side, side)


def transformer(
    w: Weights, c: TransformerConfig, rules: Rules, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor
) -> Tensor:
    emb, patch = embedding(w, c, 64, t, labels, guidance), c.patch_size

    def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if c.double_norm:
            scale, shift = pixel_norm(scale, rules), pixel_norm(shift, rules)
        return pixel_norm(x, rules, dim=2) * scale[:, None] + shift[:, None]

    batch, channels, side, _ = x.shape
    across = side // patch
    cells = x.reshape(batch, channels, across, patch, across, patch).permute(0, 2, 4, 1, 3, 5)
    h = (w / "patch_in").linear(cells.reshape(batch, across**2, -1)) + w["position"]
    shared = (w / "modulation").linear(emb).reshape(batch, 6, -1)
    for i in range(c.depth):
        b = w / "blocks" / i
        scale0, shift0, gate0, scale1, shift1, gate1 = (shared + b["table"]).unbind(1)
        inner = modulate(h, scale0, shift0)
        qkv = torch.cat([(b / name).linear(inner) for name in "qkv"], dim=2).transpose(1, 2)[..., None]
        mixed = attend(qkv, c.channels // c.head_channels)[..., 0].transpose(1, 2)
        h = h + gate0[:, None] * (b / "proj").linear(mixed)
        h = h + gate1[:, None] * (b / "mlp1").linear(silu((b / "mlp0").linear(modulate(h, scale1, shift1))))
    scale, shift = (w / "modulation_out").linear(emb).chunk(2, dim=1)
    cells = (w / "patch_out").linear(modulate(h, scale, shift)).reshape(batch, across, across, channels, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


PAPER: dict[str, Any] = {
    "image_size": 12, "channels": 24, "channel_mult": (1, 3, 2), "num_blocks": 2, "attention_resolutions": (6,),
    "head_channels": 24, "in_channels": 2, "num_classes": 3, "guidance": True, "time_max_period": 500.0,
}  # fmt: skip
OWN: dict[str, Any] = {"image_size": 12, "in_channels": 2, "num_classes": 3, "guidance": True, "patch_size": 2}
CONFIGS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "ddpmpp": (DDPMppConfig(**PAPER), ddpmpp),
    "ddpmpp-plain": (DDPMppConfig(**PAPER, double_norm=False), ddpmpp),
    "ddpmpp-cifar10": (DDPMppConfig(image_size=8, channels=16, attention_resolutions=(4,), double_norm=False), ddpmpp),
    "edm2": (EDM2Config(**PAPER), edm2),
    "edm2-plain": (EDM2Config(**PAPER | {"num_classes": 0, "guidance": False}, double_norm=False), edm2),
    "unet": (
        UNetConfig(**OWN, channels=24, channel_mult=(1, 3), attention_resolutions=(3,), head_channels=24,
                   learned_position=True),
        unet,
    ),
    "unet-plain": (UNetConfig(**OWN | {"patch_size": 1}, channels=16, double_norm=False), unet),
    "transformer": (TransformerConfig(**OWN, channels=24, depth=2, mlp_ratio=3, head_channels=8), transformer),
    "transformer-plain": (TransformerConfig(**OWN, channels=16, head_channels=16, double_norm=False), transformer),
}  # fmt: skip


def difference(name: str, rules: Rules) -> float:
    """Return how far network and transcription are apart, as a share of the largest output."""
    config, transcribed = CONFIGS[name]
    torch.manual_seed(0)
    network: nn.Module = make_network(config).double().eval()
    with torch.no_grad():
        for p in network.parameters():  # what starts at zero would hide what comes before it
            p.add_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
        batch = 3
        x = torch.randn(batch, *config.sample_shape, dtype=torch.float64)
        t = torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64)
        labels, guidance = torch.tensor([0, 2, 3]), torch.tensor([1.0, 1.7, 3.0], dtype=torch.float64)
        given = ([labels] if config.num_classes else []) + ([guidance] if config.guidance else [])
        found = network(x, t, *given)
        wanted = transcribed(Weights(network.state_dict()), config, rules, x, t, labels, guidance)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_compute_what_is_published(name: str) -> None:
    assert difference(name, Rules()) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ddpmpp", {"filter_first": False}),
        ("ddpmpp-cifar10", {"filter_first": False}),
        ("ddpmpp", {"skip_scale": 1.0}),
        ("ddpmpp", {"group_eps": 1e-5}),
        ("ddpmpp", {"pixel_eps": 1e-4}),
        ("ddpmpp", {"group_channels": 8}),
        ("ddpmpp", {"old_first": True}),
        ("edm2", {"magnitude_eps": 2e-4}),
        ("edm2", {"residual_share": 0.5}),
        ("edm2", {"attention_share": 0.5}),
        ("edm2", {"concat_share": 0.3}),
        ("edm2", {"silu_rms": 0.6}),
        ("unet", {"skip_scale": 1.0}),
        ("unet", {"group_eps": 1e-5}),
        ("transformer", {"pixel_eps": 1e-4}),
    ],
)
def test_a_transcription_of_another_rule_differs(name: str, change: dict[str, Any]) -> None:
    assert difference(name, Rules(**change)) > 2 * TOLERANCE
