"""Decode clips one latent frame after the other, by two graphs whose size does not grow with the clip.

    frame_decoder/first/model.onnx   latents (batch, C, 1, h, w) to images (batch, 3, 1, H, W) and caches
    frame_decoder/next/model.onnx    latents and caches to images (batch, 3, T, H, W) and caches
    frame_decoder/frames.json        the shapes

A causal video decoder reads the last frames of each of its layers: the caches. The first latent frame has none, and
makes one frame; each later one makes as many as the decoder's factor in time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from .._util.files import read_regular
from .._util.json_struct import from_json
from ..bundle.layout import CONFIG_MAX_BYTES, FIRST_FRAME_PATH, FRAMES_PATH, NEXT_FRAMES_PATH
from ..errors import BackendFailure, ConfigError, IntegrityError
from ..spec import SamplerSpec, TensorSpec
from .backends import Graph

MAX_CACHES = 1024
_MAX_NUMBERS = 1 << 33
"""Largest number of elements of a clip, or of all caches of one."""


class FrameSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shapes of the graphs of a frame decoder, without the batch axis; ``frames.json`` next to them.

    Attributes:
        sample_shape: Shape of the sampler's output, (C, frames, h, w).
        output_shape: Shape of a clip, (C', T, H, W); T is 1 and a multiple of the other frames of ``sample_shape``.
        cache_shapes: Shape of each cache.
    """

    sample_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    cache_shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        shapes = (self.sample_shape, self.output_shape, *self.cache_shapes)
        if len(shapes) > MAX_CACHES or any(len(shape) != 4 or min(shape) < 1 for shape in shapes):
            raise ConfigError(
                f"{FRAMES_PATH} has {len(shapes)} shapes, the first {str(shapes[:3])[:200]}, expected at most "
                f"{MAX_CACHES} of four axes >= 1."
            )
        latent, frames = self.sample_shape[1], self.output_shape[1]
        if latent < 2 or frames <= latent - 1 or (frames - 1) % (latent - 1):
            raise ConfigError(
                f"{FRAMES_PATH} makes {frames} frames of {latent} latent ones, expected one of the first and equally "
                "many of each later one."
            )
        if max(math.prod(self.output_shape), sum(math.prod(shape) for shape in self.cache_shapes)) > _MAX_NUMBERS:
            raise ConfigError(
                f"{FRAMES_PATH} has a clip of {self.output_shape} or caches of more than {_MAX_NUMBERS} numbers."
            )

    @classmethod
    def read(cls, path: Path) -> FrameSettings:
        """Read ``frames.json``.

        Raises:
            IntegrityError: If it cannot be read.
            ConfigError: If the shapes cannot be those of a frame decoder.
        """

        def refuse(exc: Exception) -> IntegrityError:
            return IntegrityError(f"{path} cannot be read: {exc}. Import the pipeline again.")

        try:
            data = read_regular(path, most=CONFIG_MAX_BYTES)
        except OSError as exc:
            raise refuse(exc) from exc
        return from_json(data, cls, refuse)

    def check(self, spec: SamplerSpec) -> None:
        """Compare the shapes with those of a sampler.

        Raises:
            IntegrityError: If they differ.
        """
        if (spec.sample_shape, spec.image_shape) != (self.sample_shape, self.output_shape):
            raise IntegrityError(
                f"{FRAMES_PATH} decodes latents of {self.sample_shape} to clips of {self.output_shape}, but the "
                f"sampler has {spec.sample_shape} and {spec.image_shape}. Import the pipeline again."
            )

    @property
    def frames_each(self) -> int:
        """Frames of a clip that each latent frame after the first makes."""
        return (self.output_shape[1] - 1) // (self.sample_shape[1] - 1)


def frame_inputs(settings: FrameSettings, *, first: bool) -> list[TensorSpec]:
    """Return the inputs of a graph: one latent frame, and the caches of a later one."""
    channels, _, height, width = settings.sample_shape
    caches = enumerate(() if first else settings.cache_shapes)
    return [
        TensorSpec(name="latents", shape=(channels, 1, height, width)),
        *(TensorSpec(name=f"cache_{i}", shape=shape) for i, shape in caches),
    ]


def frame_outputs(settings: FrameSettings, *, first: bool) -> list[TensorSpec]:
    """Return the outputs of a graph: frames, and the caches for the next latent frame."""
    channels, _, height, width = settings.output_shape
    frames = 1 if first else settings.frames_each
    return [
        TensorSpec(name="images", shape=(channels, frames, height, width)),
        *(TensorSpec(name=f"next_cache_{i}", shape=shape) for i, shape in enumerate(settings.cache_shapes)),
    ]


class OpenGraph(Protocol):
    """Opens one graph of a bundle."""

    def __call__(self, path: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Graph:
        """Open the graph at a path of the bundle, checked."""
        ...


class ClipDecoder:
    """The two graphs as one decoder; see ``Graph``. Thread-safe.

    Args:
        settings: Their shapes.
        open_part: Opens a graph of the bundle.

    Raises:
        ScmError: As ``open_part``.
    """

    def __init__(self, settings: FrameSettings, open_part: OpenGraph) -> None:
        self._settings = settings
        self._graphs: list[Graph] = []
        try:
            for path in (FIRST_FRAME_PATH, NEXT_FRAMES_PATH):
                first = path == FIRST_FRAME_PATH
                inputs, outputs = frame_inputs(settings, first=first), frame_outputs(settings, first=first)
                self._graphs.append(open_part(path, inputs, outputs))
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return clips, ``(N, *output_shape)`` float32 in data units, decoded one after the other.

        Args:
            feeds: ``latents``, the output of the sampler, ``(N, *sample_shape)`` float32.

        Raises:
            BackendFailure: If the library raised, or the decoder is closed.
        """
        if len(self._graphs) != 2:
            raise BackendFailure("the frame decoder was closed, expected an open one. Open the generator again.")
        first, following = self._graphs
        latents = feeds["latents"]
        clips = np.empty((len(latents), *self._settings.output_shape), np.float32)
        for clip, latent in zip(clips, latents, strict=True):
            done = 0
            caches: dict[str, np.ndarray] = {}
            for i in range(latent.shape[1]):
                given = {"latents": np.ascontiguousarray(latent[None, :, i : i + 1]), **caches}
                frames, *kept = (following if i else first).run(given)
                clip[:, done : done + frames.shape[2]] = frames[0]
                done += frames.shape[2]
                caches = {f"cache_{index}": cache for index, cache in enumerate(kept)}
        return [clips]

    def close(self) -> None:
        """Release the memory."""
        graphs, self._graphs = self._graphs, []
        for graph in graphs:
            graph.close()
