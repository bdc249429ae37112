"""Golden samples: outputs of a sampler at export, as a reference for later runs.

One safetensors file, ``golden/golden.safetensors``. For each number of steps n it holds
``{n}step/images`` float32 (B, *image_shape) data units, ``{n}step/seeds`` int64 (B,) and, for a
model with labels, ``{n}step/class_labels`` int64 (B,). Callers: ``bundle``, ``export``, ``evaluate``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._util.files import atomic_write_bytes, open_regular
from ..errors import BundleError, ConfigError, IntegrityError
from ..spec import SamplerSpec

GOLDEN_PATH = "golden/golden.safetensors"
_REPAIR = "Copy the bundle again, or export it again."


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """Recorded samples of one sampler.

    Attributes:
        images: Outputs, (B, *image_shape), float32, data units, not clipped.
        seeds: Their seeds, (B,), int64, 0 or more.
        class_labels: Their labels, (B,), int64; None for a model without labels.
    """

    images: NDArray[np.float32]
    seeds: NDArray[np.int64]
    class_labels: NDArray[np.int64] | None = None


def write_goldens(folder: str | os.PathLike[str], goldens: Mapping[int, Golden]) -> Path:
    """Write the goldens of a new bundle.

    Args:
        folder: The bundle's folder.
        goldens: Samples by number of steps.

    Returns:
        The written file.

    Raises:
        ConfigError: If there are no samples, or one has a wrong dtype, length or value.
        BundleError: If the file cannot be written.
    """
    from safetensors.numpy import save

    if not goldens:
        raise ConfigError("goldens is empty, expected samples for at least one number of steps.")
    tensors: dict[str, NDArray[Any]] = {}
    for steps, golden in goldens.items():
        if problem := _problem(golden):
            raise ConfigError(f"golden of {steps} steps: {problem}")
        tensors[f"{steps}step/images"] = np.ascontiguousarray(golden.images)
        tensors[f"{steps}step/seeds"] = np.ascontiguousarray(golden.seeds)
        if golden.class_labels is not None:
            tensors[f"{steps}step/class_labels"] = np.ascontiguousarray(golden.class_labels)
    path = Path(folder) / GOLDEN_PATH
    atomic_write_bytes(path, save(tensors), error=BundleError)
    return path


def read_goldens(path: Path, samplers: Iterable[SamplerSpec]) -> dict[int, Golden]:
    """Read the goldens of a bundle and check them against the samplers.

    Args:
        path: The file.
        samplers: The samplers of the bundle.

    Returns:
        Samples by number of steps.

    Raises:
        IntegrityError: If the file is damaged, or a tensor is unknown, missing or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        with open_regular(path):  # the library would block on a pipe
            tensors = load_file(path)
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as exc:  # for example float8
        raise IntegrityError(f"{path} cannot be read: {exc}. {_REPAIR}") from exc
    specs = {spec.num_inference_steps: spec for spec in samplers}
    goldens = {}
    for steps in sorted({_steps_of(key, path) for key in tensors}):
        images, seeds = tensors.get(f"{steps}step/images"), tensors.get(f"{steps}step/seeds")
        if images is None or seeds is None or steps not in specs:
            raise IntegrityError(
                f"{path} holds {sorted(tensors)}, expected images and seeds for some of "
                f"{sorted(specs)} steps. {_REPAIR}"
            )
        golden = Golden(images=images, seeds=seeds, class_labels=tensors.get(f"{steps}step/class_labels"))
        if problem := _problem(golden, specs[steps]):
            raise IntegrityError(f"{path}, {steps} steps: {problem} {_REPAIR}")
        goldens[steps] = golden
    return goldens


def check_safetensors(path: Path) -> None:
    """Let the library check the header of a tensor file: length, offsets, dtypes, no gap, no overlap.

    Raises:
        IntegrityError: If it refuses.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path), safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as exc:
        raise IntegrityError(f"{path} is no valid safetensors file: {exc}. {_REPAIR}") from exc


def _steps_of(key: str, path: Path) -> int:
    match = re.fullmatch(r"([1-9][0-9]?)step/(images|seeds|class_labels)", key)
    if match is None:
        raise IntegrityError(f"{path} holds a tensor {key!r}, expected names such as '2step/images'. {_REPAIR}")
    return int(match[1])


def _problem(golden: Golden, spec: SamplerSpec | None = None) -> str:
    """Return the problem of a golden, or an empty string."""
    images, seeds, labels = golden.images, golden.seeds, golden.class_labels
    if images.dtype != np.float32 or not images.size or not np.isfinite(images).all():
        return f"images are {images.dtype} {images.shape}, expected finite float32 numbers, at least one sample."
    if seeds.dtype != np.int64 or seeds.shape != images.shape[:1] or seeds.min() < 0:
        return f"seeds are {seeds.dtype} {seeds.shape}, expected int64, 0 or more, one for each image."
    if labels is not None and (labels.dtype != np.int64 or labels.shape != seeds.shape):
        return f"class_labels are {labels.dtype} {labels.shape}, expected int64, one for each image."
    if spec is None:
        return ""
    if images.shape[1:] != spec.image_shape:
        return f"images have shape {images.shape}, expected (B, {', '.join(map(str, spec.image_shape))})."
    if (labels is None) != (spec.num_classes == 0):
        found = "absent" if labels is None else "there"
        return f"class_labels are {found}, the model has {spec.num_classes} classes."
    if labels is not None and (labels.min() < 0 or labels.max() >= spec.num_classes):
        return f"class_labels hold {labels.min()}..{labels.max()}, expected 0..{spec.num_classes - 1}."
    return ""
