"""``handover``: files for ``polygraphy run`` on another machine, and a verdict on its outputs."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say
from .libraries import requires
from .located import model_argument
from .names import PRECISION, STEPS, OutputPath


@click.command()
@requires("polygraphy", "torch")
@model_argument("bundle")
@click.option("-o", "--out", default=Path("handover"), type=OutputPath(), help="Folder for the files.")
@click.option("--steps", type=STEPS, default=2, help="Number of network calls of the graph.")
@click.option("--num-samples", type=click.IntRange(1), default=32, help="Number of samples, seeds 0, 1, ...")
@click.option(
    "--check",
    "outputs",
    type=click.Path(path_type=Path),
    help="File of outputs, written by polygraphy with --save-outputs, to compare with the reference.",
)
@click.option("--precision", type=PRECISION, default="fp32",
              help="Precision of the graph; with --check the precision that ran, which decides the gate.")  # fmt: skip
@json_option
def handover(
    bundle: Path, out: Path, steps: int, num_samples: int, outputs: Path | None, precision: str, as_json: bool
) -> None:  # fmt: skip
    """Write files for a check by Polygraphy on another machine.

    Writes the graph, inputs and reference outputs to OUT, or compares returned outputs (--check). The other machine
    needs no scm-sdk. Run the printed command in OUT.

    \b
    scm-export handover avatars -o handover
    cd handover && polygraphy run model.onnx --trt --trt-min-shapes ... (the whole command is printed)
    scm-export handover avatars --check handover/outputs.json --precision fp16
    """
    from ..polygraphy import check_outputs, write_handover

    if outputs is not None:
        found = check_outputs(bundle, outputs, steps=steps, precision=precision)
        for runner, gap in found.items():
            say(f"pass  {runner}: max {gap.max_abs:.1e} sigma_data, PSNR {gap.psnr_db:.1f} dB")
        if as_json:
            print_json({runner: gap.to_dict() for runner, gap in found.items()})
        return
    written = write_handover(bundle, out, steps=steps, precision=precision, num_samples=num_samples)
    say(f"wrote {written.graph.name}, {written.inputs.name} and {written.reference.name} to {out}. Run there:\n"
        f"  {written.command}")  # fmt: skip
    if as_json:
        print_json({name: str(value) for name, value in vars(written).items()})
