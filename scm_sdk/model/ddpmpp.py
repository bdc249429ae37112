"""DDPM++, the U-Net for CIFAR-10: that of Score SDE with the settings of EDM and the three sCM changes.

With ``double_norm=False`` it is the unmodified network: the embedding is added before the second normalization.

Shape letters: B batch, C channels, H height, W width, E embedding.
Source: arXiv 2410.11081, section 4.1; Song et al. 2021, arXiv 2011.13456, appendix H; Karras et al. 2022,
arXiv 2206.00364, appendix F.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import AdaptiveDoubleNorm, AttentionBlock, Conditioned, group_norm, zero_
from .paper_unet import PaperUNetConfig

Resample = Literal["keep", "down", "up"]


class DDPMppConfig(PaperUNetConfig, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ddpmpp"):
    """The shape of a DDPM++ network; CIFAR-10's by default."""

    image_size: int = 32
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    head_channels: int = 256


class _Block(nn.Module):
    """Two 3x3 convolutions with the embedding between them, resampling in the first; then attention."""

    def __init__(
        self,
        config: DDPMppConfig,
        in_channels: int,
        out_channels: int,
        resolution: int,
        *,
        resample: Resample = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        emb_channels = 4 * config.channels
        self.resample = resample
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if config.double_norm:
            self.modulation = AdaptiveDoubleNorm(out_channels, emb_channels, norm_affine=True)
        else:
            self.norm1 = group_norm(out_channels)
            self.affine = nn.Linear(emb_channels, out_channels)
        self.double_norm = config.double_norm
        self.dropout = nn.Dropout(config.dropout_at(resolution))
        self.conv1 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        plain = in_channels == out_channels and resample == "keep"
        self.skip = nn.Identity() if plain else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = AttentionBlock(out_channels, head_channels=config.head_channels) if attention else None

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        """Return (B, out_channels, H, W), H and W halved or doubled where the block resamples."""
        h = self._convolve(self.conv0, functional.silu(self.norm0(x_BCHW)))
        h = self.modulation(h, emb_BE) if self.double_norm else self.norm1(h + self.affine(emb_BE)[:, :, None, None])
        h = self.conv1(self.dropout(functional.silu(h)))
        out: Tensor = (self._convolve(self.skip, x_BCHW) + h) * math.sqrt(0.5)
        return out if self.attention is None else self.attention(out)

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply a layer on the higher of the two resolutions, with box filters between them."""
        if self.resample == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = layer(x)
        return functional.avg_pool2d(out, 2) if self.resample == "down" else out


class DDPMpp(Conditioned):
    """F_theta(x, t, class_labels): unit-variance samples and a time in, a unit-variance target out."""

    def __init__(self, config: DDPMppConfig) -> None:
        super().__init__(
            time_channels=config.channels,
            emb_channels=4 * config.channels,
            max_period=config.time_max_period,
            fourier_scale=config.time_fourier_scale,
            num_classes=config.num_classes,
            guidance=config.guidance,
        )
        self.config = config
        widths = [config.channels * m for m in config.channel_mult]
        resolution, width = config.image_size, config.channels
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        skips = [width]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            if level:
                resolution //= 2
                self.down.append(_Block(config, width, width, resolution, resample="down"))
                skips.append(width)
            attention = resolution in config.attention_resolutions
            for _ in range(config.num_blocks):
                self.down.append(_Block(config, width, out, resolution, attention=attention))
                width = out
                skips.append(width)
        self.middle = nn.ModuleList(_Block(config, width, width, resolution, attention=a) for a in (True, False))
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(config.num_blocks + 1):
                attention = resolution in config.attention_resolutions and i == config.num_blocks
                self.up.append(_Block(config, width + skips.pop(), out, resolution, attention=attention))
                width = out
            if level:
                resolution *= 2
                self.up.append(_Block(config, width, width, resolution, resample="up"))
        self.norm_out = group_norm(width)
        self.conv_out = zero_(nn.Conv2d(width, config.in_channels, 3, padding=1))

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
        h = self.conv_in(x)
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            assert isinstance(block, _Block)
            h = block(h if block.resample == "up" else torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(h)))
        return out
