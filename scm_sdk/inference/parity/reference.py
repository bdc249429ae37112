"""The reference run of a comparison: its images on given noise, and its noise floor.

The noise floor is the difference that a correct program may have from the reference. A network amplifies rounding by a
factor that differs between samples by two orders of magnitude, so the floor is measured on the compared samples. Each
rerun of the reference perturbs every value of the noise by one unit in the last place, up or down at random, which also
changes every later rounding; both runs are equally correct. The method applies to any backend, device, batch size and
number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..._util.processor import cpu_class
from ...errors import ConfigError
from ...spec import Precision, SamplerSpec
from ..backends import BACKENDS, Backend
from ..conditioning import Examples
from ..request import Request, make_example
from ..session import OpensBackends

JUDGMENT = range(0, 1 << 40)
CALIBRATION = range(1 << 40, 1 << 41)
SELECTION = range(1 << 41, 1 << 42)
"""Disjoint ranges of seeds, so that no graph is tested on samples that tuned it: ``calibration`` measures ranges on
``CALIBRATION``, ``precision.probe`` compares plans on ``SELECTION``, and the parity gate (``validate``) tests on
``JUDGMENT``, from its first seed or another one (``validate --first-seed``)."""
NUM_SEEDS = 32
NUM_RERUNS = 8
"""Reruns of the reference. With four, 5 of 1,024 single samples of the shipped model differed between PyTorch and
ONNX Runtime by more than ``FLOOR_FACTOR`` times the floor; with eight, none did."""
LEAST_RERUNS, RERUN_SECONDS = 2, 60.0
"""After ``LEAST_RERUNS``, no rerun starts later than this many seconds after the first."""
SPLITS: tuple[int | None, ...] = (1, 3, None)
"""Default batch splits; those above the largest batch are dropped."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the open backend of a generator, or a given backend.

    The precision of a given backend is unknown: "". ``lowered`` is the precision if the backend computes in a lower one
    than that of the artifact, ``cpu_class`` the class of this CPU if the numbers depend on it, ``any_steps`` whether
    the artifact runs any number of steps.
    """

    backend: Backend
    spec: SamplerSpec
    name: str
    artifact: str
    precision: str = ""
    lowered: Precision | Literal[""] = ""
    cpu_class: str = ""
    any_steps: bool = False

    @classmethod
    def of(cls, given: OpensBackends | Backend, steps: int | None) -> Side:
        """Return the side of a generator with a number of steps, or of a backend."""
        if isinstance(given, OpensBackends):
            opened = given.opened(steps)
            row = opened.row
            by_class = BACKENDS[row.backend].needs_cpu_class(row.precision, opened.device)
            return cls(
                opened.backend, opened.spec, row.backend, row.artifact, row.precision,
                lowered=row.precision if row.lowered else "", cpu_class=cpu_class() if by_class else "",
                any_steps=row.num_inference_steps == 0,
            )  # fmt: skip
        kind = type(given).__name__
        if not isinstance(given, Backend):
            raise ConfigError(f"{kind} cannot be compared, expected a Generator or an object with spec and sample.")
        return cls(given, given.spec, str(getattr(given, "name", kind)), kind)

    def run(
        self,
        request: Request,
        batch_size: int,
        *,
        move: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda x: x,
    ) -> NDArray[np.float32]:
        """Run a request in batches of one size, with its noise changed by ``move``.

        Returns:
            The images, ``(N, *image_shape)``, float32.
        """
        parts = []
        for at in range(0, len(request), batch_size):
            noise, conditioning = request.inputs(at, min(at + batch_size, len(request)))
            parts.append(self.backend.sample([move(array) for array in noise], conditioning))
        return np.concatenate(parts)


@dataclass(frozen=True)
class ReferenceRun:
    """Images of a reference for a request, for each batch split, and its noise floor.

    Created once by ``run_reference`` for any number of candidates.
    """

    spec: SamplerSpec
    name: str
    artifact: str
    precision: str
    request: Request
    images: dict[int, NDArray[np.float32]]
    noise_floor: float


def run_reference(
    reference: OpensBackends | Backend,
    *,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int | None] | None = None,
    num_inference_steps: int | None = None,
    most: int | None = None,
    examples: Examples | None = None,
) -> ReferenceRun:
    """Run a reference for comparisons with candidates.

    Args:
        reference: The reference: a generator or an open backend.
        seeds: The samples; None is 0..31, or as many as the largest batch. Labels are drawn from the seeds.
        batches: Batch splits to run, None among them is the largest; None is 1, 3 and the largest.
        num_inference_steps: Number of steps of a generator; None is its default.
        examples: Conditioning inputs; None draws them.
        most: Largest batch, if the candidates allow less than the reference.

    Raises:
        ConfigError: If a batch is out of range.
        BackendError: If it cannot run.
    """
    side = Side.of(reference, num_inference_steps)
    sizes, request = _request(
        side.spec, seeds, batches, min(side.spec.max_batch, most or side.spec.max_batch), examples
    )
    images = {size: side.run(request, size) for size in sizes}
    return ReferenceRun(
        side.spec, side.name, side.artifact, side.precision, request, images, _floor(images, side, request)
    )


def noise_floor(
    reference: OpensBackends | Backend,
    *,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int | None] | None = None,
    num_inference_steps: int | None = None,
) -> float:
    """Measure the numerical noise of a reference: rerun it in other batch splits, and on noise changed by rounding.

    Arguments as for ``run_reference``.

    Returns:
        The largest absolute difference, units of sigma_data.

    Raises:
        ConfigError: If a batch is out of range.
        BackendError: If it cannot run.
    """
    run = run_reference(reference, seeds=seeds, batches=batches, num_inference_steps=num_inference_steps)
    return run.noise_floor


def _floor(images: dict[int, NDArray[np.float32]], side: Side, request: Request) -> float:
    """Return the largest difference of the images from those of another split or a rerun, units of sigma_data."""
    if not all(np.isfinite(image).all() for image in images.values()):
        return 0.0  # compare() fails on its finite check
    largest = max(images)
    others = [image for size, image in images.items() if size != largest]
    start = perf_counter()
    for rerun in range(NUM_RERUNS):
        if rerun >= LEAST_RERUNS and perf_counter() - start > RERUN_SECONDS:
            break
        rng = np.random.default_rng(rerun)
        others.append(side.run(request, largest, move=partial(_move_by_rounding, rng)))
    with np.errstate(invalid="ignore"):
        worst = max(float(np.abs(images[largest] - other).max()) for other in others)
    return worst / side.spec.sigma_data if np.isfinite(worst) else 0.0


def _move_by_rounding(rng: np.random.Generator, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 values moved by one unit in the last place each, up or down at random."""
    to = np.where(rng.random(array.shape, np.float32) < 0.5, np.float32(-np.inf), np.float32(np.inf))
    return np.nextafter(array, to)


def _request(
    spec: SamplerSpec,
    seeds: Sequence[int] | None,
    batches: Sequence[int | None] | None,
    most: int,
    examples: Examples | None,
) -> tuple[list[int], Request]:
    if batches is None:
        batches = [size for size in SPLITS if size is None or size <= most]
    sizes = list(dict.fromkeys(most if size is None else size for size in batches))
    if not sizes or not all(1 <= size <= most for size in sizes):
        raise ConfigError(f"batches are {list(batches)}, expected sizes in 1..{most}, at least one.")
    chosen = list(range(max(NUM_SEEDS, *sizes, 1))) if seeds is None else list(seeds)
    if len(chosen) < max(sizes):
        raise ConfigError(f"seeds holds {len(chosen)}, expected at least {max(sizes)}, the largest batch.")
    return sizes, make_example(spec, chosen, examples=examples)
