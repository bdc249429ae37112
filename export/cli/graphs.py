"""``onnx``: a checkpoint becomes a bundle with one graph for each number of steps."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say, say_warnings
from .located import model_argument


@click.command()
@model_argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--steps", multiple=True, type=click.IntRange(1, 64), default=(1, 2), help="May be repeated.")
@click.option("--times", multiple=True, type=float, help="Times of one sampler, radians, instead of --steps.")
@click.option("--max-batch", type=click.IntRange(1), default=32, help="Largest batch.")
@click.option("--name", default="", help="Human name; the folder's when absent.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the samplers and stop.")
@json_option
def onnx(
    checkpoint: Path, out: Path, steps: tuple[int, ...], times: tuple[float, ...], max_batch: int, name: str,
    overwrite: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export CHECKPOINT, a training run or a saved model, to a bundle.

    \b
    scm-export onnx runs/avatars -o avatars
    """
    from ..pipeline import export_bundle, plan_samplers

    if dry_run:
        from scm_sdk.model.consistency import ConsistencyModel

        model = ConsistencyModel.from_pretrained(checkpoint)
        for spec in plan_samplers(model, steps, times=times, max_batch=max_batch):
            click.echo(spec.to_json())
        return
    report = export_bundle(
        checkpoint, out, steps=steps, times=times, max_batch=max_batch, name=name, overwrite=overwrite,
        progress=lambda stage: say(f"  {stage} …"),
    )  # fmt: skip
    say_warnings(report.status)
    if as_json:
        print_json(report.to_dict())
        return
    for graph in report.graphs:
        size = (graph.bytes + graph.data_bytes) / 1e6
        say(f"  {graph.path.parent.name}: {graph.num_nodes} nodes, {size:.1f} MB, opset {graph.opset}")
    say(f"{out}: build {report.build_id[:12]}, {report.bytes / 1e6:.1f} MB. Next: scm-export validate {out}")
