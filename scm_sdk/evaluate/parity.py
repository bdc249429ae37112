"""Does a candidate compute what its reference computes? A gate, not a picture show.

Both run on the same noise and labels, batch split by batch split. The threshold is not chosen but
derived from the noise floor: how far the reference is from *itself* when it runs with another batch
split or another number of threads. Two right programs cannot be told apart below that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..dispatch import Backend
from ..errors import ConfigError, ParityError
from ..generator import Generator
from ..manifest import ParityRecord
from ..request import Request, make_request
from ..spec import SamplerSpec
from .difference import Difference, difference

NUM_SEEDS = 32
ROUNDING_FLOOR = 1e-5
"""Least threshold, units of sigma_data. Two right fp32 programs order a network's sums differently;
on the U-Nets of this package that gave 1e-6 to 3e-6, also where the reference repeats itself bit for bit."""
FLOOR_FACTOR = 4.0
"""A candidate may differ this many times as much as the reference does from itself: another program
reorders every sum, another batch split only some."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Whether a candidate computes what its reference computes. True if it does.

    Attributes:
        candidate: Artifact path of the candidate, or its type where it has none.
        candidate_backend: What ran it.
        reference: The same of the reference.
        reference_backend: What ran that.
        num_inference_steps: Network calls for each sample.
        num_samples: Samples in each batch split.
        threshold: Largest ``overall.max_abs`` that passes, units of sigma_data.
        noise_floor: Largest difference between the reference and itself, units of sigma_data.
        reason: Why the threshold is not the derived one, if it was set by hand.
        overall: The difference over every batch split.
        by_batch: The difference for each batch size.
    """

    candidate: str
    candidate_backend: str
    reference: str
    reference_backend: str
    num_inference_steps: int
    num_samples: int
    threshold: float
    noise_floor: float
    reason: str
    overall: Difference
    by_batch: dict[int, Difference]

    def __bool__(self) -> bool:
        return self.overall.finite and self.overall.max_abs <= self.threshold

    @property
    def max_abs(self) -> float:
        """Largest absolute difference, units of sigma_data."""
        return self.overall.max_abs

    @property
    def worst_seed(self) -> int:
        """Seed of the sample that holds ``max_abs``."""
        return self.overall.worst_seed

    def raise_if_failed(self) -> None:
        """Raise ``ParityError``, with the numbers, unless the gate was met."""
        if self:
            return
        what = f"{self.candidate} on {self.candidate_backend}, {self.num_inference_steps} steps,"
        if not self.overall.finite:
            found = f"{what} or its reference gives NaN or infinity (first at seed {self.worst_seed})"
        else:
            found = f"{what} differs from {self.reference} on {self.reference_backend}"
            found += f" by {self.max_abs:.1e} sigma_data (seed {self.worst_seed}, "
            found += f"mean {self.overall.mean_abs:.1e})"
        raise ParityError(
            f"{found}; expected at most {self.threshold:.1e} (noise floor {self.noise_floor:.1e}). "
            f"Do not ship it: look at seed {self.worst_seed} on both, then export again."
        )

    def record(self) -> ParityRecord:
        """Return what a manifest keeps of it; NaN becomes the largest float."""
        return ParityRecord(
            artifact=self.candidate,
            reference=self.reference,
            backend=self.candidate_backend,
            threshold=self.threshold,
            noise_floor=self.noise_floor,
            # JSON has no NaN: the largest float says "did not even give numbers" and fails every gate.
            max_abs=self.max_abs if self.overall.finite else float(np.finfo(np.float64).max),
            num_samples=self.num_samples,
            passed=bool(self),
            reason=self.reason,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("overall", "by_batch")}
        return {
            **plain,
            "passed": bool(self),
            "overall": self.overall.to_dict(),
            "by_batch": {str(batch): each.to_dict() for batch, each in self.by_batch.items()},
        }


def compare(
    candidate: Generator | Backend,
    reference: Generator | Backend,
    *,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int | None] = (1, 3, None),
    num_inference_steps: int | None = None,
    threshold: float | None = None,
    reason: str = "",
) -> Parity:
    """Run both on the same noise and measure the difference.

    Args:
        candidate: What is in question: a generator or an open backend.
        reference: What it should compute.
        seeds: The samples; None is 0..31, or as many as the largest batch. Labels are drawn from the seeds.
        batches: Batch splits to run; None is the largest the two allow.
        num_inference_steps: Which sampler of a generator; None is its default.
        threshold: Largest difference that passes, units of sigma_data; None derives it:
            ``max(ROUNDING_FLOOR, FLOOR_FACTOR * noise_floor)``.
        reason: Why ``threshold`` is looser than the derived one; every report prints it.

    Returns:
        The comparison; call ``raise_if_failed`` to make it a gate.

    Raises:
        ConfigError: If the two are different samplers, a batch is out of range, or a looser threshold
            comes without a reason.
        BackendError: If one of them cannot run.
    """
    one, other = _Side.of(candidate, num_inference_steps), _Side.of(reference, num_inference_steps)
    _check_same(one.spec, other.spec)
    most = min(one.spec.max_batch, other.spec.max_batch)
    sizes, request = _request(other.spec, seeds, batches, most)
    wanted = {size: other.run(request, size) for size in sizes}
    floor = _floor(wanted, other, reference, request)
    derived = max(ROUNDING_FLOOR, FLOOR_FACTOR * floor)
    if threshold is not None and not threshold <= derived and not reason:
        raise ConfigError(
            f"threshold is {threshold:.1e}, looser than the derived {derived:.1e} (noise floor {floor:.1e}), "
            "expected a reason for that. Give one; every report prints it."
        )
    found = {size: one.run(request, size) for size in sizes}
    return Parity(
        candidate=one.artifact,
        candidate_backend=one.name,
        reference=other.artifact,
        reference_backend=other.name,
        num_inference_steps=other.spec.num_inference_steps,
        num_samples=len(request),
        threshold=derived if threshold is None else threshold,
        noise_floor=floor,
        reason=reason,
        overall=difference(
            np.concatenate([found[size] for size in sizes]),
            np.concatenate([wanted[size] for size in sizes]),
            request.seeds * len(sizes),
            other.spec,
        ),
        by_batch={size: difference(found[size], wanted[size], request.seeds, other.spec) for size in sizes},
    )


def noise_floor(
    reference: Generator | Backend,
    *,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int | None] = (1, 3, None),
    num_inference_steps: int | None = None,
) -> float:
    """Measure how far a reference is from itself, run another way.

    The other ways are the batch splits and, for one batch of a generator on a CPU, another number of
    threads.

    Returns:
        The largest absolute difference, units of sigma_data; 0 where it repeats itself bit for bit.

    Raises:
        ConfigError: If a batch is out of range.
        BackendError: If it cannot run.
    """
    side = _Side.of(reference, num_inference_steps)
    sizes, request = _request(side.spec, seeds, batches, side.spec.max_batch)
    return _floor({size: side.run(request, size) for size in sizes}, side, reference, request)


@dataclass(frozen=True)
class _Side:
    """A generator's open backend, or a backend that was given as it is."""

    backend: Backend
    spec: SamplerSpec
    name: str
    artifact: str
    device: str

    @classmethod
    def of(cls, given: Generator | Backend, steps: int | None) -> _Side:
        if isinstance(given, Generator):
            opened = given.opened(steps)
            return cls(opened.backend, opened.spec, opened.row.backend, opened.row.artifact, opened.device)
        kind = type(given).__name__
        if not isinstance(given, Backend):
            raise ConfigError(f"{kind} cannot be compared, expected a Generator or an object with spec and sample.")
        name, device = getattr(given, "name", kind), getattr(given, "device", "cpu")
        return cls(given, given.spec, str(name), kind, str(device))

    def run(self, request: Request, batch_size: int) -> NDArray[np.float32]:
        starts = range(0, len(request), batch_size)
        parts = [self.backend.sample(*request.inputs(at, min(at + batch_size, len(request)))) for at in starts]
        return np.concatenate(parts)


def _floor(
    runs: dict[int, NDArray[np.float32]], side: _Side, reference: Generator | Backend, request: Request
) -> float:
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
    # A reference that gives NaN has no floor; compare() then fails on its finite check.
    return worst / side.spec.sigma_data if np.isfinite(worst) else 0.0


def _request(
    spec: SamplerSpec, seeds: Sequence[int] | None, batches: Sequence[int | None], most: int
) -> tuple[list[int], Request]:
    sizes = list(dict.fromkeys(most if size is None else size for size in batches))
    if not sizes or not all(1 <= size <= most for size in sizes):
        raise ConfigError(f"batches are {list(batches)}, expected sizes in 1..{most}, at least one.")
    chosen = list(range(max(NUM_SEEDS, *sizes, 1))) if seeds is None else list(seeds)
    if len(chosen) < max(sizes):
        raise ConfigError(f"seeds holds {len(chosen)}, expected at least {max(sizes)}, the largest batch.")
    return sizes, make_request(spec, num_images=len(chosen), seed=chosen)


def _check_same(one: SamplerSpec, other: SamplerSpec) -> None:
    a, b = (msgspec.structs.replace(spec, max_batch=1) for spec in (one, other))
    if a != b:
        names = [name for name in a.__struct_fields__ if getattr(a, name) != getattr(b, name)]
        values = "; ".join(f"{name}: {getattr(a, name)} and {getattr(b, name)}" for name in names)
        raise ConfigError(f"candidate and reference are different samplers ({values}), expected the same one.")
