"""``handover``: files for ``polygraphy run`` on another machine, and a verdict on its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import json_option, print_json, say
from .libraries import require_all
from .located import model_argument
from .names import PRECISION, STEPS, OutputPath, one_of

if TYPE_CHECKING:
    from scm_sdk.spec import Precision


@click.command()
@model_argument("bundle", one_size=True)
@click.option("--target", type=one_of("target", "polygraphy", "orin"), default="polygraphy",
              help="Who checks: Polygraphy on any machine, or trtexec on a Jetson Orin.")  # fmt: skip
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
    bundle: Path, target: str, out: Path, steps: int, num_samples: int, outputs: Path | None, precision: Precision,
    as_json: bool,
) -> None:  # fmt: skip
    """Write files to check elsewhere, by Polygraphy or on a Jetson.

    Writes the graph, inputs and reference outputs to OUT, or compares returned outputs (--check). The other machine
    needs no scm-sdk. Run the printed command in OUT. With --target orin: the graph, the recorded samples, build.sh and
    check.sh, which build an engine with JetPack's trtexec and compare it.

    \b
    scm-export handover avatars -o handover
    cd handover && polygraphy run model.onnx --trt --trt-min-shapes ... (the whole command is printed)
    scm-export handover avatars --check handover/outputs.json --precision fp16
    scm-export handover avatars --target orin --precision fp16 -o orin
    """
    if target == "orin":
        _orin(bundle, out, steps, precision, as_json)
        return
    require_all("polygraphy", "torch")
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


def _orin(bundle: Path, out: Path, steps: int, precision: Precision, as_json: bool) -> None:
    from ..edge.orin import write_orin

    require_all("onnx_ir")
    written = write_orin(bundle, out, steps=steps, precision=precision)
    say(f"wrote {written.bytes / 1e6:.1f} MB to {out}. Copy the folder to the Jetson and run there:\n"
        f"  {written.command}")  # fmt: skip
    if as_json:
        print_json({name: str(value) for name, value in vars(written).items()})
