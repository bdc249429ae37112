"""What candidates are compared with: a reference's images on given noise, and how far it is from itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dispatch import Backend
from ..errors import ConfigError
from ..examples import Examples
from ..generator import Generator
from ..request import Request, make_example
from ..spec import SamplerSpec

NUM_SEEDS = 32
NUM_FLOAT64 = 8
"""Samples that are made again in float64."""
LARGEST_IN_FLOAT64 = 300_000_000
"""Weights of the largest network for which that is done."""
SPLITS: tuple[int | None, ...] = (1, 3, None)
"""Batch splits that are compared where none are named; those larger than the largest batch fall away."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a generator's open backend, or a backend that was given as it is.

    The precision of the latter is not known: "".
    """

    backend: Backend
    spec: SamplerSpec
    name: str
    artifact: str
    device: str
    precision: str = ""

    @classmethod
    def of(cls, given: Generator | Backend, steps: int | None) -> Side:
        """Take a generator's backend for a number of steps, or a backend as it is."""
        if isinstance(given, Generator):
            opened = given.opened(steps)
            row = opened.row
            return cls(opened.backend, opened.spec, row.backend, row.artifact, opened.device, row.precision)
        kind = type(given).__name__
        if not isinstance(given, Backend):
            raise ConfigError(f"{kind} cannot be compared, expected a Generator or an object with spec and sample.")
        name, device = getattr(given, "name", kind), getattr(given, "device", "cpu")
        return cls(given, given.spec, str(name), kind, str(device))

    def run(self, request: Request, batch_size: int) -> NDArray[np.float32]:
        """Run a request in batches of one size and return its images, (N, *image_shape)."""
        starts = range(0, len(request), batch_size)
        parts = [self.backend.sample(*request.inputs(at, min(at + batch_size, len(request)))) for at in starts]
        return np.concatenate(parts)


@dataclass(frozen=True)
class ReferenceRun:
    """What a reference computes for a request, batch split by batch split, and how far it is from itself.

    Made once by ``run_reference`` for any number of candidates.
    """

    spec: SamplerSpec
    name: str
    artifact: str
    request: Request
    images: dict[int, NDArray[np.float32]]
    noise_floor: float


def run_reference(
    reference: Generator | Backend,
    *,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int | None] | None = None,
    num_inference_steps: int | None = None,
    most: int | None = None,
    examples: Examples | None = None,
) -> ReferenceRun:
    """Run a reference on what candidates will be compared on.

    Args:
        reference: What they should compute.
        seeds: The samples; None is 0..31, or as many as the largest batch. Labels are drawn from the seeds.
        batches: Batch splits to run, None among them is the largest; None is 1, 3 and the largest.
        num_inference_steps: Which sampler of a generator; None is its default.
        examples: What the model is told; None draws it.
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
    floor = _floor(images, side, reference, request)
    return ReferenceRun(side.spec, side.name, side.artifact, request, images, floor)


def noise_floor(
    reference: Generator | Backend,
    *,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int | None] | None = None,
    num_inference_steps: int | None = None,
) -> float:
    """Measure how far a reference is from itself, run another way.

    The other ways are the batch splits and, for one batch of a generator on a CPU, another number of
    threads and, for a few samples of PyTorch, float64.

    Returns:
        The largest absolute difference, units of sigma_data; 0 where it repeats itself bit for bit.

    Raises:
        ConfigError: If a batch is out of range.
        BackendError: If it cannot run.
    """
    run = run_reference(reference, seeds=seeds, batches=batches, num_inference_steps=num_inference_steps)
    return run.noise_floor


def _floor(runs: dict[int, NDArray[np.float32]], side: Side, reference: Generator | Backend, request: Request) -> float:
    first, *others = runs.values()
    worst = max((float(np.abs(first - other).max()) for other in others), default=0.0)
    if isinstance(reference, Generator) and side.device == "cpu":
        threads = 1 if reference.num_threads not in (None, 1) else 2
        with reference.reopen(num_threads=threads, verify="none") as again:
            # One batch only: on a busy machine a second thread can make torch a hundred times slower.
            size = min(len(request), side.spec.max_batch)
            noise, conditioning = request.inputs(0, size)
            images = again.opened(side.spec.num_inference_steps).backend.sample(noise, conditioning)
        worst = max(worst, float(np.abs(first[:size] - images).max()))
        worst = max(worst, _beside_float64(side, first, request))
    # A reference that gives NaN has no floor; compare() then fails on its finite check.
    return worst / side.spec.sigma_data if np.isfinite(worst) else 0.0


def _beside_float64(side: Side, images: NDArray[np.float32], request: Request) -> float:
    """How far PyTorch's float32 is from its own float64.

    0 where there is no such backend, the model is too large, or its network knows float32 alone.
    """
    model = getattr(side.backend, "model", None)
    if model is None or sum(p.numel() for p in model.parameters()) > LARGEST_IN_FLOAT64:
        return 0.0
    size = min(NUM_FLOAT64, len(request), side.spec.max_batch)
    try:
        exact = side.backend.sample_float64(*request.inputs(0, size))  # type: ignore[attr-defined]
    except RuntimeError:  # a network of one's own may write float32 where it could follow its input
        return 0.0
    return float(np.abs(exact - images[:size]).max())


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
