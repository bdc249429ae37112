"""``scm-export``: one click group, one file per verb. A verb imports its libraries inside its body."""

from __future__ import annotations

import click

from scm_sdk._version import __version__

from .all import build
from .averages import average, ema
from .bench import bench
from .bundles import bundle
from .common import log_lines
from .demo import demo
from .doctor import doctor
from .edge import edge
from .engines import cache, engine, targets
from .evaluate import evaluate
from .generate import generate
from .group import EXIT_CODES, ScmGroup
from .handover import handover
from .importing import import_
from .inspect import inspect
from .onnx import onnx
from .precision import precision
from .quantize import quantize
from .report import report
from .sample import merge, sample
from .selfcheck import selfcheck
from .serve import serve
from .training import distill, train
from .triton import triton
from .validate import validate
from .web import web

__all__ = ["EXIT_CODES", "main"]


@click.group(
    cls=ScmGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="scm-export")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Write the package's log to stderr: what each graph pass did, or why not.",
)
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Train, export and check continuous-time consistency models (sCM).

    With --json a command writes exactly one JSON document to stdout; progress and errors are text on stderr.
    """
    if verbose:
        ctx.with_resource(log_lines())


assert isinstance(main, ScmGroup)
main.add_section("Train", (train, distill, ema, average, evaluate))
main.add_section("Export", (demo, build, import_, onnx, precision, quantize, engine, edge))
main.add_section("Check", (validate, selfcheck, bench, report, handover))
main.add_section("Ship", (generate, sample, merge, serve, triton, web, inspect, bundle))
main.add_section("Machine", (doctor, targets, cache))
