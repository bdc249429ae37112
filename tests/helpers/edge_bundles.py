"""Bundles with artifacts of edge runtimes, and which of these runtimes are installed."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

NEEDS = {"openvino_ir": "openvino", "litert": "litert_torch", "executorch": "executorch"}
"""The library that makes the artifacts of each runtime that runs here."""


def edge_params() -> list[Any]:
    """Return the runtimes as parameters of tests: heavy ones are slow, absent ones skipped with the reason."""
    return [
        pytest.param(
            name,
            marks=[
                *([] if name == "openvino_ir" else [pytest.mark.slow]),
                pytest.mark.skipif(
                    importlib.util.find_spec(library) is None,
                    reason=f"{library} is not installed: make test-edge installs it",
                ),
            ],
        )
        for name, library in NEEDS.items()
    ]


def with_edge(bundle: Path, runtime: str, path: Path, **options: Any) -> Path:
    """Copy a bundle and add the artifacts of a runtime to it."""
    from scm_sdk.export.edge.artifacts import add_edge

    shutil.copytree(bundle, path)
    add_edge(path, runtime, **options)
    return path
