"""OpenVINO IR with fixed shapes, for NPUs, which take no other."""

from __future__ import annotations

from pathlib import Path

from scm_sdk.errors import ExportError

from ..graph.io import read_model
from .portability import require_portable
from .runtimes import BATCH, EdgeSource


def export(source: EdgeSource, path: Path) -> tuple[str, ...]:
    """Convert the graph; its weights are stored in FP16 for precision fp16. See ``Exporter``."""
    import openvino

    require_portable(read_model(source.path), "openvino")
    try:
        model = openvino.Core().read_model(source.path)
        model.reshape({port: [BATCH, *list(port.partial_shape)[1:]] for port in model.inputs})
        openvino.save_model(model, path, compress_to_fp16=source.precision == "fp16")
    except RuntimeError as exc:
        raise ExportError(
            f"openvino {openvino.__version__} cannot convert {source.path}: {str(exc).strip()[:500]}. Expected a graph "
            "of scm-export onnx; export it again."
        ) from exc
    return ()
