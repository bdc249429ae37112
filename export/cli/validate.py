"""``validate``: compare every graph and engine of a bundle with its PyTorch checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import TerminalEvents, json_option, passed_and_skipped, print_json, prompts_option, say
from .located import model_argument
from .names import BACKEND, PRECISION, STEPS, OutputPath

if TYPE_CHECKING:
    from scm_sdk.inference.parity.compare import Parity
    from scm_sdk.spec import Precision

    from ..workspace import Workspace


@click.command()
@model_argument("bundle")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=BACKEND,
    help="Backend to compare; may be repeated; default: every one that can run here.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=PRECISION,
    help="Only artifacts of this precision; may be repeated; default: all.",
)
@click.option(
    "--steps",
    multiple=True,
    type=STEPS,
    help="Only artifacts of this number of steps; may be repeated; default: all.",
)
@click.option("--num-seeds", type=click.IntRange(1), default=32, help="Number of samples for each batch split.")
@click.option("--first-seed", type=click.IntRange(0), default=0, help="Seed of the first sample; the others follow.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    help="Batch size of a batch split; may be repeated; default: 1, 3 and the largest.",
)
@click.option(
    "--threshold", type=click.FloatRange(0), help="Largest difference of fp32 that passes, units of sigma_data."
)
@click.option("--min-psnr", type=float, help="PSNR (dB) that 95 % of the samples of a reduced precision must reach.")
@click.option("--reason", default="", help="Reason for a gate that is looser than the default.")
@click.option(
    "--bisect",
    "folder",
    type=OutputPath(),
    metavar="FOLDER",
    help="Folder for images of failed graphs; also names the fault and the first node that differs.",
)
@click.option("--record/--no-record", default=True, help="Write the results into the bundle's manifest.")
@prompts_option
@json_option
def validate(
    bundle: Path, backends: tuple[str, ...], precisions: tuple[Precision, ...], steps: tuple[int, ...], num_seeds: int,
    first_seed: int, batches: tuple[int, ...], threshold: float | None, min_psnr: float | None, reason: str,
    folder: Path | None, record: bool, prompts: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare a bundle with its PyTorch checkpoint; exit 3 on failure.

    Every graph and engine runs on the same noise and labels as the checkpoint. The threshold of fp32 is derived from
    the difference of the checkpoint from itself on the same samples, in other batch splits and on noise perturbed by
    rounding. Of a reduced precision 95 % of the samples must reach a PSNR; it fails if the samples show, with 95 %
    confidence, that fewer do. The structure of each graph is also checked: times, factors and stored tensors must equal
    those of the checkpoint. A comparison on fewer seeds or batches does not replace the recorded one. Budgets in the
    bundle (bench --keep-budget) are measured and enforced, exit 4.
    """
    from scm_sdk.evaluate.stored_budgets import check_budgets

    from ..diagnose.validate import validate as validate_model
    from ..precision.probe import bundle_examples
    from ..workspace import Workspace

    workspace, events = Workspace(bundle), TerminalEvents("", show_results=not as_json)
    with events:
        results = validate_model(
            workspace, backends=backends, precisions=precisions, steps=steps, num_seeds=num_seeds,
            first_seed=first_seed, batches=batches or None, threshold=threshold, min_psnr_db=min_psnr, reason=reason,
            record=record,
            examples=None if prompts is None else bundle_examples(bundle, prompts),
            events=events,
        )  # fmt: skip
    failed = [parity for parity in results if parity.required and not parity]
    if folder is not None:
        for parity in failed:
            _localize(workspace, parity, folder)
    whole = not (failed or backends or precisions or steps)
    latencies = check_budgets(bundle, events=events) if whole else []
    for latency in latencies:
        for timing in latency:
            kept = "FAIL" if timing.name in latency.exceeded else "pass"
            say(f"{kept}  latency of {timing.name}, batch {timing.batch}: median {timing.median_ms:.2f} ms, "
                f"p95 {timing.p95_ms:.2f} ms")  # fmt: skip
    if as_json:
        print_json({"parity": [each.to_dict() for each in results], "latency": [each.to_dict() for each in latencies]})
    for parity in results:
        parity.raise_if_failed()
    for latency in latencies:
        latency.raise_if_over()
    say(f"{bundle}: {passed_and_skipped(results, events)}. Next: scm-export bench {bundle}")


def _localize(workspace: Workspace, parity: Parity, folder: Path) -> None:
    from scm_sdk.errors import ExportError

    from ..diagnose.localize import localize

    if not parity.candidate.endswith(".onnx"):
        say(f"{parity.candidate} cannot be diagnosed: it is not a graph")
        return
    try:
        found = localize(workspace, parity, folder)
    except ExportError as exc:
        say(f"{parity.candidate} cannot be diagnosed: {exc}")
        return
    say(f"{found.artifact}:")
    for finding in found.diagnosis.findings:
        say(f"  {finding}")
    if not found.diagnosis.findings:
        say(f"  only a loss of precision was found; {found.diagnosis}")
    if found.bisection is not None:
        say(f"  vs the fp32 graph: {found.bisection}")
        if found.bisection.first is not None:
            for step in found.bisection.around():
                say(f"    {step.error:8.1e}  {step.op:<12} {step.node}")
    if found.picture is not None:
        say(f"  seed {parity.worst_seed}, reference, candidate, difference x10: {found.picture}")
