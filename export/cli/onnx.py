"""``onnx``: export a checkpoint to a bundle with one graph per number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import TerminalEvents, json_option, print_json, say, say_warnings
from .libraries import EXPORT, requires
from .located import model_argument
from .names import STEPS, OutputPath, sampler_options, split_option

if TYPE_CHECKING:
    from scm_sdk.spec import Renoise


@click.command()
@requires(*EXPORT)
@model_argument("checkpoint")
@click.option("-o", "--out", required=True, type=OutputPath(replaces=True), help="Folder of the bundle.")
@click.option("--steps", multiple=True, type=STEPS, default=(1, 2), help="Number of network calls; may be repeated.")
@sampler_options
@click.option("--max-batch", type=click.IntRange(1), default=32, help="Largest batch, images.")
@split_option
@click.option("--name", default="", help="Name of the model; default: the name of the folder.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle in OUT.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the samplers as a JSON list and stop.")
@json_option
def onnx(
    checkpoint: Path, out: Path, steps: tuple[int, ...], times: tuple[float, ...], renoise: Renoise | None,
    start_time: float | None, max_batch: int, split: bool, name: str, overwrite: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export a checkpoint to a bundle of ONNX graphs.

    There is one graph for each number of steps. CHECKPOINT is a training run or a saved model. A bundle in OUT that was
    exported from the same weights for the same samplers is left unchanged.

    \b
    scm-export onnx runs/avatars -o avatars
    """
    from ..bundle_export import current_export, export_bundle, plan_samplers

    if dry_run:
        import msgspec

        from scm_sdk.model.consistency import ConsistencyModel

        model = ConsistencyModel.from_pretrained(checkpoint)
        specs = plan_samplers(model, steps, times=times, renoise=renoise, start_time=start_time, max_batch=max_batch)
        print_json([msgspec.json.decode(spec.to_json()) for spec in specs])
        return
    report = None
    if not overwrite:
        report = current_export(
            checkpoint, out, steps=steps, times=times, renoise=renoise, start_time=start_time, max_batch=max_batch,
            split=split, name=name,
        )  # fmt: skip
    unchanged = report is not None
    if report is None:
        with TerminalEvents() as events:
            report = export_bundle(
                checkpoint, out, steps=steps, times=times, renoise=renoise, start_time=start_time, max_batch=max_batch,
                split=split, name=name, overwrite=overwrite, events=events,
            )  # fmt: skip
    say_warnings(report.status)
    if as_json:
        print_json({**report.to_dict(), "unchanged": unchanged})
        return
    for graph in report.graphs:
        size = (graph.bytes + graph.data_bytes) / 1e6
        say(f"  {graph.path.parent.name}: {graph.num_nodes} nodes, {size:.1f} MB, opset {graph.opset}")
    state = "unchanged, " if unchanged else ""
    say(f"{out}: {state}build {report.build_id[:12]}, {report.bytes / 1e6:.1f} MB. Next: scm-export validate {out}")
