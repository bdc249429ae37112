"""``validate``: does every graph of a bundle compute what its checkpoint computes?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import json_option, print_json, say

if TYPE_CHECKING:
    from scm_sdk.evaluate.parity import Parity


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, default=("onnxruntime",), help="Candidates; may be repeated.")
@click.option("--num-seeds", type=click.IntRange(1), default=32, help="Samples for each batch split.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Batch splits; 1, 3 and the largest.")
@click.option("--threshold", type=click.FloatRange(0), help="Largest difference that passes, units of sigma_data.")
@click.option("--reason", default="", help="Why a threshold is looser than the derived one.")
@json_option
def validate(
    bundle: Path, backends: tuple[str, ...], num_seeds: int, batches: tuple[int, ...], threshold: float | None,
    reason: str, as_json: bool,
) -> None:  # fmt: skip
    """Hold each graph of BUNDLE against its PyTorch checkpoint, record the result, exit 3 on failure.

    Both run on the same noise and labels. The threshold is derived from how far the checkpoint is
    from itself under another batch split and another number of threads.
    """
    from scm_sdk.evaluate.gate import SPLITS, validate_bundle

    results = validate_bundle(
        bundle, backends=backends, num_seeds=num_seeds, batches=batches or SPLITS, threshold=threshold, reason=reason,
        on_result=lambda parity: None if as_json else say(summary(parity)),
    )  # fmt: skip
    if as_json:
        print_json([parity.to_dict() for parity in results])
    for parity in results:
        parity.raise_if_failed()


def summary(parity: Parity) -> str:
    """Return a comparison as one line."""
    overall = parity.overall
    return (
        f"{'pass' if parity else 'FAIL'}  {parity.candidate} on {parity.candidate_backend}: max {parity.max_abs:.2e}, "
        f"mean {overall.mean_abs:.1e}, PSNR {overall.psnr_db:.1f} dB, {parity.num_samples} seeds x batches "
        f"{', '.join(map(str, parity.by_batch))}; allowed {parity.threshold:.1e} (floor {parity.noise_floor:.1e})"
        + (f"; reason: {parity.reason}" if parity.reason else "")
    )
