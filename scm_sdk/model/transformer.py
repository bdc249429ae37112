"""A transformer over patches of pixels, with the three sCM changes (``conditioning``, ``layers``).

Every layer is a 1x1 convolution over the map of patches or attention between them, which is to say a matrix product:
what a CPU computes fastest, what quantizers and engines handle best. For small pictures whose parts have fixed places.
One modulation is shared by all blocks, each of which adds a table of its own (as in PixArt-alpha, arXiv 2310.00426).

Shape letters: B batch, C channels, H height, W width, E embedding.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError
from .conditioning import Conditioned
from .layers import attention, pixel_norm, zero_


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="transformer"):
    """The shape of a transformer.

    Attributes:
        image_size: Height and width, pixels.
        in_channels: Channels of a sample.
        channels: Channels of the trunk and size of the embedding.
        depth: Blocks of attention and MLP.
        mlp_ratio: Hidden channels of an MLP as a multiple of ``channels``.
        head_channels: Channels of one attention head.
        patch_size: Side of the squares of pixels that are one place of the trunk.
        num_classes: Class labels; 0 for none.
        dropout: Share of the MLPs' activations dropped in training.
        double_norm: Adaptive double normalization; False normalizes the places alone, for ablations.
        time_max_period: ``max_period`` of the time embedding.
        time_fourier_scale: Scale of Fourier features of the time in its place; 0 for none. For ablations.
        guidance: Whether the guidance scale is an input.
    """

    image_size: int
    in_channels: int = 3
    channels: int = 192
    depth: int = 5
    mlp_ratio: int = 2
    head_channels: int = 32
    patch_size: int = 4
    num_classes: int = 0
    dropout: float = 0.0
    double_norm: bool = True
    time_max_period: float = 10_000.0
    time_fourier_scale: float = 0.0
    guidance: bool = False

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ConfigError(f"image_size is {self.image_size}, expected a multiple of patch_size {self.patch_size}.")
        if self.head_channels < 1 or self.channels < 8 or self.channels % self.head_channels or self.channels % 2:
            raise ConfigError(
                f"channels is {self.channels}, expected an even multiple of head_channels {self.head_channels}, "
                "8 or more."
            )
        if self.depth < 1 or self.mlp_ratio < 1:
            raise ConfigError(f"(depth, mlp_ratio) is ({self.depth}, {self.mlp_ratio}), expected 1 or more each.")
        if not self.time_fourier_scale >= 0:
            raise ConfigError(f"time_fourier_scale is {self.time_fourier_scale}, expected 0 or more.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected a share in [0, 1).")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""
        return (self.in_channels, self.image_size, self.image_size)


class _Block(nn.Module):
    """Attention and an MLP, each behind a doubly normalized modulation and a gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels, hidden = config.channels, config.mlp_ratio * config.channels
        self.num_heads = channels // config.head_channels
        self.double_norm = config.double_norm
        self.table = nn.Parameter(torch.randn(6, channels) * 0.02)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_(nn.Conv2d(channels, channels, 1))
        self.mlp0 = nn.Conv2d(channels, hidden, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp1 = zero_(nn.Conv2d(hidden, channels, 1))

    def forward(self, x_BCHW: Tensor, modulation_B6C: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        scale0, shift0, gate0, scale1, shift1, gate1 = (modulation_B6C + self.table).unbind(1)
        h = attention(self.qkv(_modulate(x_BCHW, scale0, shift0, double=self.double_norm)), self.num_heads)
        x_BCHW = x_BCHW + gate0[:, :, None, None] * self.proj(h)
        h = functional.silu(self.mlp0(_modulate(x_BCHW, scale1, shift1, double=self.double_norm)))
        out: Tensor = x_BCHW + gate1[:, :, None, None] * self.mlp1(self.dropout(h))
        return out


def _modulate(x_BCHW: Tensor, scale_BC: Tensor, shift_BC: Tensor, *, double: bool) -> Tensor:
    """Return ``pnorm(x) * pnorm(scale) + pnorm(shift)``: adaptive double normalization, place by place.

    Without ``double`` scale and shift are taken as they are; then a shift begins small, not as large as the places.
    """
    if double:
        scale_BC, shift_BC = pixel_norm(scale_BC), pixel_norm(shift_BC)
    return pixel_norm(x_BCHW) * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]


class Transformer(Conditioned):
    """F_theta(x, t, class_labels): unit-variance samples and a time in, a unit-variance target out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            time_channels=64,
            emb_channels=config.channels,
            max_period=config.time_max_period,
            fourier_scale=config.time_fourier_scale,
            num_classes=config.num_classes,
            guidance=config.guidance,
        )
        self.config = config
        channels, side = config.channels, config.image_size // config.patch_size
        patch_channels = config.in_channels * config.patch_size**2
        self.modulation = nn.Linear(channels, 6 * channels)
        self.conv_in = nn.Conv2d(patch_channels, channels, 1)
        self.position = nn.Parameter(torch.randn(channels, side, side) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.modulation_out = nn.Linear(channels, 2 * channels)
        self.conv_out = zero_(nn.Conv2d(channels, patch_channels, 1))
        with torch.no_grad():  # scales and gates begin at 1, shifts in some direction
            for layer, ones in ((self.modulation, (0, 2, 3, 5)), (self.modulation_out, (0,))):
                bias = layer.bias.view(-1, channels).normal_(std=0.1)
                bias[list(ones)] = 1.0

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, C, H, W): see ``TimeNetwork``."""
        emb = self.embed(t, class_labels, guidance_scale)
        modulation = self.modulation(emb).unflatten(1, (6, -1))
        h = self.conv_in(functional.pixel_unshuffle(x, self.config.patch_size)) + self.position
        for block in self.blocks:
            h = block(h, modulation)
        scale, shift = self.modulation_out(emb).chunk(2, dim=1)
        h = _modulate(h, scale, shift, double=self.config.double_norm)
        return functional.pixel_shuffle(self.conv_out(h), self.config.patch_size)
