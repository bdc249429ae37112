"""Validate the arguments of a call to ``Generator``: seeds, labels, noise, sizes.

Every wrong argument is refused here, before a backend sees it. A ``Request`` knows nothing of
batches: two can be merged, and one can be cut anywhere, because each image has its own seed.
"""

from __future__ import annotations

import hashlib
import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from .._util.arguments import check_names
from ..bundle.manifest import ImageSize
from ..errors import ConfigError, ShapeError, UnknownArgument
from ..noise import check_seed, draw_noise, standard_normal
from ..spec import SamplerSpec
from .conditioning import Examples

if TYPE_CHECKING:
    from PIL.Image import Image

OutputType = Literal["pil", "frames", "np", "pt", "uint8", "raw"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)
Labels = SupportsIndex | str | Sequence[int | str] | NDArray[Any]
Seeds = SupportsIndex | Sequence[int] | NDArray[Any]
MAX_IMAGES = 1 << 20
"""Images of one request; more are several requests."""
MAX_BYTES = 1 << 32
"""Maximum size of the samples and inputs (labels, embeddings, without noise) of one request, bytes."""
_FRESH_SEEDS = 1 << 53
"""Upper bound of random seeds, so that they are exact in JSON and JavaScript."""
_SHOWN_NAMES = 12
_EXAMPLE_STEP = 1 << 31


class RequestOptions(TypedDict, total=False):
    """Options of a request of a batcher in addition to ``num_images``, documented at ``Generator.__call__``."""

    class_labels: Labels | None
    num_inference_steps: int | None
    seed: Seeds | None
    noise: Sequence[np.ndarray] | np.ndarray | None
    output_type: OutputType
    guidance_scale: float | Sequence[float] | None
    conditioning: Mapping[str, np.ndarray] | None
    prompt: str | Sequence[str] | None
    prompt_embeds: np.ndarray | None
    prompt_attention_mask: np.ndarray | None
    image: Image | Sequence[Image] | np.ndarray | None
    start_time: float | None
    height: int | None
    width: int | None


_ARGUMENTS = ("num_images", *RequestOptions.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for images of one sampler.

    Attributes:
        spec: The sampler.
        seeds: One seed per image; () if the noise was given.
        noise: One ``(N, *sample_shape)`` float32 array per ``spec.noise_inputs``, or None: drawn from the seeds on
            demand.
        conditioning: ``spec.conditioning_inputs`` by name, ``(N, *shape)``.
        offset: Added to the noise of the first step, ``(N, *sample_shape)`` float32; see ``start.StartImages``. None is
            nothing.
    """

    spec: SamplerSpec
    seeds: tuple[int, ...]
    noise: tuple[np.ndarray, ...] | None
    conditioning: dict[str, np.ndarray]
    offset: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.noise[0]) if self.noise is not None else len(self.seeds)

    @property
    def class_labels(self) -> tuple[int, ...] | None:
        """The label of each image; None for an unconditional model."""
        labels = self.conditioning.get("class_labels")
        return None if labels is None else tuple(int(label) for label in labels)

    def with_noise(self) -> Request:
        """Return this request with its noise drawn; the seeds are kept."""
        return self if self.noise is not None else replace(self, noise=tuple(draw_noise(self.spec, self.seeds)))

    def inputs(self, start: int, stop: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Return noise and conditioning of images ``start`` to ``stop``."""
        if self.noise is None:
            noise = [np.asarray(array) for array in draw_noise(self.spec, self.seeds[start:stop])]
        else:
            noise = [array[start:stop] for array in self.noise]
        if self.offset is not None:
            noise[0] = noise[0] + self.offset[start:stop]
        return noise, {name: array[start:stop] for name, array in self.conditioning.items()}


def merge(requests: Sequence[Request]) -> Request:
    """Join requests of one sampler in order. A joined request with given noise has no seeds."""
    first = requests[0]
    if len(requests) == 1:
        return first
    noise = None
    if any(request.noise is not None or request.offset is not None for request in requests):
        parts = [request.inputs(0, len(request))[0] for request in requests]
        noise = tuple(np.concatenate(step) for step in zip(*parts, strict=True))
    return Request(
        spec=first.spec,
        seeds=() if noise is not None else tuple(seed for request in requests for seed in request.seeds),
        noise=noise,
        conditioning={
            name: np.concatenate([request.conditioning[name] for request in requests]) for name in first.conditioning
        },
    )


def make_request(
    spec: SamplerSpec,
    *,
    num_images: int = 1,
    class_labels: Labels | None = None,
    seed: Seeds | None = None,
    noise: Sequence[np.ndarray] | np.ndarray | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    conditioning: Mapping[str, np.ndarray] | None = None,
    offset: np.ndarray | None = None,
) -> Request:
    """Check the arguments of a call, documented at ``Generator.__call__``; ``offset`` is that of ``Request``.

    Raises:
        ConfigError: If a number, a seed, a label or a name is out of its range.
        ShapeError: If an array has the wrong shape or dtype.
    """
    count = check_num_images(num_images, spec)
    seed, class_labels = _scalar(seed), _scalar(class_labels)
    if noise is not None and seed is not None:
        raise ConfigError("seed and noise are both given, expected one of them: the noise is what a seed names.")
    arrays = None if noise is None else _check_noise(spec, noise, count)
    seeds = () if noise is not None else _seeds(seed, count)
    known: dict[str, np.ndarray] = {}
    if spec.num_classes:
        known["class_labels"] = _labels(spec, class_labels, count, seeds)
    elif class_labels is not None:
        raise ConfigError("class_labels are given, but this model is unconditional. Leave class_labels out.")
    if spec.guidance_range is not None:
        scale = spec.default_guidance if guidance_scale is None else guidance_scale
        known["guidance_scale"] = _guidance(spec.guidance_range, scale, count)
    elif guidance_scale is not None:
        raise ConfigError("guidance_scale is given, but this model has no such input. Leave guidance_scale out.")
    known |= _conditioning(spec, conditioning or {}, count)
    return Request(spec=spec, seeds=seeds, noise=arrays, conditioning=known, offset=offset)


def make_example(
    spec: SamplerSpec, seeds: Sequence[int], *, class_labels: Labels | None = None, examples: Examples | None = None
) -> Request:
    """Create a request with example conditioning, for checks and measurements.

    Conditioning is a row of ``examples``, or standard normal, drawn from the seed like noise, at steps from 2^31 on;
    integers are 0. A guidance scale without a default is the lowest.

    Raises:
        ConfigError: If a seed or a label is out of its range.
    """
    drawn = examples.rows(seeds) if examples is not None else {}
    for i, tensor in enumerate(spec.conditioning):
        if tensor.name in drawn:
            continue
        if tensor.kind == "values" and tensor.dtype == "float32":
            drawn[tensor.name] = np.stack([standard_normal(seed, _EXAMPLE_STEP + i, tensor.shape) for seed in seeds])
        elif tensor.kind == "values":
            drawn[tensor.name] = np.zeros((len(seeds), *tensor.shape), tensor.dtype)
    lowest = spec.guidance_range[0] if spec.guidance_range and spec.default_guidance is None else None
    return make_request(
        spec,
        num_images=len(seeds),
        seed=list(seeds),
        class_labels=class_labels,
        guidance_scale=lowest,
        conditioning=drawn,
    )


def draw_label(seed: int, num_classes: int) -> int:
    """Return the default label of a seed, a fixed function of the seed.

    The first 8 bytes of sha256("scm-label-v1:" + the seed in decimal), little-endian, modulo ``num_classes``;
    independent of the noise.
    """
    digest = hashlib.sha256(f"scm-label-v1:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % num_classes


def check_arguments(arguments: object, *, of: str) -> Mapping[str, Any]:
    """Check the argument names of one request of a stream or a batcher.

    Raises:
        ConfigError: If the arguments are not a mapping.
        UnknownArgument: If a name is unknown.
    """
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"{of} got a {type(arguments).__name__}, expected a mapping of arguments for each request, such as "
            "{'seed': 1}."
        )
    for name in sorted({"batch_size", "events"} & arguments.keys()):
        raise UnknownArgument(
            f"{of} got {name!r}, which only a single call takes: requests share batches, of max_batch images at most. "
            "Leave it out, or open the generator with another max_batch."
        )
    check_names(arguments, _ARGUMENTS, of=of)
    return arguments


def check_count(name: str, value: object, *, most: int | None = None) -> int:
    """Return a count as an int, or raise ``ConfigError`` unless 1 <= value <= ``most``."""
    wanted = "1 or more" if most is None else f"1..{most}"
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name} is {value!r}, expected a whole number, {wanted}.") from None
    if count < 1 or (most is not None and count > most):
        raise ConfigError(f"{name} is {count}, expected {wanted}.")
    return count


def check_image_size(height: object, width: object) -> ImageSize | None:
    """Return an image size, or None where neither is given, or raise ``ConfigError``."""
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise ConfigError(f"height is {height} and width is {width}, expected both, pixels, or neither.")
    return check_count("height", height), check_count("width", width)


def check_num_images(value: object, spec: SamplerSpec) -> int:
    """Return the number of images of a request, or raise ``ConfigError`` if it exceeds the limits.

    Checked before memory is allocated.
    """
    count = check_count("num_images", value)
    inputs = (np.dtype(tensor.dtype).itemsize * math.prod(tensor.shape) for tensor in spec.conditioning_inputs)
    each = 4 * math.prod(spec.image_shape) + sum(inputs)
    most = max(1, min(MAX_IMAGES, MAX_BYTES // each))
    if count > most:
        raise ConfigError(
            f"num_images is {count}, expected at most {most} in one request, {each} bytes each. Make several, for "
            "example with gen.stream."
        )
    return count


def check_output_type(spec: SamplerSpec, output_type: str) -> None:
    """Raise ``ConfigError`` unless ``output_type`` is known and supports the output of the sampler."""
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}.")
    if output_type != "raw" and spec.output != "pixels":
        raise ConfigError(
            f"output_type is {output_type!r}, but this sampler returns {spec.output} of shape {spec.image_shape}, "
            "which have no range to be shown in. Use output_type='raw'."
        )
    if output_type in ("pil", "uint8") and len(spec.image_shape) != 3:
        raise ConfigError(
            f"output_type is {output_type!r}, but this sampler returns samples of shape {spec.image_shape}, expected "
            "pictures (C, H, W). Use output_type='raw' for its own units, 'np' for [0, 1], or 'frames' for clips."
        )
    if output_type == "frames" and (len(spec.image_shape) != 4 or spec.image_shape[0] not in (1, 3)):
        raise ConfigError(
            f"output_type is 'frames', but this sampler returns samples of shape {spec.image_shape}, expected clips "
            "(C, T, H, W) with C = 1 or 3. Use output_type='pil' for images, or 'np'."
        )
    if output_type in ("pil", "uint8") and spec.image_shape[0] not in (1, 3):
        raise ConfigError(
            f"output_type is {output_type!r}, but images have {spec.image_shape[0]} channels, expected 1 "
            "or 3. Use output_type='np'."
        )


def _scalar(value: Any) -> Any:
    """Return the scalar in an array without axes; other values unchanged."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def fresh_seed(count: int) -> int:
    """Return the first of ``count`` new random seeds."""
    return secrets.randbelow(_FRESH_SEEDS - count)


def _seeds(seed: Seeds | None, count: int) -> tuple[int, ...]:
    if seed is None:
        seed = fresh_seed(count)
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str | bytes):
        if len(seed) != count:
            raise ConfigError(f"seed holds {len(seed)} seeds, expected num_images = {count}, or one number.")
        return tuple(check_seed(each) for each in seed)
    first = check_seed(seed)
    check_seed(first + count - 1)  # the last one must exist, too
    return tuple(range(first, first + count))


def _labels(spec: SamplerSpec, labels: Labels | None, count: int, seeds: Sequence[int]) -> np.ndarray:
    if labels is None:
        if not seeds:
            raise ConfigError(
                "noise is given without class_labels, expected a label for each image: no seed draws one."
            )
        return np.array([draw_label(seed, spec.num_classes) for seed in seeds], np.int64)
    if isinstance(labels, Sequence | np.ndarray) and not isinstance(labels, str | bytes):
        if len(labels) != count:
            raise ConfigError(
                f"class_labels holds {len(labels)} labels, expected num_images = {count}, or one label for all."
            )
        return np.array([_label(spec, label) for label in labels], np.int64)
    return np.full(count, _label(spec, labels), np.int64)


def _label(spec: SamplerSpec, label: object) -> int:
    if isinstance(label, str):
        if label in spec.class_names:
            return spec.class_names.index(label)
        digits = label.isascii() and label.isdecimal() and len(label) <= len(str(spec.num_classes))
        if digits and int(label) < spec.num_classes:
            return int(label)
        if not spec.class_names:
            raise ConfigError(f"class label is {label!r}, but the labels have no names. Use 0..{spec.num_classes - 1}.")
        close = get_close_matches(label, spec.class_names, n=3, cutoff=0.5)
        names = ", ".join(spec.class_names[:_SHOWN_NAMES]) + (", ..." if len(spec.class_names) > _SHOWN_NAMES else "")
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"The names are: {names}."
        raise ConfigError(f"class label is {label!r}, expected one of {spec.num_classes} names. {hint}")
    try:
        if isinstance(label, bool | np.bool_):
            raise TypeError
        number = operator.index(label)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"class label is {label!r}, expected a whole number or a name.") from None
    if not 0 <= number < spec.num_classes:
        raise ConfigError(f"class label is {number}, expected 0..{spec.num_classes - 1}.")
    return number


def _check_noise(spec: SamplerSpec, noise: Any, count: int) -> tuple[np.ndarray, ...]:
    wanted = len(spec.noise_inputs)
    shape = (count, *spec.sample_shape)
    do = "scm_sdk.noise.draw_noise makes such arrays."
    if not isinstance(noise, Sequence | np.ndarray) or len(noise) != wanted:
        found = f"{len(noise)} arrays" if isinstance(noise, Sequence | np.ndarray) else type(noise).__name__
        raise ShapeError(f"noise holds {found}, expected {wanted}, one per noise input, each {shape} float32. {do}")
    for step, array in enumerate(noise):
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != np.float32:
            is_array = isinstance(array, np.ndarray)
            found = f"{array.shape} {array.dtype}" if is_array else type(array).__name__
            raise ShapeError(f"noise[{step}] is {found}, expected {shape} float32: num_images first. {do}")
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array).reshape(count, -1).all(axis=1))[0])
            raise ConfigError(f"noise[{step}] holds NaN or infinity in image {bad}, expected finite numbers. {do}")
    return tuple(noise)


def _guidance(limits: tuple[float, float], scale: float | Sequence[float] | None, count: int) -> np.ndarray:
    if scale is None:
        raise ConfigError(f"guidance_scale is missing, expected a number in {limits[0]}..{limits[1]} for this model.")
    try:
        array = np.asarray(scale)
        if array.dtype.kind not in "iuf":  # no texts, also in a list, and no truth values
            raise TypeError
    except (TypeError, ValueError):
        raise ConfigError(f"guidance_scale is {scale!r}, expected a number or one for each image.") from None
    if array.shape not in ((), (count,)):
        raise ConfigError(f"guidance_scale has shape {array.shape}, expected one number or num_images = {count}.")
    if not ((array >= limits[0]) & (array <= limits[1])).all():  # NaN is refused, too
        raise ConfigError(f"guidance_scale is {scale!r}, expected numbers in {limits[0]}..{limits[1]}.")
    return np.broadcast_to(array.astype(np.float32), (count,)).copy()  # a view of one number may not be written to


def _conditioning(spec: SamplerSpec, given: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    wanted = {tensor.name: tensor for tensor in spec.conditioning}
    masks = {t.name: np.ones((count, *t.shape), np.int64) for t in spec.conditioning if t.kind == "mask"}
    if wanted:
        given = masks | dict(given)
    if set(given) != set(wanted):
        raise ConfigError(f"conditioning holds {sorted(given)}, expected exactly {sorted(wanted)}.")
    for name, tensor in wanted.items():
        array, shape = np.asarray(given[name]), (count, *tensor.shape)
        if array.shape != shape or array.dtype != np.dtype(tensor.dtype):
            raise ShapeError(f"conditioning[{name!r}] is {array.shape} {array.dtype}, expected {shape} {tensor.dtype}.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(f"conditioning[{name!r}] holds NaN or infinity, expected finite numbers.")
        if tensor.kind == "mask" and not ((array == 0) | (array == 1)).all():
            raise ConfigError(f"conditioning[{name!r}] holds other numbers, expected 1 for tokens and 0 for padding.")
    return {name: np.asarray(given[name]) for name in wanted}
