"""The parity gate of a bundle: every graph against the checkpoint it was made from, on record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

from ..bundle import Bundle
from ..errors import ConfigError
from ..generator import Generator
from .parity import NUM_SEEDS, Parity, compare

SPLITS: tuple[int | None, ...] = (1, 3, None)
"""Batch splits that are compared; None is the largest."""


def validate_bundle(
    path: str | os.PathLike[str],
    *,
    backends: Sequence[str] = ("onnxruntime",),
    num_seeds: int = NUM_SEEDS,
    batches: Sequence[int | None] = SPLITS,
    threshold: float | None = None,
    reason: str = "",
    on_result: Callable[[Parity], object] = lambda _: None,
) -> list[Parity]:
    """Compare each backend's graphs with the torch checkpoint and write the results into the manifest.

    A failure is recorded like a success, so that ``backend="auto"`` never takes what failed.

    Args:
        path: The bundle.
        backends: Candidates.
        num_seeds: Samples for each batch split, at least the largest batch.
        batches: Batch splits; None is the largest.
        threshold: Largest difference that passes, units of sigma_data; None derives it.
        reason: Why ``threshold`` is looser than the derived one.
        on_result: Called with each comparison.

    Returns:
        One comparison for each backend and number of steps.

    Raises:
        ConfigError: If the bundle has no graph or no checkpoint.
        BackendError: If one cannot run here.
    """
    bundle = Bundle.open(path)
    graphs = bundle.artifacts(format="onnx")
    if not graphs or not bundle.artifacts(format="safetensors"):
        missing = "checkpoint to compare with" if graphs else "graph to validate"
        raise ConfigError(f"{bundle.path} holds no {missing}. Make it from a checkpoint: scm-export onnx")
    results: list[Parity] = []
    for steps in sorted({graph.num_inference_steps for graph in graphs}):
        with Generator.from_pretrained(path, backend="torch", num_inference_steps=steps, verify="none") as reference:
            most = reference.opened().spec.max_batch
            seeds = range(max(num_seeds, *(most if size is None else size for size in batches), 1))
            for backend in backends:
                with _open_candidate(path, backend, steps) as candidate:
                    results.append(
                        compare(candidate, reference, seeds=seeds, batches=batches, threshold=threshold, reason=reason)
                    )
                on_result(results[-1])
    bundle.with_parity(*(parity.record() for parity in results))
    return results


def _open_candidate(path: str | os.PathLike[str], backend: str, steps: int) -> Generator:
    """Open a candidate without the warning that it failed last time: this is the next time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*recorded parity failed", category=RuntimeWarning)
        return Generator.from_pretrained(path, backend=backend, num_inference_steps=steps, verify="none")
