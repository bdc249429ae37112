"""Image-to-image: samplers that start from an image at their first time.

The first state of a sampler is ``x_t = sin(t) sigma_data noise``. From an image with data x_0 it is to be
``x_t = cos(t) x_0 + sin(t) sigma_data noise``, which is the same graph with other noise: the offset
``x_0 cos(t) / (sin(t) sigma_data)`` is added. So every artifact of a sampler, engines included, also starts from an
image, at the sampler's own first time, which is a constant of the graph.

x_0 of a latent model comes from the graph of its encoder, by ONNX Runtime; of a pixel model it is the image.

Source: arXiv 2108.01073 (SDEdit), section 3, in TrigFlow's times.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.layout import ENCODER_PATH
from ..errors import ConfigError, ShapeError
from ..spec import SamplerSpec, TensorSpec
from .backends import Graph, open_graph
from .parts import Part
from .sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_WEIGHT = 0.02
"""Smallest weight cos(t) of the image in the first state. At SANA-Sprint's own first time it is -4e-6: nothing of the
image remains."""
_SAME_TIME = 1e-5
_ADD = "scm-export import or onnx with --start-time makes such a sampler."


class StartImages:
    """Turns the images of calls to offsets of the noise; thread-safe.

    Args:
        source: The model on disk.
        device: Device of the encoder; None is the CPU.
        num_threads: CPU threads of the encoder; None is the default of the library.
        turn: See ``Part``.
    """

    def __init__(
        self, source: Source, *, device: str | None, num_threads: int | None, turn: threading.Lock | None = None
    ) -> None:
        self._source, self._device, self._num_threads = source, device, num_threads
        self._turn = turn
        self._encoder: Part[Graph] | None = None
        self._last: tuple[bytes, np.ndarray] | None = None
        self._lock = threading.Lock()

    def times(self) -> dict[int, float]:
        """Return the start time, radians, of each sampler that can start from an image, by its number of steps."""
        specs = [self._source.spec(steps, unrolled=False) for steps in self._source.steps]
        return {
            spec.num_inference_steps: spec.times[0]
            for spec in specs
            if can_start(spec, has_encoder=has_encoder(self._source.bundle))
        }

    def steps(
        self, image: object, start_time: object, asked: int | None, *, offered: Sequence[int] | None = None
    ) -> int | None:
        """Return the number of steps of the sampler that starts at a time; ``asked`` without an image.

        Args:
            image: The image of the call, or None.
            start_time: First time of the sampler, radians.
            asked: The number of steps of the call, or None.
            offered: The numbers of steps to choose from; None is all of the model.

        Raises:
            ConfigError: If only one of the two is given, or no sampler starts at this time.
        """
        if image is None:
            if start_time is not None:
                raise ConfigError(f"start_time is {start_time!r} without an image, expected both or neither.")
            return asked
        specs = [self._source.spec(steps, unrolled=False) for steps in offered or self._source.steps]
        able = sorted((s for s in specs if _weight(s) >= MIN_WEIGHT), key=lambda s: s.num_inference_steps)
        known = ", ".join(f"{s.times[0]:.6g} ({s.num_inference_steps} steps)" for s in able)
        if not able:
            raise ConfigError(
                f"an image is given, but every sampler of {self._source.path} starts from noise, at "
                f"{specs[0].times[0]:.6g} radians, where nothing of an image remains; expected one that starts later. "
                f"{_ADD}"
            )
        if isinstance(start_time, bool) or not isinstance(start_time, int | float | np.floating):
            raise ConfigError(f"start_time is {start_time!r} with an image, expected radians, one of {known}.")
        found = [s for s in able if abs(s.times[0] - float(start_time)) <= _SAME_TIME]
        if not found:
            raise ConfigError(f"start_time is {float(start_time):.6g}, expected one of {known}. {_ADD}")
        steps = [spec.num_inference_steps for spec in found]
        if asked is not None and asked not in steps:
            raise ConfigError(
                f"num_inference_steps is {asked} with start_time {float(start_time):.6g}, expected "
                f"{' or '.join(map(str, steps))}, the samplers that start there."
            )
        return steps[0] if asked is None else asked

    def offset(self, spec: SamplerSpec, count: int, image: object) -> np.ndarray | None:
        """Return the offset of the noise of the first step, ``(count, *sample_shape)`` float32; None without an image.

        Args:
            spec: A sampler that ``steps`` chose.
            count: Number of images to generate.
            image: As in ``Generator.__call__``.

        Raises:
            ConfigError: If the image has another mode or value range, or the bundle has no encoder.
            ShapeError: If it has another size or dtype, or there are too many or too few.
            IntegrityError: If the encoder was changed.
        """
        if image is None:
            return None
        if spec.renoise == "same" and spec.num_inference_steps > 1:
            raise ConfigError(
                "an image is given, but renoise of this sampler is 'same', which would add the image again in each "
                "step; expected 'fresh' or 'ode'."
            )
        pixels = _to_data(spec, count, image)
        # A pixel model has no decoder, so its spec has no output shape.
        x_0 = pixels if not spec.output_shape else self._encode(spec, pixels)
        offset = offset_factor(spec) * x_0
        return np.broadcast_to(offset, (count, *spec.sample_shape))

    def close(self) -> None:
        """Release the memory of the encoder."""
        with self._lock:
            if self._encoder is not None:
                self._encoder.close()

    def _encode(self, spec: SamplerSpec, pixels: np.ndarray) -> np.ndarray:
        digest = hashlib.sha256(pixels.tobytes()).digest()
        with self._lock:
            if self._encoder is None:
                self._encoder = Part(partial(self._open, spec), self._turn)
            part, last = self._encoder, self._last
        if last is not None and last[0] == digest:  # a request that was split into one for each image
            return last[1]
        with part.use() as encoder:
            latents = np.concatenate([encoder.run({"images": each[None]})[0] for each in pixels])
        with self._lock:
            self._last = digest, latents
        return latents

    def _open(self, spec: SamplerSpec) -> Graph:
        bundle = self._source.bundle
        if bundle is None or not has_encoder(bundle):
            raise ConfigError(
                f"an image is given, but {self._source.path} has no encoder graph, expected {ENCODER_PATH}. Import the "
                "pipeline with --encoder."
            )
        self._source.check_unchanged(ENCODER_PATH)
        bundle.check_graph(ENCODER_PATH)
        images = TensorSpec(name="images", shape=spec.image_shape)
        latents = TensorSpec(name="latents", shape=spec.sample_shape)
        return open_graph(
            bundle.file(ENCODER_PATH), [images], [latents], device=self._device, num_threads=self._num_threads
        )


def offset_factor(spec: SamplerSpec) -> np.float32:
    """Return the factor that turns x_0 into the offset of the first noise."""
    t = spec.times[0]
    return np.float32(math.cos(t) / (math.sin(t) * spec.sigma_data))


def can_start(spec: SamplerSpec, *, has_encoder: bool) -> bool:
    """Return whether a sampler can start from an image, in a bundle with or without the graph of an encoder."""
    return (
        _weight(spec) >= MIN_WEIGHT
        and len(spec.image_shape) == 3
        and (not spec.output_shape or has_encoder)
        and (spec.renoise != "same" or spec.num_inference_steps == 1)
    )


def has_encoder(bundle: Bundle | None) -> bool:
    """Return whether a bundle has the graph of an encoder."""
    return bundle is not None and any(entry.path == ENCODER_PATH for entry in bundle.manifest.files)


def _to_data(spec: SamplerSpec, count: int, image: Any) -> np.ndarray:
    """Convert images to data units, (1 or count, C, H, W) float32.

    Args:
        spec: The sampler.
        count: Number of images to generate.
        image: A PIL image, a list of them, or an array (H, W, C) or (N, H, W, C): uint8, or float32 in [0, 1].

    Raises:
        ConfigError: If a PIL image has another mode, or a float is not in [0, 1].
        ShapeError: If the size, the dtype or the number is wrong.
    """
    shape = spec.image_shape
    if len(shape) != 3:
        raise ConfigError(f"an image is given, but samples have shape {shape}, expected a model of images (C, H, W).")
    channels, height, width = shape
    array = image if isinstance(image, np.ndarray) else _from_pil(image, "L" if channels == 1 else "RGB")
    array = array[None] if array.ndim == 3 else array
    if array.dtype not in (np.uint8, np.float32) or array.ndim != 4:
        raise ShapeError(
            f"image is {array.shape} {array.dtype}, expected (H, W, C) or (N, H, W, C), uint8 or float32 in [0, 1]."
        )
    if array.shape[1:] != (height, width, channels):
        raise ShapeError(
            f"image is {array.shape[1]}x{array.shape[2]} pixels (height x width) with {array.shape[3]} channels, "
            f"expected {height}x{width} with {channels}, the size that the model was exported for. Resize it first."
        )
    if len(array) not in (1, count):
        raise ShapeError(f"image holds {len(array)} images, expected num_images = {count}, or one for all.")
    low, high = spec.value_range
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / np.float32(255)
    elif not ((array >= 0) & (array <= 1)).all():  # NaN is refused, too
        raise ConfigError("image holds numbers outside of [0, 1], expected that range. Divide levels of 0..255 by 255.")
    data = array * np.float32(high - low) + np.float32(low)
    return np.ascontiguousarray(data.transpose(0, 3, 1, 2))


def _from_pil(image: Image | Sequence[Image], mode: str) -> np.ndarray:
    images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    if not images or not all(hasattr(each, "mode") and hasattr(each, "size") for each in images):
        raise ConfigError(
            f"image is {type(image).__name__}, expected a PIL image, a list of them, or an array (H, W, C)."
        )
    for each in images:
        if each.mode != mode:
            raise ConfigError(f"image has mode {each.mode}, expected {mode}: image.convert({mode!r}).")
    if len(sizes := {each.size for each in images}) > 1:
        raise ShapeError(f"images have the sizes {sorted(sizes)} (width, height), expected one size. Resize them.")
    arrays = [np.asarray(each) for each in images]
    return np.stack([array[:, :, None] if mode == "L" else array for array in arrays])


def _weight(spec: SamplerSpec) -> float:
    return math.cos(spec.times[0])
