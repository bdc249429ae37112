"""Parity: compare the images of a candidate with those of its reference on the same noise and labels.

Each batch split is compared. For fp32 the threshold is derived from the noise floor, the difference of the reference
from itself on the same samples (``reference``), which correct programs also show. A reduced precision computes
different values by design and must reach a minimum PSNR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..._util.arguments import checked_names
from ...bundle.manifest import PSNR_CAP, ParityRecord, describe_way
from ...errors import ConfigError, ParityError
from ...spec import Precision, SamplerSpec
from ..backends import Backend
from ..session import OpensBackends
from .difference import Difference, difference, find_blank
from .reference import ReferenceRun, Side, run_reference

ROUNDING_FLOOR = 1e-5
"""Minimum threshold, units of sigma_data. Correct fp32 programs sum in different orders; on the built-in U-Nets the
difference is 1e-6 to 3e-6, also if the reference is bitwise reproducible."""
FLOOR_FACTOR = 4.0
"""Factor on the noise floor: the kernels of a candidate may round more often, and the maximum of a few draws is below
the possible maximum."""

MIN_PSNR_DB: Mapping[str, float] = {
    "fp32-cpu": 100.0, "fp16": 55.0, "bf16": 40.0, "int8": 35.0, "int8-cpu": 30.0,
    "int8-weights": 40.0, "int4": 25.0,
}  # fmt: skip
"""PSNR that 95 % of the samples of each precision but fp32 must reach, dB over the declared value range.

A candidate passes unless its samples show that fewer do: it fails if the whole interval of ``psnr_p05_db`` is below. A
candidate of which 95 % or more do fails with a probability of at most 5 % for any number of samples; a worse one fails
more surely with more samples. Few samples prove little; the record holds their number. fp32-cpu computes float32 in
another order and has 123 dB or more. 55 dB is half a level of an 8-bit image (root mean square), 35 dB four and a half
levels. Networks that amplify rounding lose more: half of FP16's loss can come from rounding the noise. 25 dB is
14 levels: other details of the same picture; ``find_blank`` refuses a picture without any. Of 5,120 samples
of the shipped model, after 1 and 2 steps, 95 % reach 64.9 and 59.8 dB in FP16; ``benchmarks/fidelity/fresh_seeds.py``
evaluates ten blocks of fresh seeds."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Comparison of a candidate with its reference. True if the candidate passed.

    Attributes:
        candidate: Artifact path of the candidate, or its type if it has no path.
        candidate_backend: Backend of the candidate.
        reference: Artifact path of the reference, or its type.
        reference_backend: Backend of the reference.
        num_inference_steps: Network calls for each sample.
        seeds: Seeds of the compared samples, in each batch split.
        gate: The deciding statistic, ``max_abs`` or ``psnr_p05_db``.
        threshold: Largest ``overall.max_abs`` that passes, units of sigma_data; or the PSNR that 95 % of the samples
            must reach, dB.
        is_stricter: Whether the caller gave a threshold that is stricter than the default.
        noise_floor: Largest difference between the reference and itself, units of sigma_data.
        reason: Reason for a threshold that was set manually.
        overall: The difference over every batch split.
        by_batch: The difference for each batch size.
        baseline: Name of the candidate of the next higher precision, "" for the first.
        step: The difference from the baseline: what this precision alone costs.
        images: Images of the candidate by batch size.
        fault: Structural fault of the candidate, independent of the statistics; "" if none was found.
        psnr_by_step: PSNR of the estimate after each step, dB; () if not measured.
        precision: Precision that the backend computed in; "" for that of the candidate.
        cpu_class: Class of the CPU, if the numbers depend on it.
        any_steps: Whether the candidate runs any number of steps.
        required: Whether a failure counts. False for a lower precision that a backend also offers: a failure is
            recorded, and the precision is never chosen.
    """

    candidate: str
    candidate_backend: str
    reference: str
    reference_backend: str
    num_inference_steps: int
    seeds: tuple[int, ...]
    gate: Literal["max_abs", "psnr_p05_db"]
    threshold: float
    is_stricter: bool
    noise_floor: float
    reason: str
    overall: Difference
    by_batch: dict[int, Difference]
    baseline: str = ""
    step: Difference | None = None
    images: Mapping[int, NDArray[np.float32]] = field(default_factory=dict, repr=False, compare=False)
    fault: str = ""
    psnr_by_step: tuple[float, ...] = ()
    precision: Precision | Literal[""] = ""
    cpu_class: str = ""
    any_steps: bool = False
    required: bool = True

    def __bool__(self) -> bool:
        return not self.fault and self.numbers_pass

    def __str__(self) -> str:
        if self.gate == "psnr_p05_db":
            gate = f"{describe_percentile(self.overall, self.num_samples)}, at least {self.threshold:.0f} dB asked"
        else:
            gate = f"at most {self.threshold:.1e} allowed (noise floor {self.noise_floor:.1e})"
        parts = [
            f"{'pass' if self else 'FAIL' if self.required else 'not taken'}  {self.candidate} on {self.way}: "
            f"max {self.max_abs:.2e}, "
            f"mean {self.overall.mean_abs:.1e}, PSNR {self.overall.psnr_db:.1f} dB, {self.num_samples} seeds x batches "
            f"{', '.join(map(str, self.by_batch))}",
            gate,
        ]
        if self.step is not None:
            parts.append(f"{self.step.psnr_db:.1f} dB vs {self.baseline}")
        if self.psnr_by_step:
            parts.append(f"after each step {', '.join(f'{db:.1f}' for db in self.psnr_by_step)} dB")
        if self.reason:
            parts.append(f"reason: {self.reason}")
        if self.fault:
            parts.append(self.fault)
        return "; ".join(parts)

    @property
    def way(self) -> str:
        """The candidate's backend, with the precision that it computed in and the class of CPU where these matter."""
        return describe_way(self.candidate_backend, self.precision, self.cpu_class)

    @property
    def numbers_pass(self) -> bool:
        """Whether the statistics met the gate, regardless of the structure."""
        if not self.overall.finite:
            return False
        if self.gate == "psnr_p05_db":
            return self.overall.psnr_p05_interval_db[1] >= self.threshold
        return self.overall.max_abs <= self.threshold

    @property
    def num_samples(self) -> int:
        """Samples in each batch split."""
        return len(self.seeds)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference, units of sigma_data."""
        return self.overall.max_abs

    @property
    def worst_seed(self) -> int:
        """Seed of the sample with ``max_abs``."""
        return self.overall.worst_seed

    def raise_if_failed(self) -> None:
        """Raise ``ParityError`` with the statistics unless the gate was met or is not required."""
        if self or not self.required:
            return
        what = f"{self.candidate} on {self.way}, {self.num_inference_steps} steps,"
        if not self.overall.finite:
            found = f"{what} or its reference gives NaN or infinity (first at seed {self.worst_seed})"
        else:
            found = f"{what} differs from {self.reference} on {self.reference_backend}"
            found += f" by {self.max_abs:.1e} sigma_data (seed {self.worst_seed}, "
            found += f"mean {self.overall.mean_abs:.1e}, PSNR {self.overall.psnr_db:.1f} dB)"
        expected = f"at most {self.threshold:.1e} (noise floor {self.noise_floor:.1e})"
        remedy = "export again"
        if self.gate == "psnr_p05_db":
            if self.overall.finite:
                found += f"; {describe_percentile(self.overall, self.num_samples)}"
            expected = f"at least {self.threshold:.1f} dB"
            remedy = "keep more of it in a higher precision (--target-psnr)"
        if self.fault:
            found += f"; {self.fault}"
            expected += " and a graph that is its checkpoint's"
            remedy = "export again"
        raise ParityError(
            f"{found}; expected {expected}. Do not ship it: look at seed {self.worst_seed} on both, then {remedy}."
        )

    def record(self) -> ParityRecord:
        """Return the record for a manifest; NaN becomes the largest float."""
        low, high = self.overall.psnr_p05_interval_db
        return ParityRecord(
            artifact=self.candidate,
            reference=self.reference,
            backend=self.candidate_backend,
            gate=self.gate,
            threshold=self.threshold,
            noise_floor=self.noise_floor,
            # JSON has no NaN: the largest float stands for non-finite results and fails every gate.
            max_abs=self.max_abs if self.overall.finite else float(np.finfo(np.float64).max),
            psnr_db=min(self.overall.psnr_db, PSNR_CAP) if self.overall.finite else 0.0,
            worst_psnr_db=min(self.overall.worst_psnr_db, PSNR_CAP) if self.overall.finite else 0.0,
            psnr_p05_db=min(self.overall.psnr_p05_db, PSNR_CAP) if self.overall.finite else 0.0,
            psnr_p05_interval_db=(_bounded(low), _bounded(high)),
            psnr_by_step=tuple(min(db, PSNR_CAP) for db in self.psnr_by_step),
            fault=self.fault,
            num_samples=self.num_samples,
            first_seed=self.seeds[0],
            batches=tuple(self.by_batch),
            passed=bool(self),
            reason=self.reason,
            precision=self.precision,
            cpu_class=self.cpu_class,
            num_inference_steps=self.num_inference_steps if self.any_steps else 0,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        apart = ("overall", "by_batch", "step", "images", "seeds")
        plain = {name: value for name, value in vars(self).items() if name not in apart}
        return {
            **plain,
            "num_samples": self.num_samples,
            "step": self.step.to_dict() if self.step else None,
            "first_seed": self.seeds[0],
            "passed": bool(self),
            "numbers_pass": self.numbers_pass,
            "psnr_by_step": [min(db, PSNR_CAP) for db in self.psnr_by_step],
            "overall": self.overall.to_dict(),
            "by_batch": {str(batch): each.to_dict() for batch, each in self.by_batch.items()},
        }


@checked_names("compare")
def compare(
    candidate: OpensBackends | Backend,
    reference: OpensBackends | Backend | ReferenceRun,
    *,
    seeds: Sequence[int] | None = None,
    batches: Sequence[int | None] | None = None,
    num_inference_steps: int | None = None,
    threshold: float | None = None,
    min_psnr_db: float | None = None,
    reason: str = "",
    baseline: Parity | None = None,
) -> Parity:
    """Run both on the same noise and measure the difference.

    Args:
        candidate: What is in question: a generator or an open backend.
        reference: What it should compute; what ``run_reference`` returned brings its own seeds and batches.
        seeds: See ``run_reference``.
        batches: Batch splits to run, None among them is the largest; None is 1, 3 and the largest.
        num_inference_steps: Which sampler of a generator; None is its default.
        threshold: Largest difference that passes, units of sigma_data.
        min_psnr_db: PSNR that 95 % of the samples must reach, dB. Where neither is given, the lower of the two
            precisions has its own gate: ``MIN_PSNR_DB``, or for fp32, and for backends that do not say their
            precision, the threshold ``max(ROUNDING_FLOOR, FLOOR_FACTOR * noise_floor)``.
        reason: Why ``threshold`` is looser than the derived one, or ``min_psnr_db`` than the precision's own (than the
            lowest of all where a backend does not say its precision); every report prints it.
        baseline: The candidate of the next higher precision, compared with the same reference run; its difference from
            this one is reported.

    Returns:
        The comparison; call ``raise_if_failed`` to make it a gate.

    Raises:
        ConfigError: If the two are different samplers, a batch is out of range, or a looser gate comes
            without a reason.
        BackendError: If one of them cannot run.
    """
    one = Side.of(candidate, num_inference_steps)
    if not isinstance(reference, ReferenceRun):
        _check_same(one.spec, Side.of(reference, num_inference_steps).spec)
        reference = run_reference(
            reference, seeds=seeds, batches=batches, num_inference_steps=num_inference_steps, most=one.spec.max_batch
        )
    _check_same(one.spec, reference.spec)
    sizes, request, wanted, floor = (
        list(reference.images), reference.request, reference.images, reference.noise_floor,
    )  # fmt: skip
    if max(sizes) > one.spec.max_batch:
        raise ConfigError(f"batches are {sizes}, expected at most {one.spec.max_batch}, the candidate's largest.")
    if threshold is not None and min_psnr_db is not None:
        raise ConfigError("threshold and min_psnr_db were both given, expected one of them: one gate decides.")
    derived = max(ROUNDING_FLOOR, FLOOR_FACTOR * floor)
    if threshold is not None and not threshold <= derived and not reason:
        raise ConfigError(
            f"threshold is {threshold:.1e}, looser than the derived {derived:.1e} (noise floor {floor:.1e}), "
            "expected a reason for that. Give one; every report prints it."
        )
    precision = min(one.precision, reference.precision, key=lambda name: MIN_PSNR_DB.get(name, math.inf))
    if min_psnr_db is not None and not reason:
        _check_least_psnr(min_psnr_db, precision)
    own = MIN_PSNR_DB.get(precision)
    least = own if threshold is None and min_psnr_db is None else min_psnr_db
    stricter = (threshold is not None and threshold < derived) or (min_psnr_db or 0.0) > (own or math.inf)
    found = {size: one.run(request, size) for size in sizes}
    seeds_of_all = request.seeds * len(sizes)

    def joined(images: Mapping[int, NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate([images[size] for size in sizes])

    def apart(others: Mapping[int, NDArray[np.float32]]) -> Difference:
        return difference(joined(found), joined(others), seeds_of_all, reference.spec)

    return Parity(
        candidate=one.artifact,
        candidate_backend=one.name,
        reference=reference.artifact,
        reference_backend=reference.name,
        num_inference_steps=reference.spec.num_inference_steps,
        seeds=request.seeds,
        gate="max_abs" if least is None else "psnr_p05_db",
        threshold=least if least is not None else derived if threshold is None else threshold,
        is_stricter=stricter,
        noise_floor=floor,
        reason=reason,
        overall=apart(wanted),
        by_batch={size: difference(found[size], wanted[size], request.seeds, reference.spec) for size in sizes},
        baseline="" if baseline is None else f"{baseline.candidate} on {baseline.way}",
        step=None if baseline is None or not set(sizes) <= set(baseline.images) else apart(baseline.images),
        images=found,
        precision=one.lowered,
        cpu_class=one.cpu_class,
        any_steps=one.any_steps,
        fault="" if least is None else find_blank(joined(found), joined(wanted)),
    )


def describe_percentile(found: Difference, num_samples: int) -> str:
    """Describe the result for a reduced precision."""
    low, high = found.psnr_p05_interval_db
    interval = f"{low:.1f} to {high:.1f}" if math.isfinite(low) else f"at most {high:.1f}"
    return f"95 % of {num_samples} samples reach {found.psnr_p05_db:.1f} dB (of all: {interval} dB, 95 % confidence)"


def _bounded(db: float) -> float:
    """Return decibels for JSON; NaN becomes 0."""
    return min(max(db, 0.0), PSNR_CAP) if not math.isnan(db) else 0.0


def _check_least_psnr(asked: float, precision: str) -> None:
    if precision == "fp32":
        raise ConfigError(
            f"min_psnr_db is {asked:.1f} for fp32, whose gate is a threshold of the largest difference, expected a "
            "reason for that. Give one; every report prints it."
        )
    own = MIN_PSNR_DB.get(precision, min(MIN_PSNR_DB.values()))
    if not asked >= own:
        raise ConfigError(
            f"min_psnr_db is {asked:.1f}, looser than {own:.1f} dB for {precision or 'any precision'}, expected a "
            "reason for that. Give one; every report prints it."
        )


def _check_same(one: SamplerSpec, other: SamplerSpec) -> None:
    a, b = (msgspec.structs.replace(spec, max_batch=1) for spec in (one, other))
    if a != b:
        names = [name for name in a.__struct_fields__ if getattr(a, name) != getattr(b, name)]
        values = "; ".join(f"{name}: {getattr(a, name)} and {getattr(b, name)}" for name in names)
        raise ConfigError(f"candidate and reference are different samplers ({values}), expected the same one.")
