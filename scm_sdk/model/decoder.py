"""The decoder of a latent model: from x_0 to pixels, inside the sampler graph or separate; and its encoder.

A latent model denoises latents that were normalized to standard deviation ``sigma_data``, channel by channel. Its
decoder first undoes that, with numbers from a config, and then runs any module that turns latents into pixels. Its
encoder is the reverse; only samplers that start from an image need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        name: Name in checkpoints, preferably with the package name as a prefix.

    Raises:
        ConfigError: If another decoder has this name.
    """
    return DECODERS.register(name)


class LatentScale(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversion of a sampler's output to the latents of an autoencoder: ``latents = scale * x_0 + shift``.

    Attributes:
        scale: One factor per channel, or one for all channels.
        shift: Offsets, as many as ``scale``.
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
        """Return the inverse of ``x_0 = (latents - mean) * sigma_data / std`` per channel."""
        return cls(scale=tuple(s / sigma_data for s in std), shift=tuple(mean))


def sd_vae_ft_mse(*, sigma_data: float = 0.5) -> LatentScale:
    """Return the scale of sCM's ImageNet-512 latents: ``stabilityai/sd-vae-ft-mse``, 4 channels of 64x64.

    The latents of the autoencoder are used without its scaling factor of 0.18215.

    Source: arXiv 2410.11081, appendix G.1.
    """
    return LatentScale.of_data((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31), sigma_data=sigma_data)


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Config of a decoder in a checkpoint; stored as ``decoder/config.json``.

    Attributes:
        name: Registered name of the module; the class name if it is not registered.
        latents: Conversion of the sampler's output to latents.
        output_shape: Shape of one output, without the batch axis.
        arguments: Arguments of the registered factory; JSON values.
    """

    name: str
    latents: LatentScale
    output_shape: tuple[int, ...]
    arguments: dict[str, Any] = {}

    def make(self, module: nn.Module | None = None) -> Decoder:
        """Return the decoder with the given module, or with one of the registered class with random weights.

        Raises:
            ConfigError: If the name is not registered, or the factory refuses the arguments.
        """
        made = DECODERS.make(self.name, self.arguments) if module is None else module
        return Decoder(made, self.latents, self.output_shape, name=self.name, arguments=self.arguments)


class Decoder(nn.Module):
    """Decodes the output of a latent sampler to pixels.

    Args:
        module: Maps latents (B, C, ...), float32, in the units of the autoencoder, to pixels ``(B, *output_shape)``,
            float32.
        latents: Conversion of the sampler's output to these latents.
        output_shape: Shape of one output, without the batch axis.
        name: Name of the module's factory in checkpoints; default: that of the registered class.
        arguments: Arguments of the factory; JSON values.
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
        """Config of this decoder in a checkpoint."""
        return DecoderConfig(
            name=self._name or DECODERS.name_of(self.module),
            latents=self.latents,
            output_shape=self.output_shape,
            arguments=self._arguments,
        )

    def forward(self, x_0: Tensor) -> Tensor:
        """Return pixels, ``(B, *output_shape)``, not clipped.

        Args:
            x_0: Output of the sampler, (B, C, ...), with standard deviation ``sigma_data``.

        Raises:
            ShapeError: If the channels do not match the scale, or the module returns another shape.
        """
        pixels: Tensor = self.module(self.to_latents(x_0))
        if tuple(pixels.shape[1:]) != self.output_shape:
            raise ShapeError(
                f"{type(self.module).__name__} turned latents of {tuple(x_0.shape[1:])} into {tuple(pixels.shape[1:])},"
                f" expected {self.output_shape}. Give the Decoder the output_shape of these latents."
            )
        return pixels

    def to_latents(self, x_0: Tensor) -> Tensor:
        """Return the latents of the autoencoder, (B, C, ...).

        Raises:
            ShapeError: If the channels do not match the scale.
        """
        channels = len(self.latents.scale)
        if channels not in (1, x_0.shape[1]):
            raise ShapeError(f"x_0 has {x_0.shape[1]} channels, expected {channels}, those of the latent scale.")
        axes = (1, channels, *([1] * (x_0.ndim - 2)))
        return x_0 * self.scale.to(x_0.dtype).reshape(axes) + self.shift.to(x_0.dtype).reshape(axes)

    def from_latents(self, latents: Tensor) -> Tensor:
        """Convert latents of an autoencoder to training data; the inverse of ``to_latents``."""
        axes = (1, len(self.latents.scale), *([1] * (latents.ndim - 2)))
        return (latents - self.shift.to(latents.dtype).reshape(axes)) / self.scale.to(latents.dtype).reshape(axes)


@dataclass(frozen=True, kw_only=True)
class FrameDecoder:
    """The decoder of clips, one latent frame after the other, for graphs whose size does not grow with the clip.

    Attributes:
        module: Maps one frame of the sampler's output, (B, C, 1, H, W), and a tuple of caches to a tuple: the frame's
            pixels (B, 3, T, H, W) and each cache of the next frame. The first frame has no caches, and other pixels:
            T = 1.
        sample_shape: Shape of the sampler's output, (C, frames, H, W).
        output_shape: Shape of one clip, (3, T, H, W).
        cache_shapes: Shape of each cache, without the batch axis.
    """

    module: nn.Module
    sample_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    cache_shapes: tuple[tuple[int, ...], ...]


class Encoder(nn.Module):
    """Encodes pixels to the data of a latent sampler, the start of ``gen(image=...)``.

    A bundle holds it as a graph alone: a checkpoint does not keep it.

    Args:
        module: Maps pixels (B, C, H, W), float32, in the decoder's value range, to latents (B, ...), float32, in the
            units of the autoencoder; not random.
        latents: Conversion of the sampler's output to these latents, the decoder's; here it is inverted.
        image_shape: Shape of one image, without the batch axis.
        sample_shape: Shape of one sample of latents, without the batch axis.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, module: nn.Module, latents: LatentScale, image_shape: Sequence[int], sample_shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.module = module
        self.image_shape, self.sample_shape = tuple(image_shape), tuple(sample_shape)
        axes = (-1, *([1] * (len(self.sample_shape) - 1)))
        self.register_buffer("scale", torch.tensor(latents.scale).reshape(axes), persistent=False)
        self.register_buffer("shift", torch.tensor(latents.shift).reshape(axes), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return x_0, ``(B, *sample_shape)``.

        Args:
            images: Pixels, ``(B, *image_shape)``.

        Raises:
            ShapeError: If the module returns another shape.
        """
        latents: Tensor = self.module(images)
        if tuple(latents.shape[1:]) != self.sample_shape:
            raise ShapeError(
                f"{type(self.module).__name__} turned images of {tuple(images.shape[1:])} into "
                f"{tuple(latents.shape[1:])}, expected {self.sample_shape}, the samples of the model."
            )
        return (latents - self.shift) / self.scale
