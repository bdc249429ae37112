"""``quantize``: add INT8 graphs to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import TerminalEvents, json_option, prompts_option
from .libraries import requires
from .located import say_first_size
from .names import STEPS, one_of
from .precision import report

if TYPE_CHECKING:
    from ..precision.calibration import Method
    from ..precision.int8_variants import Base, Int8


@click.command()
@requires("onnx", "onnx_ir", "onnxruntime")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--to", "precisions", multiple=True, default=("int8",),
              type=one_of("precision", "int8", "int8-cpu", "int8-weights", "int4"),
              help="int8 for engines, int8-cpu for CPUs, int8-weights and int4 for small files.")  # fmt: skip
@click.option("--steps", multiple=True, type=STEPS, help="Only graphs of this number of steps.")
@click.option(
    "--base",
    type=one_of("precision", "fp16", "bf16", "fp32"),
    default="fp16",
    help="Precision of the layers that are not quantized.",
)
@click.option(
    "--method",
    type=one_of("method", "minmax", "percentile", "entropy"),
    default="minmax",
    help="Method that chooses the range of an activation.",
)
@click.option("--percentile", type=click.FloatRange(50, 100), default=99.99,
              help="Share of the values inside the range with --method percentile, percent.")  # fmt: skip
@click.option("--num-samples", type=click.IntRange(1), default=128,
              help="Number of images for calibration, and of further images for --target-psnr.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**20 - 1), default=0, help="Random seed for calibration samples.")
@click.option(
    "--equalize/--no-equalize",
    default=True,
    help="Equalize channel magnitudes before quantization (as SmoothQuant does).",
)
@click.option(
    "--exclude", "excluded", multiple=True, help="Pattern of layer names that are not quantized; may be repeated."
)
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="File of excluded layers: an edited precision/int8.json.")  # fmt: skip
@click.option(
    "--target-psnr",
    type=float,
    help="Target PSNR (dB) of 95 % of the images; excludes the fewest layers.",
)
@click.option("--from", "foreign", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Adopt a graph that another tool quantized, with --steps N.")  # fmt: skip
@prompts_option
@json_option
def quantize(
    bundle: Path, precisions: tuple[Int8, ...], steps: tuple[int, ...], base: Base, method: Method, percentile: float,
    num_samples: int, seed: int, equalize: bool, excluded: tuple[str, ...], plan_file: Path | None,
    target_psnr: float | None, foreign: Path | None, prompts: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Add INT8 graphs to a bundle.

    They are calibrated on intermediate states of the sampler.

    \b
    scm-export quantize avatars
    scm-export quantize avatars --target-psnr 37
    scm-export quantize avatars --from modelopt.onnx --steps 2
    """
    from ..precision.int8 import Exclusion, QuantizePlan, default_quantize_plan
    from ..precision.int8_variants import QuantizeOptions, add_foreign_int8, add_int8
    from ..precision.probe import bundle_examples
    from ..precision.variants import first_graph
    from ..workspace import Workspace

    say_first_size(bundle)
    if foreign is not None:
        if len(steps) != 1:
            raise click.UsageError("--from takes one graph, expected its number of steps: --steps N.")
        with TerminalEvents(show_results=not as_json) as events:
            variant = add_foreign_int8(bundle, foreign, steps=steps[0], events=events)
        report([variant], bundle, as_json=as_json)
        return
    workspace = Workspace(bundle)
    plan = QuantizePlan.from_json(plan_file.read_bytes()) if plan_file is not None else None
    if excluded:
        start = plan if plan is not None else default_quantize_plan(first_graph(workspace, steps))
        plan = start.excluding(*(Exclusion(pattern=pattern, reason="asked for") for pattern in excluded))
    examples = None if prompts is None else bundle_examples(bundle, prompts)
    variants = []
    with TerminalEvents(show_results=not as_json) as events:
        for precision in precisions:
            cpu = precision != "int8"
            options = QuantizeOptions(
                precision=precision, base="fp32" if cpu else base, plan=plan, method=method, percentile=percentile,
                num_samples=num_samples, seed=seed, target_db=target_psnr, equalize=equalize,
            )  # fmt: skip
            variants += add_int8(workspace, options, steps=steps, examples=examples, events=events)
    report(variants, bundle, as_json=as_json)
