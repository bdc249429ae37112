"""DDPM++, the U-Net for CIFAR-10: that of Score SDE with the settings of EDM and the three sCM changes.

With ``double_norm=False`` it is the unmodified network: the embedding is added before the second normalization. A block
resamples before its first convolution. Weights are initialized as PyTorch does, and a label is added to the embedding's
last layer, unlike in EDM's class-conditional variant.

Shape letters: B batch, C channels, H height, W width, E embedding.
Source: arXiv 2410.11081, section 4.1; Song et al. 2021, arXiv 2011.13456, appendix H; Karras et al. 2022,
arXiv 2206.00364, appendix F.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .conditioning import Conditioned
from .layers import AdaptiveDoubleNorm, AttentionBlock, group_norm, zero_
from .paper_unet import Block, PaperUNetConfig, Place, places, walk


class DDPMppConfig(PaperUNetConfig, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ddpmpp"):
    """The shape of a DDPM++ network; CIFAR-10's by default."""

    image_size: int = 32
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    head_channels: int = 256


class _Block(Block):
    """Two 3x3 convolutions with the embedding between them, resampling before the first; then attention."""

    def __init__(self, config: DDPMppConfig, place: Place) -> None:
        super().__init__(place)
        in_channels, out_channels = place.in_channels, place.out_channels
        emb_channels = 4 * config.channels
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if config.double_norm:
            self.modulation = AdaptiveDoubleNorm(out_channels, emb_channels, norm_affine=True)
        else:
            self.norm1 = group_norm(out_channels)
            self.affine = nn.Linear(emb_channels, out_channels)
        self.double_norm = config.double_norm
        self.dropout = nn.Dropout(config.dropout_at(place.resolution))
        self.conv1 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        plain = in_channels == out_channels and place.resample == "keep"
        self.skip = nn.Identity() if plain else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = AttentionBlock(out_channels, head_channels=config.head_channels) if place.attention else None

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        """Return (B, out_channels, H, W), H and W halved or doubled where the block resamples."""
        h = self.conv0(self._resample(functional.silu(self.norm0(x_BCHW))))
        h = self.modulation(h, emb_BE) if self.double_norm else self.norm1(h + self.affine(emb_BE)[:, :, None, None])
        h = self.conv1(self.dropout(functional.silu(h)))
        out: Tensor = (self.skip(self._resample(x_BCHW)) + h) * math.sqrt(0.5)
        return out if self.attention is None else self.attention(out)

    def _resample(self, x: Tensor) -> Tensor:
        """Halve or double a map with a box filter, before the convolution."""
        if self.place.resample == "up":
            return functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.place.resample == "down" else x


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
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down, self.middle, self.up = (
            nn.ModuleList(_Block(config, place) for place in part) for part in places(config, attention_up="last")
        )
        width = config.channels * config.channel_mult[0]
        self.norm_out = group_norm(width)
        self.conv_out = zero_(nn.Conv2d(width, config.in_channels, 3, padding=1))

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, C, H, W): see ``TimeNetwork``."""
        emb = self.embed(t, class_labels, guidance_scale)
        h = walk(self.down, self.middle, self.up, self.conv_in(x), emb, join=lambda a, b: torch.cat([a, b], dim=1))
        out: Tensor = self.conv_out(functional.silu(self.norm_out(h)))
        return out
