"""A transformer over patches of pixels, with the three sCM changes (``conditioning``, ``layers``).

Every layer is a linear map of each patch or attention between patches, with the channels last: one matrix product per
batch, which is fastest on a CPU (1x1 convolutions took 1.2 times as long). For small images whose parts have fixed
positions. All blocks share one modulation, to which each block adds a table (as in PixArt-alpha, arXiv 2310.00426).

Shape letters: B batch, N patches, C channels, P channels of a patch's pixels, E embedding.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from ..bounds import check_bounds
from .conditioning import Conditioned
from .layers import attend, pixel_norm, zero_


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="transformer"):
    """The shape of a transformer.

    Attributes:
        image_size: Height and width, pixels.
        in_channels: Channels of a sample.
        channels: Channels of the trunk and size of the embedding.
        depth: Blocks of attention and MLP.
        mlp_ratio: Hidden channels of an MLP as a multiple of ``channels``.
        head_channels: Channels of one attention head.
        patch_size: Side of a patch, pixels.
        num_classes: Number of class labels; 0 for none.
        dropout: Share of MLP activations dropped in training.
        double_norm: Adaptive double normalization; False normalizes only the patches, for ablations.
        time_max_period: ``max_period`` of the time embedding.
        time_fourier_scale: Scale of Fourier features of the time, which replace the sinusoids; 0 for none.
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
        check_bounds(self)
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size is {self.image_size}, expected a multiple of patch_size {self.patch_size}.")
        if self.channels < 8 or self.channels % self.head_channels or self.channels % 2:
            raise ConfigError(
                f"channels is {self.channels}, expected an even multiple of head_channels {self.head_channels}, "
                "8 or more."
            )
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
        self.table = nn.Parameter(torch.empty(6, channels).normal_(std=0.02))
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.proj = zero_(nn.Linear(channels, channels))
        self.mlp0 = nn.Linear(channels, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp1 = zero_(nn.Linear(hidden, channels))

    def forward(self, x_BNC: Tensor, modulation_B6C: Tensor) -> Tensor:
        """Return (B, N, C)."""
        scale0, shift0, gate0, scale1, shift1, gate1 = (modulation_B6C + self.table).unbind(1)
        h = self._attend(_modulate(x_BNC, scale0, shift0, double=self.double_norm))
        x_BNC = x_BNC + gate0[:, None] * self.proj(h)
        h = functional.silu(self.mlp0(_modulate(x_BNC, scale1, shift1, double=self.double_norm)))
        out: Tensor = x_BNC + gate1[:, None] * self.mlp1(self.dropout(h))
        return out

    def _attend(self, x_BNC: Tensor) -> Tensor:
        """Attend between all patches.

        Queries, keys and values have separate layers, because TensorRT-RTX computes a joint int8 layer in half
        precision.
        """
        B, N, _ = x_BNC.shape
        q, k, v = (layer(x_BNC).reshape(B, N, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return attend(q, k, v).transpose(1, 2).reshape(B, N, -1)


def _modulate(x_BNC: Tensor, scale_BC: Tensor, shift_BC: Tensor, *, double: bool) -> Tensor:
    """Return ``pnorm(x) * pnorm(scale) + pnorm(shift)``: adaptive double normalization, patch by patch.

    Without ``double``, scale and shift are not normalized, and the initial shift is small.
    """
    if double:
        scale_BC, shift_BC = pixel_norm(scale_BC), pixel_norm(shift_BC)
    return pixel_norm(x_BNC, dim=2) * scale_BC[:, None] + shift_BC[:, None]


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
        channels, places = config.channels, (config.image_size // config.patch_size) ** 2
        patch_channels = config.in_channels * config.patch_size**2
        self.modulation = nn.Linear(channels, 6 * channels)
        self.patch_in = nn.Linear(patch_channels, channels)
        self.position = nn.Parameter(torch.empty(places, channels).normal_(std=0.02))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.modulation_out = nn.Linear(channels, 2 * channels)
        self.patch_out = zero_(nn.Linear(channels, patch_channels))
        with torch.no_grad():  # scales and gates start at 1, shifts in a random direction
            for layer, ones in ((self.modulation, (0, 2, 3, 5)), (self.modulation_out, (0,))):
                bias = layer.bias.view(-1, channels).normal_(std=0.1)
                bias[list(ones)] = 1.0

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, C, H, W): see ``TimeNetwork``."""
        emb = self.embed(t, class_labels, guidance_scale)
        modulation = self.modulation(emb).unflatten(1, (6, -1))
        h = self.patch_in(_patches(x, self.config.patch_size)) + self.position
        for block in self.blocks:
            h = block(h, modulation)
        scale, shift = self.modulation_out(emb).chunk(2, dim=1)
        h = self.patch_out(_modulate(h, scale, shift, double=self.config.double_norm))
        return _picture(h, self.config.patch_size, x.shape[-1])


def _patches(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """Return the squares of pixels, row by row, (B, N, P)."""
    B, C, H, W = x_BCHW.shape
    squares = x_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch_size**2)


def _picture(x_BNP: Tensor, patch_size: int, width: int) -> Tensor:
    """Undo ``_patches``: (B, C, H, W)."""
    B, across = x_BNP.shape[0], width // patch_size
    squares = x_BNP.reshape(B, -1, across, x_BNP.shape[2] // patch_size**2, patch_size, patch_size)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(B, squares.shape[3], -1, width)
