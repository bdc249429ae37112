"""``handover``: let Polygraphy on another machine check a bundle, and judge what it sends back."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say
from .located import model_argument


@click.command()
@model_argument("bundle")
@click.option("-o", "--out", default=Path("handover"), type=click.Path(path_type=Path), help="Folder for the files.")
@click.option("--steps", type=click.IntRange(1, 64), default=2)
@click.option("--num-samples", type=click.IntRange(1), default=32)
@click.option("--check", "outputs", type=click.Path(path_type=Path), help="Judge this file of --save-outputs instead.")
@click.option(
    "--precision",
    default="fp32",
    help="Which graph is handed over; with --check what ran there, which decides the gate.",
)
@json_option
def handover(
    bundle: Path, out: Path, steps: int, num_samples: int, outputs: Path | None, precision: str, as_json: bool
) -> None:  # fmt: skip
    """Write a graph, inputs and reference outputs for Polygraphy on another machine.

    \b
    scm-export handover avatars -o handover
    polygraphy run model.onnx --trt --trt-min-shapes ... (the whole command is printed)
    scm-export handover avatars --check handover/outputs.json --precision fp16
    """
    from ..handover import check_outputs, write_handover

    if outputs is not None:
        found = check_outputs(bundle, outputs, steps=steps, precision=precision)
        for runner, gap in found.items():
            say(f"pass  {runner}: max {gap.max_abs:.1e} sigma_data, PSNR {gap.psnr_db:.1f} dB")
        if as_json:
            print_json({runner: gap.to_dict() for runner, gap in found.items()})
        return
    written = write_handover(bundle, out, steps=steps, precision=precision, num_samples=num_samples)
    say(f"wrote {written.inputs} and {written.reference}; beside them and the graph:\n  {written.command}")
    if as_json:
        print_json({name: str(value) for name, value in vars(written).items()})
