"""The magnitude-preserving U-Net for ImageNet: EDM2 in its configuration G, with the three sCM changes.

With ``double_norm=False`` it modulates as it was: ``y * (1 + gain * linear(emb))``. With it, the paper's rule takes
that place, ``norm(y) * pnorm(s) + pnorm(b)`` with the norm over channels. The paper gives the parameter counts of the
former and the formula of the latter; both are here.

Shape letters: B batch, C channels, H height, W width, E embedding, N places.
Source: Karras et al. 2024, arXiv 2312.02696, sections 2 and B; arXiv 2410.11081, section 4.1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import PositionalEmbedding, attend, check_conditioning, float32_island
from .magnitude import MPConv, mp_cat, mp_silu, mp_sum, normalize
from .paper_unet import PaperUNetConfig

RESIDUAL_SHARE = 0.3
ATTENTION_SHARE = 0.3
SKIP_SHARE = 0.5
LABEL_SHARE = 0.5
LARGEST_ACTIVATION = 256.0


class EDM2Config(PaperUNetConfig, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="edm2"):
    """The shape of an EDM2 network; ImageNet-64's, size S, by default."""

    image_size: int = 64
    channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (16, 8)
    head_channels: int = 64


class _Block(nn.Module):
    """Two 3x3 convolutions with the embedding between them, blended with their input; then attention."""

    def __init__(
        self,
        config: EDM2Config,
        in_channels: int,
        out_channels: int,
        resolution: int,
        *,
        side: Literal["encoder", "decoder"],
        resample: Literal["keep", "down", "up"] = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        emb_channels = max(config.channel_mult) * config.channels
        self.side, self.resample, self.double_norm = side, resample, config.double_norm
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.conv0 = MPConv(out_channels if side == "encoder" else in_channels, out_channels, 3)
        self.modulation = (
            MPConv(emb_channels, 2 * out_channels, 0)
            if config.double_norm
            else MPConv(emb_channels, out_channels, 0, learned_gain=True)
        )
        self.dropout = nn.Dropout(config.dropout_at(resolution))
        self.conv1 = MPConv(out_channels, out_channels, 3)
        self.num_heads = config.heads_of(out_channels)
        self.qkv = MPConv(out_channels, 3 * out_channels, 1) if attention else None
        self.proj = MPConv(out_channels, out_channels, 1) if attention else None

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        """Return (B, out_channels, H, W), H and W halved or doubled where the block resamples."""
        x = x_BCHW
        if self.resample == "down":
            x = functional.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.side == "encoder":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x))
        h = self.conv0(mp_silu(x))
        if self.double_norm:
            scale_BC, shift_BC = self.modulation(emb_BE).chunk(2, dim=1)
            h = normalize(h) * normalize(scale_BC)[:, :, None, None] + normalize(shift_BC)[:, :, None, None]
        else:
            h = h * (self.modulation(emb_BE) + 1.0)[:, :, None, None]
        h = self.conv1(self.dropout(mp_silu(h)))
        if self.side == "decoder" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, RESIDUAL_SHARE)
        if self.qkv is not None and self.proj is not None:
            x = mp_sum(x, self.proj(self._attend(self.qkv(x))), ATTENTION_SHARE)
        return x.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)

    def _attend(self, qkv_BCHW: Tensor) -> Tensor:
        """Attend between all places with queries, keys and values of unit magnitude."""
        B, _, H, W = qkv_BCHW.shape
        qkv = normalize(qkv_BCHW.reshape(B, 3, self.num_heads, -1, H * W), dim=3)
        return attend(*qkv.transpose(-2, -1).unbind(1)).reshape(B, -1, H, W)


class EDM2(nn.Module):
    """F_theta(x, t, class_labels): unit-variance samples and a time in, a unit-variance target out."""

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config = config
        channels, widths = config.channels, [config.channels * m for m in config.channel_mult]
        emb_channels = max(widths)
        self.time_embedding = PositionalEmbedding(channels, config.time_max_period, config.time_fourier_scale)
        self.time_linear = MPConv(channels, emb_channels, 0)
        classes = config.num_classes
        self.label_linear = MPConv(classes, emb_channels, 0, scale=math.sqrt(classes)) if classes else None
        # Its gain starts at zero: a student begins as the teacher whose weights it is given.
        self.guidance_linear = MPConv(channels, emb_channels, 0, learned_gain=True) if config.guidance else None

        resolution, width = config.image_size, channels
        self.conv_in = MPConv(config.in_channels + 1, width, 3)  # one channel of ones takes the place of biases
        skips = [width]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            if level:
                resolution //= 2
                self.down.append(_Block(config, width, width, resolution, side="encoder", resample="down"))
                skips.append(width)
            attention = resolution in config.attention_resolutions
            for _ in range(config.num_blocks):
                self.down.append(_Block(config, width, out, resolution, side="encoder", attention=attention))
                width = out
                skips.append(width)
        self.middle = nn.ModuleList(
            _Block(config, width, width, resolution, side="decoder", attention=a) for a in (True, False)
        )
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            attention = resolution in config.attention_resolutions
            for _ in range(config.num_blocks + 1):
                taken = width + skips.pop()
                self.up.append(_Block(config, taken, out, resolution, side="decoder", attention=attention))
                width = out
            if level:
                resolution *= 2
                self.up.append(_Block(config, width, width, resolution, side="decoder", resample="up"))
        self.conv_out = MPConv(width, config.in_channels, 3, learned_gain=True)

    @float32_island
    def embed(self, t_B: Tensor, class_labels_B: Tensor | None, guidance_scale_B: Tensor | None) -> Tensor:
        """Embed times, labels and guidance scales as (B, E).

        Raises:
            ShapeError: If labels or guidance are given to a network without them.
        """
        config = self.config
        check_conditioning(config.num_classes, config.guidance, class_labels_B, guidance_scale_B)
        emb = self.time_linear(self.time_embedding(t_B) * math.sqrt(2.0))  # sinusoids of unit magnitude
        if self.label_linear is not None:
            if class_labels_B is None:
                class_labels_B = torch.full_like(t_B, config.num_classes, dtype=torch.long)
            numbers = torch.arange(config.num_classes, device=t_B.device)
            one_hot = (class_labels_B[:, None] == numbers).to(emb.dtype)  # all zeros for "no label"
            emb = mp_sum(emb, self.label_linear(one_hot), LABEL_SHARE)
        if self.guidance_linear is not None:
            if guidance_scale_B is None:
                guidance_scale_B = torch.ones_like(t_B)
            emb = emb + self.guidance_linear(self.time_embedding(guidance_scale_B) * math.sqrt(2.0))
        return mp_silu(emb)

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, C, H, W), unitless.

        Args:
            x: Noisy samples divided by ``sigma_data``, (B, C, H, W).
            t: Times, (B,) or (1,), radians.
            class_labels: Labels, (B,), int64 in [0, num_classes); ``num_classes`` or None for none.
            guidance_scale: Guidance scales, (B,), float32; None is 1, the conditional model as it is.

        Raises:
            ShapeError: If labels or guidance are given to a network without them.
        """
        emb = self.embed(t, class_labels, guidance_scale)
        h = self.conv_in(functional.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            assert isinstance(block, _Block)
            h = block(h if block.resample == "up" else mp_cat(h, skips.pop(), SKIP_SHARE), emb)
        out: Tensor = self.conv_out(h)
        return out
