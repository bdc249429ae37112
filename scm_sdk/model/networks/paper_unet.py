"""The base of the paper's two U-Nets, ``ddpmpp`` and ``edm2``: configs and block layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec
from torch import Tensor, nn

from ...errors import ConfigError
from ..bounds import check_bounds


class PaperUNetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of one of the paper's networks.

    Attributes:
        image_size: Height and width, pixels of the image or of the latent.
        in_channels: Channels of a sample.
        channels: Base number of channels, multiplied by ``channel_mult``; also the number of time features.
        channel_mult: Factor on ``channels`` for each resolution, highest first.
        num_blocks: Residual blocks per resolution of the encoder; the decoder has one more.
        attention_resolutions: Resolutions with attention; the lowest always has one attention block.
        head_channels: Channels of one attention head; a map with fewer channels has one head.
        num_classes: Number of class labels; 0 for none.
        guidance: Whether the guidance scale is an input.
        dropout: Share of activations dropped in training.
        dropout_resolution: Largest resolution with dropout; 0 for all.
        double_norm: Adaptive double normalization; False is the original network.
        time_max_period: ``max_period`` of the time embedding.
        time_fourier_scale: Scale of Fourier features of the time, which replace the sinusoids; 0 for none.
    """

    image_size: int
    channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attention_resolutions: tuple[int, ...]
    head_channels: int
    in_channels: int = 3
    num_classes: int = 0
    guidance: bool = False
    dropout: float = 0.0
    dropout_resolution: int = 0
    double_norm: bool = True
    time_max_period: float = 10_000.0
    time_fourier_scale: float = 0.0

    def __post_init__(self) -> None:
        check_bounds(self)
        fold = 2 ** (len(self.channel_mult) - 1)
        if self.image_size < fold or self.image_size % fold:
            raise ConfigError(
                f"image_size is {self.image_size}, expected a multiple of {fold}, "
                f"for {len(self.channel_mult)} resolutions."
            )
        if self.channels < 8 or self.channels % 8:
            raise ConfigError(f"channels is {self.channels}, expected a multiple of 8.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected a share in [0, 1).")
        known = [self.image_size >> level for level in range(len(self.channel_mult))]
        if unknown := set(self.attention_resolutions) - set(known):
            raise ConfigError(f"attention_resolutions holds {sorted(unknown)}, the network has {known}.")
        if self.dropout_resolution and self.dropout_resolution not in known:
            raise ConfigError(f"dropout_resolution is {self.dropout_resolution}, expected 0 or one of {known}.")
        for width in (mult * self.channels for mult in self.channel_mult):
            if width % self.heads_of(width):
                raise ConfigError(
                    f"{width} channels cannot be split into heads of head_channels {self.head_channels}, "
                    "expected a multiple."
                )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""
        return (self.in_channels, self.image_size, self.image_size)

    def heads_of(self, width: int) -> int:
        """Return how many heads attend over maps of ``width`` channels."""
        return max(1, width // self.head_channels)

    def dropout_at(self, resolution: int) -> float:
        """Return the share of activations that is dropped at a resolution."""
        return self.dropout if not self.dropout_resolution or resolution <= self.dropout_resolution else 0.0


class Place(NamedTuple):
    """Position of a block: its channels, its output map, resampling and attention."""

    in_channels: int
    out_channels: int
    resolution: int
    side: Literal["encoder", "decoder"]
    resample: Literal["keep", "down", "up"] = "keep"
    attention: bool = False


def places(
    config: PaperUNetConfig, *, attention_up: Literal["all", "last"]
) -> tuple[list[Place], list[Place], list[Place]]:
    """Return the blocks of the encoder, the middle and the decoder.

    Args:
        config: The network.
        attention_up: Decoder blocks with attention, at a resolution with attention.
    """
    widths = [config.channels * mult for mult in config.channel_mult]
    resolution = config.image_size
    width, skips = config.channels, [config.channels]
    down, up = list[Place](), list[Place]()
    for level, out in enumerate(widths):
        if level:
            resolution //= 2
            down.append(Place(width, width, resolution, "encoder", resample="down"))
            skips.append(width)
        attention = resolution in config.attention_resolutions
        for _ in range(config.num_blocks):
            down.append(Place(width, out, resolution, "encoder", attention=attention))
            width = out
            skips.append(width)
    middle = [Place(width, width, resolution, "decoder", attention=attention) for attention in (True, False)]
    for level, out in reversed(list(enumerate(widths))):
        for i in range(config.num_blocks + 1):
            attention = resolution in config.attention_resolutions and (attention_up == "all" or i == config.num_blocks)
            up.append(Place(width + skips.pop(), out, resolution, "decoder", attention=attention))
            width = out
        if level:
            resolution *= 2
            up.append(Place(width, width, resolution, "decoder", resample="up"))
    return down, middle, up


class Block(nn.Module):
    """A block of either network: called with a map (B, C, H, W) and the embedding (B, E).

    Attributes:
        place: Position of the block.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place


def walk(
    down: nn.ModuleList,
    middle: nn.ModuleList,
    up: nn.ModuleList,
    h: Tensor,
    emb: Tensor,
    *,
    join: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Run the blocks of ``places`` and return the last map.

    Args:
        down: Encoder blocks.
        middle: Middle blocks.
        up: Decoder blocks.
        h: The first map, (B, C, H, W).
        emb: The embedding, (B, E).
        join: Concatenates a decoder map and the encoder map of the same size.
    """
    skips = [h]
    for block in down:
        h = block(h, emb)
        skips.append(h)
    for block in middle:
        h = block(h, emb)
    for block in up:
        assert isinstance(block, Block)
        h = block(h if block.place.resample == "up" else join(h, skips.pop()), emb)
    return h
