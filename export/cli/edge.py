"""``edge``: a bundle's samplers for the runtimes of phones, NPUs and embedded machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import TerminalEvents, json_option, print_json, say
from .located import model_argument
from .names import PRECISION, STEPS, Name

if TYPE_CHECKING:
    from scm_sdk.spec import Precision


def _runtimes() -> tuple[str, ...]:
    from ..edge.runtimes import RUNTIMES

    return tuple(RUNTIMES)


@click.command()
@model_argument("bundle", one_size=True)
@click.option("-r", "--runtime", required=True, type=Name("runtime", _runtimes), help="Runtime to convert for.")
@click.option("--precision", "precisions", multiple=True, type=PRECISION,
              help="Precision of the artifacts; may be repeated; fp32 when absent.")  # fmt: skip
@click.option("--steps", multiple=True, type=STEPS, help="Only this number of steps; may be repeated; all when absent.")
@json_option
def edge(
    bundle: Path, runtime: str, precisions: tuple[Precision, ...], steps: tuple[int, ...], as_json: bool
) -> None:  # fmt: skip
    """Convert samplers for phones, NPUs or embedded machines.

    The artifacts are added to the bundle, for a batch of one image. Those that run here (litert, executorch,
    openvino_ir) are compared with PyTorch by scm-export validate.

    \b
    scm-export edge avatars --runtime litert
    scm-export validate avatars --backend litert
    """
    from ..edge.artifacts import add_edge
    from ..edge.runtimes import edge_runtime

    with TerminalEvents(show_results=not as_json) as events:
        made = add_edge(bundle, runtime, precisions=precisions, steps=steps, events=events)
    if as_json:
        print_json([artifact.to_dict() for artifact in made])
    backend = edge_runtime(runtime).backend
    say(f"Next: scm-export validate {bundle} --backend {backend}" if backend else
        f"{edge_runtime(runtime).title} has no backend here: check the artifact where it will run")  # fmt: skip
