"""``all``: from a checkpoint to validated graphs and engines; continues after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import (
    TerminalEvents,
    json_option,
    passed_and_skipped,
    plural,
    print_json,
    prompts_option,
    say,
    say_warnings,
)
from .libraries import EXPORT, requires
from .located import model_argument, say_first_size
from .names import STEPS, OutputPath, TargetName, one_of

if TYPE_CHECKING:
    from scm_sdk.bundle.engine_record import Flavor
    from scm_sdk.spec import Precision


@click.command(name="all")
@requires(*EXPORT)
@model_argument("checkpoint")
@click.option("-o", "--out", required=True, type=OutputPath(replaces=True), help="Folder of the bundle.")
@click.option("-t", "--target", "names", multiple=True, type=TargetName(),
              help="GPU to build engines for; may be repeated; default: no engine.")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, default=("fp16", "int8"),
              type=one_of("precision", "fp32", "fp32-cpu", "fp16", "bf16", "int8", "int8-cpu", "int8-weights", "int4"),
              help="Precision to add; may be repeated.")  # fmt: skip
@click.option("--flavor", "flavor", type=one_of("flavor", "tensorrt_rtx", "tensorrt"), default="tensorrt_rtx",
              help="Library that builds the engines.")  # fmt: skip
@click.option(
    "--steps",
    multiple=True,
    type=STEPS,
    help="Number of network calls; may be repeated; default: those of OUT, else 1 and 2.",
)
@click.option("--max-batch", type=click.IntRange(1), help="Largest batch, images; default: that of OUT, else 32.")
@click.option("--workspace", type=click.IntRange(1), help="Memory that a kernel of an engine may use at run time, MiB.")
@click.option(
    "--target-psnr",
    type=float,
    help="Target PSNR (dB) of 95 % of the int8 images; excludes the fewest layers; 2 dB above the gate.",
)
@prompts_option
@click.option("--validate/--no-validate", default=True, help="Compare everything that can run here with PyTorch.")
@json_option
def build(
    checkpoint: Path, out: Path, names: tuple[str, ...], precisions: tuple[Precision, ...], flavor: Flavor,
    steps: tuple[int, ...], max_batch: int | None, workspace: int | None, target_psnr: float | None,
    prompts: Path | None, validate: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export, add precisions, build engines and validate, all in one.

    CHECKPOINT is a training run, a saved model, or a bundle, such as OUT itself after an import. Run the same command
    again to continue after an interruption; existing artifacts are left unchanged.

    \b
    scm-export all runs/avatars -o avatars --target l4 --target t4
    scm-export all sana -o sana --target l4 --prompts prompts.txt
    """
    from scm_sdk.engines.targets import resolve_targets

    from ..build_all import build_all
    from ..diagnose.validate import validate as validate_model
    from ..engines.add import EngineVariant
    from ..precision.probe import bundle_examples
    from ..precision.variants import Variant
    from ..workspace import Workspace

    shared = Workspace(out)
    with TerminalEvents() as built:
        made = build_all(
            checkpoint, shared, precisions=precisions, targets=resolve_targets(names) if names else (),
            flavor=flavor, steps=steps, max_batch=max_batch, target_db=target_psnr, prompts=prompts,
            events=built, workspace_bytes=workspace * 2**20 if workspace else None,
        )  # fmt: skip
    say_warnings(made.status)
    say_first_size(out, "INT8 graphs and engines are of")
    checked = TerminalEvents("")
    if validate:
        examples = None if prompts is None else bundle_examples(out, prompts)
        validate_model(shared, examples=examples, events=checked)
    variants = [made for made in built.results if isinstance(made, Variant)]
    engines = [made for made in built.results if isinstance(made, EngineVariant)]
    proved = shared.bundle
    manifest = proved.manifest
    size = sum(entry.size for entry in manifest.files)
    if as_json:
        print_json({
            "path": str(out), "build_id": manifest.build_id, "bytes": size,
            "status": proved.status.to_dict(),
            "graphs": [variant.to_dict() for variant in variants], "engines": [each.to_dict() for each in engines],
            "parity": [each.to_dict() for each in checked.results], "skipped": checked.skipped,
        })  # fmt: skip
    for parity in checked.results:
        parity.raise_if_failed()
    graphs = [a for a in made.manifest.all_artifacts if a.format == "onnx"]
    proof = passed_and_skipped(checked.results, checked) if validate else "not validated"
    say(f"{out}: {size / 1e6:.1f} MB, {plural(len(graphs), 'graph')}, {plural(len(engines), 'engine')}; {proof}. "
        f"Next: scm-export report {out}")  # fmt: skip
