"""``all``: from a checkpoint to proved graphs and engines in one command that goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import prompts_option, say, say_warnings
from .engines import BuildBars
from .engines import summary as engine_summary
from .located import model_argument
from .precision import summary as variant_summary

if TYPE_CHECKING:
    from scm_sdk.build_record import Flavour
    from scm_sdk.spec import Precision


@click.command(name="all")
@model_argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("-t", "--target", "names", multiple=True, help="GPUs to build engines for; none builds none.")
@click.option("--precision", "precisions", multiple=True, default=("fp16", "int8"),
              type=click.Choice(["fp32", "fp32-cpu", "fp16", "bf16", "int8", "int8-cpu"]))  # fmt: skip
@click.option("--flavour", type=click.Choice(["tensorrt_rtx", "tensorrt"]), default="tensorrt_rtx")
@click.option(
    "--steps",
    multiple=True,
    type=click.IntRange(1, 64),
    help="May be repeated; those that OUT has when absent, else 1 and 2.",
)
@click.option("--max-batch", type=click.IntRange(1), help="Largest batch; OUT's when absent, else 32.")
@click.option("--workspace", type=click.IntRange(1), help="MiB that an engine's kernel may use at run time.")
@click.option(
    "--target-psnr",
    type=float,
    help="PSNR (dB) that 95 % of the images are to reach in int8; leaves out the fewest layers; 2 above the gate.",
)
@prompts_option
@click.option("--validate/--no-validate", default=True, help="Hold everything that can run here against PyTorch.")
def build(
    checkpoint: Path, out: Path, names: tuple[str, ...], precisions: tuple[Precision, ...], flavour: Flavour,
    steps: tuple[int, ...], max_batch: int | None, workspace: int | None, target_psnr: float | None,
    prompts: Path | None, validate: bool,
) -> None:  # fmt: skip
    """Export CHECKPOINT, add precisions, build engines, prove what can run here. Run it again to go on.

    CHECKPOINT may be a bundle, such as OUT itself after an import.

    \b
    scm-export all runs/avatars -o avatars --target a100 --target l4 --target t4
    scm-export all sana -o sana --target a100 --prompts prompts.txt
    """
    from scm_sdk.targets import resolve_targets

    from ..chain import build_all
    from ..feeds import bundle_examples
    from ..prove import prove
    from .validation import summary as parity_summary

    bundle = build_all(
        checkpoint, out, precisions=precisions, targets=resolve_targets(names) if names else (), flavour=flavour,
        steps=steps, max_batch=max_batch, target_db=target_psnr, prompts=prompts,
        on_stage=lambda text: say(f"  {text} …"),
        on_variant=lambda variant: say(f"  {variant_summary(variant)}"),
        on_engine=lambda variant: say(f"  {engine_summary(variant)}"), on_build=BuildBars().start,
        workspace_bytes=workspace * 2**20 if workspace else None,
    )  # fmt: skip
    say_warnings(bundle.status)
    if validate:
        results = prove(
            out,
            examples=None if prompts is None else bundle_examples(out, prompts),
            on_result=lambda parity: say(parity_summary(parity)),
            on_skip=lambda line: say(f"skip  {line}"),
        )
        for parity in results:
            parity.raise_if_failed()
