"""The parity gate of a bundle: compares every graph and engine with its checkpoint and records the results."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypedDict, get_args

from .._util.arguments import checked_names
from .._util.events import SILENT, Events
from ..bundle.bundle import Bundle
from ..bundle.manifest import Artifact, ParityRecord
from ..bundle.verify import in_cache
from ..errors import BackendUnavailable, BundleError, ConfigError, IncompatibleEngineError
from ..inference.backends import BACKENDS
from ..inference.conditioning import Examples
from ..inference.generator import Generator
from ..inference.parity.compare import Parity, compare
from ..inference.parity.reference import JUDGMENT, NUM_SEEDS, SPLITS, run_reference
from ..inference.selection import describe_precisions, precisions_of
from ..spec import Precision

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
Examine = Callable[[Artifact, Generator], tuple[str, tuple[float, ...]]]
"""Diagnoses an artifact, given the open reference: returns its structural fault or "", and the PSNR after each step, ()
if unknown."""


class ValidateOptions(TypedDict, total=False):
    """Keywords that ``validate_bundle`` and ``scm_sdk.validate`` share; the former says what each means."""

    backends: Sequence[str]
    precisions: Sequence[Precision]
    steps: Sequence[int]
    num_seeds: int
    first_seed: int
    batches: Sequence[int | None] | None
    threshold: float | None
    min_psnr_db: float | None
    reason: str
    record: bool


@checked_names("validate_bundle")
def validate_bundle(
    path: str | os.PathLike[str] | Bundle,
    *,
    backends: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    steps: Sequence[int] = (),
    num_seeds: int = NUM_SEEDS,
    first_seed: int = JUDGMENT.start,
    batches: Sequence[int | None] | None = None,
    threshold: float | None = None,
    min_psnr_db: float | None = None,
    reason: str = "",
    examples: Examples | None = None,
    examine: Examine = lambda _artifact, _reference: ("", ()),
    events: Events = SILENT,
    record: bool = True,
) -> list[Parity]:
    """Compare the artifacts of each backend with the torch checkpoint and write the results into the manifest.

    Failures are recorded too, so that ``backend="auto"`` never takes a failed artifact. A comparison on fewer seeds or
    batch splits than the recorded one, or by a stricter gate than the default, does not replace it, unless the
    structure of the graph has a fault. Nothing is recorded in a cached or read-only bundle.

    A graph or checkpoint is compared in its own precision and, where a backend also computes it in a lower one on this
    CPU, in that: a failure of that one is recorded, and is none of the bundle's unless ``precisions`` names it.

    Args:
        path: The bundle; one that is open is read again only where it changed.
        backends: Candidates; () is every backend that can run here. A named backend must run.
        precisions: Only these precisions; () is all.
        steps: Only graphs and engines with these numbers of steps; () is all.
        num_seeds: Samples for each batch split; at least the largest batch.
        first_seed: Seed of the first sample; the others follow. All are in ``seeds.JUDGMENT``.
        batches: Batch splits, None among them is the largest; None is 1, 3 and the largest.
        threshold: Largest difference of fp32 that passes, units of sigma_data; None derives it.
        min_psnr_db: PSNR that 95 % of the samples of lower precisions must reach, dB; None is ``MIN_PSNR_DB``.
        reason: Reason for a ``threshold`` or ``min_psnr_db`` that is looser than the default.
        examples: Conditioning inputs, for example prompts; None draws them.
        examine: Diagnoses each artifact that ran; a fault fails the comparison regardless of the statistics.
        events: Receives each comparison, which artifacts are skipped since they cannot run here, and a note for each
            result that was not recorded, with the reason.
        record: Whether to write the results into the manifest.

    Returns:
        One comparison for each image size, number of steps, backend and precision.

    Raises:
        ConfigError: If the bundle has nothing to compare, a seed is out of range, or a looser gate comes without a
            reason.
        BackendError: If a named backend cannot run here, or no backend can.
    """
    bundle = path.refreshed() if isinstance(path, Bundle) else Bundle.open(path)
    by_size = [
        (
            sized,
            [
                way
                for way in _ways(sized.manifest.artifacts)
                if (not precisions or way.precision in precisions) and (not steps or way.num_inference_steps in steps)
                if sized is bundle or way.artifact.format != "safetensors"  # whose record is of the first size
            ],
        )
        for sized in (bundle.at_size(*size) for size in bundle.manifest.image_sizes)
    ]
    ways = [way for _, some in by_size for way in some]
    if not ways and (precisions or steps):
        there = [a for a in bundle.manifest.artifacts if a.format != "safetensors"]
        asked = [*precisions, *(f"{count} steps" for count in steps)]
        raise ConfigError(
            f"{bundle.path} has no graph or engine of {', '.join(asked)}, expected some of "
            f"{describe_precisions(there) or 'none: it has only a checkpoint'}. Choose one of them, or add it: "
            "scm-export precision, or scm-export quantize for int8"
        )
    if not ways or not bundle.artifacts(format="safetensors"):
        missing = "checkpoint to compare with" if ways else "graph to validate"
        note = bundle.manifest.cut_note or " Make it from a checkpoint: scm-export onnx"
        raise ConfigError(f"{bundle.path} holds no {missing}.{note}")
    by_path = {artifact.path: artifact for artifact in bundle.manifest.all_artifacts}
    results: list[Parity] = []
    skipped: list[str] = []

    def judge(sized: Bundle, some: Sequence[_Way], reference: Generator, count: int) -> None:
        chosen = sorted(
            (
                way
                for way in some
                if way.num_inference_steps == count
                if (way.backend in backends if backends else BACKENDS[way.backend].takes(way.artifact))
            ),
            key=_precision_order,
        )
        baseline: Parity | None = None
        most = reference.opened(count).spec.max_batch
        sizes = SPLITS if batches is None else batches
        seeds = _seeds(first_seed, max([num_seeds, *(most if size is None else size for size in sizes)]))
        run = run_reference(reference, seeds=seeds, batches=batches, num_inference_steps=count, examples=examples)
        for way in chosen:
            try:
                candidate = open_candidate(sized, way.backend, way.precision, count)
            except (BackendUnavailable, IncompatibleEngineError) as exc:
                if way.lowered and not precisions:
                    continue  # not stored and not requested
                if backends:
                    raise
                skipped.append(str(exc))
                events.skip(skipped[-1])
                continue
            with candidate:
                exact = way.precision == "fp32"
                baseline = compare(
                    candidate,
                    run,
                    threshold=threshold if exact else None,
                    min_psnr_db=None if exact else min_psnr_db,
                    reason=reason,
                    baseline=baseline,
                )
            # In a lower precision it is the same graph, which is diagnosed in its own.
            fault, by_step = ("", ()) if way.lowered else examine(by_path[baseline.candidate], reference)
            baseline = replace(
                baseline,
                fault=fault or baseline.fault,
                psnr_by_step=by_step,
                required=bool(precisions) or not way.lowered,
            )
            results.append(baseline)
            events.result(baseline)

    for sized, some in by_size:
        counts = sorted({way.num_inference_steps for way in some})
        if counts:
            with Generator.from_pretrained(
                sized, backend="torch", num_inference_steps=counts[0], verify="none"
            ) as reference:
                for count in counts:
                    judge(sized, some, reference, count)
    if not results:
        raise BackendUnavailable(f"nothing of {bundle.path} can run here, expected one backend: {'; '.join(skipped)}")
    if record:
        _record(bundle, results, events)
    return results


def _seeds(first: int, count: int) -> range:
    if first not in JUDGMENT or first + count > JUDGMENT.stop:
        raise ConfigError(
            f"seeds are {first} to {first + count - 1}, expected seeds below {JUDGMENT.stop}: those from there on are "
            "the ones that reduced precisions are calibrated and chosen on. Take a smaller first seed."
        )
    return range(first, first + count)


def _record(bundle: Bundle, results: Sequence[Parity], events: Events) -> None:
    if in_cache(bundle.path):
        events.note(f"nothing was recorded: {bundle.path} is in a cache")
        return
    before = {r.key: r for r in bundle.manifest.parity}
    records = []
    for parity in results:
        new = parity.record()
        old = before.get(new.key)
        lesser = _lesser(parity, new, old) if old is not None else ""
        if lesser:
            events.note(f"{new.artifact} on {new.way}: not recorded, {lesser}")
        else:
            records.append(new)
    try:
        if records:
            bundle.with_parity(*records)
    except BundleError as exc:
        if not isinstance(exc.__cause__, OSError) or exc.__cause__.errno not in _READ_ONLY:
            raise
        events.note(f"nothing was recorded: {bundle.path} cannot be written ({exc.__cause__.strerror})")


def _lesser(parity: Parity, new: ParityRecord, old: ParityRecord) -> str:
    """Return why a result does not replace the recorded one; "" if it does."""
    if parity.fault:
        return ""
    if new.num_samples < old.num_samples or not set(old.batches) <= set(new.batches):
        batches = f" and batches {', '.join(map(str, old.batches))}" if old.batches else ""
        return f"the record of {old.num_samples} seeds{batches} is kept"
    if parity.is_stricter and new.threshold != old.threshold:
        return "the record of the precision's own gate is kept"
    return ""


class _Way(NamedTuple):
    """A candidate: one artifact, one backend, one precision, one number of steps."""

    backend: str
    artifact: Artifact
    precision: Precision
    num_inference_steps: int

    @property
    def lowered(self) -> bool:
        return self.precision != self.artifact.precision


def _ways(artifacts: Sequence[Artifact]) -> list[_Way]:
    """Return every graph and engine in its own precision, and the lower precisions that backends also compute.

    Artifacts with equal precision and number of steps, such as engines for several GPUs, have one entry: the one that
    the plan selects is compared.
    """
    counts = sorted({a.num_inference_steps for a in artifacts} - {0})
    found = {
        (name, precision, count): _Way(name, artifact, precision, count)
        for count in counts
        for name, info in BACKENDS.items()
        for artifact in artifacts
        if artifact.num_inference_steps in (0, count)
        for precision in precisions_of(info, artifact, artifacts)
        if artifact.format != "safetensors" or precision != artifact.precision
    }
    return list(found.values())


def _precision_order(way: _Way) -> tuple[bool, int, str]:
    """Sort key: graphs before engines, each from the highest precision to the lowest."""
    return BACKENDS[way.backend].runs_engines, get_args(Precision).index(way.precision), way.backend


def open_candidate(path: str | os.PathLike[str] | Bundle, backend: str, precision: Precision, steps: int) -> Generator:
    """Open a candidate without the warning about its recorded failure, because it is compared again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*recorded parity failed", category=RuntimeWarning)
        return Generator.from_pretrained(
            path, backend=backend, precision=precision, num_inference_steps=steps, verify="none"
        )
