"""The parity gate of a bundle: every graph and engine against the checkpoint it was made from, on record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from ..bundle import Bundle
from ..dispatch import BACKENDS
from ..errors import BackendUnavailable, ConfigError, IncompatibleEngineError
from ..generator import Generator
from ..spec import Precision
from .parity import Parity, compare
from .reference import NUM_SEEDS, SPLITS, run_reference

MIN_PSNR_DB: Mapping[str, float] = {"fp16": 60.0, "bf16": 45.0, "int8": 40.0, "int8-cpu": 35.0, "fp8": 35.0}
"""Least PSNR of each lower precision, dB over the declared value range. 60 dB is a quarter of a level of
an 8-bit picture (root mean square), 40 dB two and a half levels. A network that magnifies rounding
loses more than a smooth one: half of FP16's loss can be the noise's own rounding."""


def validate_bundle(
    path: str | os.PathLike[str],
    *,
    backends: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    num_seeds: int = NUM_SEEDS,
    batches: Sequence[int | None] | None = None,
    threshold: float | None = None,
    min_psnr_db: float | None = None,
    reason: str = "",
    on_result: Callable[[Parity], object] = lambda _: None,
    on_skip: Callable[[str], object] = lambda _: None,
) -> list[Parity]:
    """Compare each backend's artifacts with the torch checkpoint and write the results into the manifest.

    A failure is recorded like a success, so that ``backend="auto"`` never takes what failed.

    Args:
        path: The bundle.
        backends: Candidates; () is every backend that can run here. One that is named must run.
        precisions: Only these; () is all.
        num_seeds: Samples for each batch split; more where the largest batch needs more.
        batches: Batch splits, None among them is the largest; None is 1, 3 and the largest.
        threshold: Largest difference of fp32 that passes, units of sigma_data; None derives it.
        min_psnr_db: Least PSNR of lower precisions, dB; None is ``MIN_PSNR_DB``.
        reason: Why ``threshold`` or ``min_psnr_db`` is looser than the gate's own.
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
    candidates = [a for a in candidates if not precisions or a.precision in precisions]
    if not candidates or not bundle.artifacts(format="safetensors"):
        missing = "checkpoint to compare with" if candidates else "graph to validate"
        raise ConfigError(f"{bundle.path} holds no {missing}. Make it from a checkpoint: scm-export onnx")
    results: list[Parity] = []
    skipped: list[str] = []
    for steps in sorted({artifact.num_inference_steps for artifact in candidates}):
        pairs = sorted(
            {
                (name, a.precision)
                for a in candidates
                for name, info in BACKENDS.items()
                if a.num_inference_steps == steps and a.format in info.opens and (not backends or name in backends)
            },
            key=_rung,
        )
        below: Parity | None = None
        with Generator.from_pretrained(path, backend="torch", num_inference_steps=steps, verify="none") as reference:
            most = reference.opened().spec.max_batch
            sizes = SPLITS if batches is None else batches
            seeds = range(max([num_seeds, *(most if size is None else size for size in sizes)]))
            run = run_reference(reference, seeds=seeds, batches=batches)
        for backend, precision in pairs:
            least = None if precision == "fp32" else _least_psnr(precision, min_psnr_db, reason)
            try:
                candidate = open_candidate(path, backend, precision, steps)
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
            results.append(below)
            on_result(below)
    if not results:
        raise BackendUnavailable(f"nothing of {bundle.path} can run here, expected one backend: {'; '.join(skipped)}")
    bundle.with_parity(*(parity.record() for parity in results))
    return results


def _rung(pair: tuple[str, Precision]) -> tuple[bool, int, str]:
    """Order the ladder: graphs before engines, each from the highest precision down."""
    backend, precision = pair
    return BACKENDS[backend].runs_engines, get_args(Precision).index(precision), backend


def _least_psnr(precision: str, asked: float | None, reason: str) -> float:
    default = MIN_PSNR_DB[precision]
    if asked is not None and asked < default and not reason:
        raise ConfigError(
            f"min_psnr_db is {asked:.1f}, looser than {default:.1f} dB for {precision}, expected a reason for that. "
            "Give one; every report prints it."
        )
    return default if asked is None else asked


def open_candidate(path: str | os.PathLike[str], backend: str, precision: Precision, steps: int) -> Generator:
    """Open a candidate without the warning that it failed last time: this is the next time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*recorded parity failed", category=RuntimeWarning)
        return Generator.from_pretrained(
            path, backend=backend, precision=precision, num_inference_steps=steps, verify="none"
        )
