"""``scm-export``: one group, one file for each verb. Every verb imports what it needs inside its body."""

from __future__ import annotations

import click

from scm_sdk._version import __version__

from .all import build
from .averages import average, ema
from .benchmark import bench
from .bundles import bundle
from .checking import selfcheck
from .common import ScmGroup
from .demo import demo
from .doctor import doctor
from .engines import cache, engine, targets
from .evaluation import evaluate
from .generation import generate
from .graphs import onnx
from .handover import handover
from .importing import import_
from .inspection import inspect
from .precision import precision
from .quantization import quantize
from .report import report
from .training import distill, train
from .validation import validate

__all__ = ["main"]


@click.group(cls=ScmGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="scm-export")
def main() -> None:
    """Train, export and check continuous-time consistency models (sCM).

    \b
    Exit codes: 0 ok, 2 usage, 3 parity, 4 latency, 5 incompatible, 6 integrity, 7 backend missing.
    """


_VERBS = (
    demo, train, distill, ema, average, import_, build, onnx, precision, quantize, engine, generate, validate,
    selfcheck, bench, evaluate, report, handover, inspect, bundle, targets, cache, doctor,
)  # fmt: skip
for _verb in _VERBS:
    main.add_command(_verb)
