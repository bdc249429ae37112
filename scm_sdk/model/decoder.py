"""The decoder of a latent model: from x_0 to pixels, inside the sampler graph or separate.

A latent model denoises latents that were normalized to standard deviation ``sigma_data``, channel by channel. Its
decoder first undoes that, with numbers from a config, and then runs any module that turns latents into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from .registry import Factory, Registry

DECODERS = Registry("decoder", "scm_sdk.decoders")


def register_decoder(name: str) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a decoder's class, or a function that returns a module, under a name.

    A checkpoint with a decoder holds its weights, this name and the ``arguments`` of ``Decoder``.

    Args:
        name: What checkpoints call it; best with your package's name in front.

    Raises:
        ConfigError: If another is registered under that name.
    """
    return DECODERS.register(name)


class LatentScale(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an autoencoder's latents follow from a sampler's output: ``latents = scale * x_0 + shift``.

    Attributes:
        scale: One factor for each channel, or one for all.
        shift: As many offsets.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (*self.scale, *self.shift)
        if not self.scale or len(self.scale) != len(self.shift) or not all(map(math.isfinite, numbers)):
            raise ConfigError(
                f"a latent scale has scale {self.scale} and shift {self.shift}, expected finite numbers, as many of "
                "each: one for each channel, or one for all."
            )
        if 0 in self.scale:
            raise ConfigError(f"a latent scale has scale {self.scale}, expected none of them 0: it must be invertible.")

    @classmethod
    def of_data(cls, mean: Sequence[float], std: Sequence[float], *, sigma_data: float) -> LatentScale:
        """Return what undoes ``x_0 = (latents - mean) * sigma_data / std``, channel by channel."""
        return cls(scale=tuple(s / sigma_data for s in std), shift=tuple(mean))


def sd_vae_ft_mse(*, sigma_data: float = 0.5) -> LatentScale:
    """Return the scale of sCM's ImageNet-512 latents: ``stabilityai/sd-vae-ft-mse``, 4 channels of 64x64.

    The autoencoder's latents are taken as they come, without its factor of 0.18215.

    Source: arXiv 2410.11081, appendix G.1.
    """
    return LatentScale.of_data((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31), sigma_data=sigma_data)


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint says of its decoder; stored as ``decoder/config.json``.

    Attributes:
        name: Name under which the module is registered; the class's own name where it is not.
        latents: How the sampler's output becomes the autoencoder's latents.
        output_shape: Shape of one output, without the batch axis.
        arguments: What the registered factory is called with; JSON values.
    """

    name: str
    latents: LatentScale
    output_shape: tuple[int, ...]
    arguments: dict[str, Any] = {}

    def make(self, module: nn.Module | None = None) -> Decoder:
        """Return the decoder with a module of yours, or with one of the registered class, with random weights.

        Raises:
            ConfigError: If none is registered, or it does not take the arguments.
        """
        made = DECODERS.make(self.name, self.arguments) if module is None else module
        return Decoder(made, self.latents, self.output_shape, name=self.name, arguments=self.arguments)


class Decoder(nn.Module):
    """Turns what a sampler of latents returns into pixels.

    Args:
        module: Latents (B, C, ...) float32, in the autoencoder's own units, to pixels (B, *output_shape) float32.
        latents: How the sampler's output becomes such latents.
        output_shape: Shape of one output, without the batch axis.
        name: Name of the module's factory for checkpoints; that of the registered class when empty.
        arguments: What the factory is called with to make the module again; JSON values.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        module: nn.Module,
        latents: LatentScale,
        output_shape: Sequence[int],
        *,
        name: str = "",
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.latents = latents
        self.output_shape = tuple(output_shape)
        self._name, self._arguments = name, dict(arguments or {})
        self.register_buffer("scale", torch.tensor(latents.scale), persistent=False)
        self.register_buffer("shift", torch.tensor(latents.shift), persistent=False)

    @property
    def config(self) -> DecoderConfig:
        """What a checkpoint says of this decoder."""
        return DecoderConfig(
            name=self._name or DECODERS.name_of(self.module),
            latents=self.latents,
            output_shape=self.output_shape,
            arguments=self._arguments,
        )

    def forward(self, x_0: Tensor) -> Tensor:
        """Return pixels, (B, *output_shape), not clipped.

        Args:
            x_0: What the sampler returned before decoding, (B, C, ...), of standard deviation ``sigma_data``.

        Raises:
            ShapeError: If the channels are not the scale's, or the module returns another shape.
        """
        pixels: Tensor = self.module(self.to_latents(x_0))
        if tuple(pixels.shape[1:]) != self.output_shape:
            raise ShapeError(
                f"{type(self.module).__name__} turned latents of {tuple(x_0.shape[1:])} into {tuple(pixels.shape[1:])},"
                f" expected {self.output_shape}. Give the Decoder the output_shape of these latents."
            )
        return pixels

    def to_latents(self, x_0: Tensor) -> Tensor:
        """Return the autoencoder's latents, (B, C, ...).

        Raises:
            ShapeError: If the channels are not the scale's.
        """
        channels = len(self.latents.scale)
        if channels not in (1, x_0.shape[1]):
            raise ShapeError(f"x_0 has {x_0.shape[1]} channels, expected {channels}, those of the latent scale.")
        axes = (1, channels, *([1] * (x_0.ndim - 2)))
        return x_0 * self.scale.to(x_0.dtype).reshape(axes) + self.shift.to(x_0.dtype).reshape(axes)

    def from_latents(self, latents: Tensor) -> Tensor:
        """Return what a sampler would return for an autoencoder's latents: training data. Undoes ``to_latents``."""
        axes = (1, len(self.latents.scale), *([1] * (latents.ndim - 2)))
        return (latents - self.shift.to(latents.dtype).reshape(axes)) / self.scale.to(latents.dtype).reshape(axes)
