"""``triton``: a Triton model repository."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say
from .located import model_argument
from .names import PRECISION, STEPS, OutputPath


@click.command()
@model_argument("bundle", one_size=True)
@click.option("-o", "--out", default=Path("triton"), type=OutputPath(), help="Folder of the repository.")
@click.option("--steps", type=STEPS, help="Number of network calls; 2 where the bundle has it.")
@click.option("--precision", type=PRECISION, default="fp32", help="Precision of the graph and of the engines.")
@click.option("--name", help="Name of the model; the bundle's when absent.")
@click.option("--max-queue-size", type=click.IntRange(1), default=64, help="Requests that may wait in Triton.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(0, min_open=True), default=30.0,
              help="Seconds that a request may wait.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an earlier repository in OUT.")
@json_option
def triton(
    bundle: Path, out: Path, steps: int | None, precision: str, name: str | None, max_queue_size: int,
    timeout_seconds: float, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a Triton model repository.

    The graph for Triton's ONNX Runtime backend, TensorRT engines by compute capability, and a Python model that takes
    seeds and labels and returns pictures.

    \b
    scm-export triton avatars -o models
    tritonserver --model-repository=models --model-control-mode=none
    """
    from ..triton_repository import write_triton_repository

    found = write_triton_repository(
        bundle, out, steps=steps, precision=precision, name=name, max_queue_size=max_queue_size,
        timeout_seconds=timeout_seconds, overwrite=overwrite,
    )  # fmt: skip
    for path in found.left_out:
        say(f"  left out {path}: Triton does not load TensorRT-RTX engines")
    say(f"{found.path}: {', '.join(found.models)}; README.md says how to run it")
    if as_json:
        print_json({"path": str(found.path), "models": list(found.models), "left_out": list(found.left_out)})
