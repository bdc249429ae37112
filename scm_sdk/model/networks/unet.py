"""The U-Net for small pixel models: similar to DDPM++, with the three sCM changes (``conditioning``, ``layers``).

``UNetConfig`` describes a network; ``presets`` holds named ones.

Shape letters: B batch, C channels, H height, W width, E embedding.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from ..bounds import check_bounds
from .conditioning import Conditioned
from .layers import AttentionBlock, ResBlock, group_norm, zero_


class UNetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="unet"):
    """The shape of a U-Net.

    Attributes:
        image_size: Height and width, pixels.
        in_channels: Channels of a sample.
        channels: Channels at the highest resolution of the trunk.
        channel_mult: Factor on ``channels`` for each resolution, highest first.
        num_blocks: Residual blocks per resolution of the encoder; the decoder has one more.
        attention_resolutions: Resolutions (of the trunk) that have attention.
        head_channels: Channels of one attention head.
        patch_size: Pixels are folded into channels in squares of this side before the trunk.
        num_classes: Number of class labels; 0 for none.
        dropout: Share of activations dropped in training.
        learned_position: Add a learned map to the trunk's input, for images whose parts have fixed positions.
        double_norm: Adaptive double normalization; False is plain AdaGN, for ablations.
        time_max_period: ``max_period`` of the time embedding.
        time_fourier_scale: Scale of Fourier features of the time, which replace the sinusoids; 0 for none.
        guidance: Whether the guidance scale is an input.
    """

    image_size: int
    in_channels: int = 3
    channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2)
    num_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    head_channels: int = 32
    patch_size: int = 1
    num_classes: int = 0
    dropout: float = 0.0
    learned_position: bool = False
    double_norm: bool = True
    time_max_period: float = 10_000.0
    time_fourier_scale: float = 0.0
    guidance: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        fold = self.patch_size * 2 ** (len(self.channel_mult) - 1)
        if self.image_size % fold:
            raise ConfigError(
                f"image_size is {self.image_size}, expected a multiple of {fold} "
                f"(patch_size {self.patch_size}, {len(self.channel_mult)} resolutions)."
            )
        if self.channels < 8 or self.channels % 8:
            raise ConfigError(f"channels is {self.channels}, expected a multiple of 8.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected a share in [0, 1).")
        trunk = self.image_size // self.patch_size
        known = [trunk >> level for level in range(len(self.channel_mult))]
        if unknown := set(self.attention_resolutions) - set(known):
            raise ConfigError(f"attention_resolutions holds {sorted(unknown)}, the trunk has {known}.")
        for size, mult in zip(known, self.channel_mult, strict=True):
            width = mult * self.channels
            if size in self.attention_resolutions and width % max(1, width // self.head_channels):
                raise ConfigError(
                    f"{width} channels cannot be split into heads of head_channels {self.head_channels}, "
                    "expected a multiple."
                )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""
        return (self.in_channels, self.image_size, self.image_size)


class _Stage(nn.Module):
    """A residual block, with attention at some resolutions."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, resolution: int) -> None:
        super().__init__()
        emb_channels = 4 * config.channels
        self.res = ResBlock(
            in_channels, out_channels, emb_channels, dropout=config.dropout, double_norm=config.double_norm
        )
        self.attention = (
            AttentionBlock(out_channels, head_channels=config.head_channels)
            if resolution in config.attention_resolutions
            else nn.Identity()
        )

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        out: Tensor = self.attention(self.res(x_BCHW, emb_BE))
        return out


class UNet(Conditioned):
    """F_theta(x, t, class_labels): unit-variance samples and a time in, a unit-variance target out."""

    def __init__(self, config: UNetConfig) -> None:
        channels = config.channels
        super().__init__(
            time_channels=channels,
            emb_channels=4 * channels,
            max_period=config.time_max_period,
            fourier_scale=config.time_fourier_scale,
            num_classes=config.num_classes,
            guidance=config.guidance,
        )
        self.config = config
        patch_channels = config.in_channels * config.patch_size**2
        resolution = config.image_size // config.patch_size
        self.conv_in = nn.Conv2d(patch_channels, channels, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(channels, resolution, resolution)) if config.learned_position else None

        widths = [channels * m for m in config.channel_mult]
        skips, width = [channels], channels
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                resolution //= 2
                skips.append(width)
            for _ in range(config.num_blocks):
                self.down.append(_Stage(config, width, out, resolution))
                width = out
                skips.append(width)
        self.middle = _Stage(config, width, width, resolution)
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.num_blocks + 1):
                self.up.append(_Stage(config, width + skips.pop(), out, resolution))
                width = out
            if level:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
                resolution *= 2
        self.norm_out = group_norm(width)
        self.conv_out = zero_(nn.Conv2d(width, patch_channels, 3, padding=1))

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, C, H, W): see ``TimeNetwork``."""
        emb = self.embed(t, class_labels, guidance_scale)
        patch = self.config.patch_size
        h = self.conv_in(functional.pixel_unshuffle(x, patch) if patch > 1 else x)
        if self.position is not None:
            h = h + self.position
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, _Stage) else layer(h)
            skips.append(h)
        h = self.middle(h, emb)
        for layer in self.up:
            if isinstance(layer, _Stage):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            else:
                h = layer(functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        out: Tensor = self.conv_out(functional.silu(self.norm_out(h)))
        return functional.pixel_shuffle(out, patch) if patch > 1 else out
