"""``precision``: add FP16, BF16 or CPU-optimized float32 graphs to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .common import TerminalEvents, json_option, print_json, prompts_option, say
from .libraries import requires
from .names import STEPS, one_of

if TYPE_CHECKING:
    from ..precision.half import LowPrecision
    from ..precision.variants import Variant


@click.command()
@requires("onnx", "onnx_ir")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "precisions",
    multiple=True,
    default=("fp16",),
    type=one_of("precision", "fp16", "bf16", "fp32-cpu"),
    help="Precision to add; may be repeated; fp32-cpu is fp32 with operators that are fast on CPUs.",
)
@click.option("--steps", multiple=True, type=STEPS, help="Only graphs of this number of steps.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="File of operators that stay in fp32: an edited precision/<p>.json.")  # fmt: skip
@click.option(
    "--target-psnr",
    type=float,
    help="Target PSNR (dB) of 95 % of the images; finds the fewest blocks that must stay in fp32.",
)
@click.option("--num-samples", type=click.IntRange(1), default=32, help="Number of images that are compared with fp32.")
@prompts_option
@json_option
def precision(
    bundle: Path, precisions: tuple[LowPrecision | Literal["fp32-cpu"], ...], steps: tuple[int, ...],
    plan_file: Path | None, target_psnr: float | None, num_samples: int, prompts: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Add FP16, BF16 or CPU-specific float32 graphs to a bundle.

    The plan of the operators that stay in float32 is stored in BUNDLE/precision/.

    fp32-cpu is float32 for CPUs: wide 3x3 convolutions as Winograd's products, with a quarter of the multiplications,
    and a transformer's norms as one kernel each.

    \b
    scm-export precision avatars
    scm-export precision avatars --to fp16 --to bf16
    """
    from ..precision.half import PrecisionPlan, default_plan
    from ..precision.probe import bundle_examples
    from ..precision.variants import add_cpu_form, add_precision
    from ..workspace import Workspace

    if "fp32-cpu" in precisions and (plan_file is not None or target_psnr is not None):
        raise click.UsageError("fp32-cpu has no reduced precision: --plan and --target-psnr are for fp16 and bf16.")
    plans = [default_plan(p) for p in precisions if p != "fp32-cpu"]
    if plan_file is not None:
        plans = [PrecisionPlan.from_json(plan_file.read_bytes())]
    workspace = Workspace(bundle)
    with TerminalEvents(show_results=not as_json) as events:
        look: dict[str, Any] = {
            "steps": steps,
            "num_samples": num_samples,
            "examples": None if prompts is None else bundle_examples(bundle, prompts),
            "events": events,
        }
        variants = add_cpu_form(workspace, **look) if "fp32-cpu" in precisions else []
        for plan in plans:
            variants += add_precision(workspace, plan, target_db=target_psnr, **look)
    report(variants, bundle, as_json=as_json)


def report(variants: list[Variant], bundle: Path, *, as_json: bool) -> None:
    """Print the added graphs as JSON, or advice for those below their gate."""
    from scm_sdk.inference.parity.compare import MIN_PSNR_DB

    if as_json:
        print_json([variant.to_dict() for variant in variants])
        return
    below = [v for v in variants if v.psnr_db is not None and v.psnr_db < MIN_PSNR_DB[v.precision]]
    for variant in below:
        say(
            f"{variant.path} is below the gate of {variant.precision}, {MIN_PSNR_DB[variant.precision]:.0f} dB, on "
            f"these images: validate will probably fail. {_remedy(variant.precision, bundle)}"
        )
    if not below:
        say(f"Next: scm-export validate {bundle}")


def _remedy(precision: str, bundle: Path) -> str:
    from scm_sdk.inference.parity.compare import MIN_PSNR_DB

    from ..build_all import MARGIN_DB

    if precision in ("int8-weights", "int4"):
        return f"Keep more of it in float32: scm-export quantize {bundle} --to {precision} --exclude PATTERN"
    if precision not in ("fp16", "int8", "int8-cpu"):
        return "Use fp16 or fp32."
    verb = "precision" if precision == "fp16" else "quantize"
    command = f"scm-export {verb} {bundle} --to {precision} --target-psnr {MIN_PSNR_DB[precision] + MARGIN_DB:.0f}"
    return f"Keep more of it in a higher precision: {command}"
