"""The parity gate of a bundle: every graph and engine against the checkpoint it was made from, on record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

from .._bundle_checks import is_borrowed
from ..bundle import Bundle
from ..dispatch import BACKENDS
from ..errors import BackendUnavailable, ConfigError, IncompatibleEngineError
from ..examples import Examples
from ..generator import Generator
from ..manifest import Artifact
from ..spec import Precision
from .parity import MIN_PSNR_DB as MIN_PSNR_DB
from .parity import Parity, compare
from .reference import NUM_SEEDS, SPLITS, run_reference

Examine = Callable[[Artifact], tuple[str, tuple[float, ...]]]
"""What looks into an artifact: its structural fault, "" if none, and the PSNR after each step, () if unknown."""


def validate_bundle(
    path: str | os.PathLike[str],
    *,
    backends: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    steps: Sequence[int] = (),
    num_seeds: int = NUM_SEEDS,
    batches: Sequence[int | None] | None = None,
    threshold: float | None = None,
    min_psnr_db: float | None = None,
    reason: str = "",
    examples: Examples | None = None,
    examine: Examine = lambda _: ("", ()),
    on_result: Callable[[Parity], object] = lambda _: None,
    on_skip: Callable[[str], object] = lambda _: None,
) -> list[Parity]:
    """Compare each backend's artifacts with the torch checkpoint and write the results into the manifest.

    A failure is recorded like a success, so that ``backend="auto"`` never takes what failed. Nothing is recorded in a
    bundle that lies in a cache, the hub's or that of ``.scmz`` files.

    Args:
        path: The bundle.
        backends: Candidates; () is every backend that can run here. One that is named must run.
        precisions: Only these; () is all.
        steps: Only graphs and engines with these numbers of steps; () is all.
        num_seeds: Samples for each batch split; more where the largest batch needs more.
        batches: Batch splits, None among them is the largest; None is 1, 3 and the largest.
        threshold: Largest difference of fp32 that passes, units of sigma_data; None derives it.
        min_psnr_db: Least PSNR of lower precisions, dB; None is ``MIN_PSNR_DB``.
        reason: Why ``threshold`` or ``min_psnr_db`` is looser than the gate's own.
        examples: What the model is told, for example prompts; None draws it.
        examine: Looks into each artifact that ran; a fault that it finds fails the comparison, whatever its numbers.
        on_result: Called with each comparison.
        on_skip: Called with a line for each artifact that cannot run here.

    Returns:
        One comparison for each number of steps, backend and precision.

    Raises:
        ConfigError: If the bundle has nothing to compare, or a looser gate comes without a reason.
        BackendError: If a backend that was named cannot run here, or nothing can.
    """
    bundle = Bundle.open(path)
    candidates = [a for a in bundle.manifest.artifacts if a.format != "safetensors"]
    candidates = [
        a
        for a in candidates
        if (not precisions or a.precision in precisions) and (not steps or a.num_inference_steps in steps)
    ]
    if not candidates or not bundle.artifacts(format="safetensors"):
        missing = "checkpoint to compare with" if candidates else "graph to validate"
        raise ConfigError(f"{bundle.path} holds no {missing}. Make it from a checkpoint: scm-export onnx")
    results: list[Parity] = []
    skipped: list[str] = []
    by_path = {artifact.path: artifact for artifact in candidates}
    for count in sorted({artifact.num_inference_steps for artifact in candidates}):
        pairs = sorted(
            {
                (name, a.precision)
                for a in candidates
                for name, info in BACKENDS.items()
                if a.num_inference_steps == count
                if (name in backends and a.format in info.opens if backends else info.takes(a))
            },
            key=_rung,
        )
        below: Parity | None = None
        with Generator.from_pretrained(path, backend="torch", num_inference_steps=count, verify="none") as reference:
            most = reference.opened().spec.max_batch
            sizes = SPLITS if batches is None else batches
            seeds = range(max([num_seeds, *(most if size is None else size for size in sizes)]))
            run = run_reference(reference, seeds=seeds, batches=batches, examples=examples)
        for backend, precision in pairs:
            least = None if precision == "fp32" else MIN_PSNR_DB[precision] if min_psnr_db is None else min_psnr_db
            try:
                candidate = open_candidate(path, backend, precision, count)
            except (BackendUnavailable, IncompatibleEngineError) as exc:
                if backends:
                    raise
                skipped.append(str(exc))
                on_skip(skipped[-1])
                continue
            with candidate:
                below = compare(
                    candidate, run, threshold=threshold if least is None else None, min_psnr_db=least, reason=reason,
                    below=below,
                )  # fmt: skip
            fault, by_step = examine(by_path[below.candidate])
            below = replace(below, fault=fault, psnr_by_step=by_step)
            results.append(below)
            on_result(below)
    if not results:
        raise BackendUnavailable(f"nothing of {bundle.path} can run here, expected one backend: {'; '.join(skipped)}")
    if not is_borrowed(bundle.path):
        bundle.with_parity(*(parity.record() for parity in results))
    return results


def _rung(pair: tuple[str, Precision]) -> tuple[bool, int, str]:
    """Order the ladder: graphs before engines, each from the highest precision down."""
    backend, precision = pair
    return BACKENDS[backend].runs_engines, get_args(Precision).index(precision), backend


def open_candidate(path: str | os.PathLike[str], backend: str, precision: Precision, steps: int) -> Generator:
    """Open a candidate without the warning that it failed last time: this is the next time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*recorded parity failed", category=RuntimeWarning)
        return Generator.from_pretrained(
            path, backend=backend, precision=precision, num_inference_steps=steps, verify="none"
        )
