"""LiteRT (TensorFlow Lite): the sampler as a ``.tflite`` file for phones.

The file has one signature with the spec's names. Labels are int32 in it: the converter narrows every int64 input.
"""

from __future__ import annotations

from pathlib import Path

from scm_sdk._util.lazy import installed_version
from scm_sdk.errors import ExportError

from .converters import quiet
from .runtimes import EdgeSource


def export(source: EdgeSource, path: Path) -> tuple[str, ...]:
    """Convert the checkpoint with litert-torch; see ``Exporter``."""
    import litert_torch

    module, feeds = source.sampler()
    try:
        with quiet():
            litert_torch.convert(module, (), feeds).export(str(path))
    except Exception as exc:  # its own, torch's and those of its C++ parts share no base class
        raise ExportError(
            f"litert-torch {installed_version('litert_torch')} cannot convert this sampler: {str(exc).strip()[:500]}. "
            "Expected operators that it knows; run the ONNX graph with another runtime."
        ) from exc
    narrowed = [tensor.name for tensor in source.spec.inputs if tensor.dtype == "int64"]
    return (f"{', '.join(narrowed)}: int32 in this file",) if narrowed else ()
