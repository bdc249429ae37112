"""Run a graph on the CPU for measurements, with ONNX Runtime, or OpenVINO for bf16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from scm_sdk._util.lazy import is_installed, require
from scm_sdk._util.processor import BF16_CLASSES, concurrent_calls, cpu_class
from scm_sdk.errors import UnsupportedGraphError
from scm_sdk.inference.backends import BACKENDS

from ..graph.io import save_apart
from .half import PRECISION_KEY

if TYPE_CHECKING:
    import onnx_ir as ir


class _Runs(Protocol):
    """A session of a library."""

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]: ...


class _OpenVINOGraph:
    """A graph that OpenVINO computes as it is written: float32 islands stay float32."""

    def __init__(self, path: Path, num_threads: int | None) -> None:
        import openvino

        settings: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32"}
        if num_threads is not None:
            streams = concurrent_calls(num_threads)
            settings |= {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams * num_threads}
        self._compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return copies of the outputs of these names; None is all."""
        found = self._compiled.create_infer_request().infer(dict(feeds))  # a request runs one call at a time
        return [np.array(found[name]) for name in (range(len(found)) if names is None else names)]


class Session:
    """A session of a library that raises errors of scm-sdk; it may run in many threads at once.

    Args:
        session: The library's session.
        precision: Precision of the graph, for messages.
        fixed: Additional inputs of every run.
    """

    def __init__(self, session: _Runs, precision: str, fixed: Mapping[str, np.ndarray] | None = None) -> None:
        self._session, self._precision, self._fixed = session, precision, dict(fixed or {})

    def fix(self, feeds: Mapping[str, np.ndarray]) -> Session:
        """Return the same open session with some inputs fixed."""
        return Session(self._session, self._precision, self._fixed | dict(feeds))

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the values of these names; None is the outputs of the graph.

        Raises:
            UnsupportedGraphError: If the library fails.
        """
        try:
            return list(self._session.run(names, self._fixed | dict(feeds)))
        except Exception as exc:  # its exceptions share no base class
            raise _cannot_run(self._precision, exc) from exc


def open_session(
    model: ir.Model | Path,
    folder: Path,
    *,
    num_threads: int | None = None,
    node_by_node: bool = False,
    cpu_bf16: bool = False,
) -> Session:
    """Open a graph with ONNX Runtime.

    Args:
        model: The graph; a graph in memory is written to ``folder`` first.
        folder: A folder that outlives the session.
        num_threads: Number of threads; None is the default.
        node_by_node: Disable fusion. Always on for int8 graphs, because fused CPU kernels differ from the arithmetic of
            a GPU.
        cpu_bf16: Open a bf16 graph, for which ONNX Runtime has no kernels, with OpenVINO if that computes bf16 here.

    Raises:
        BackendUnavailable: If onnxruntime or onnx_ir is not installed.
        UnsupportedGraphError: If the library cannot run the graph on a CPU.
    """
    onnxruntime = require("onnxruntime", extra="onnxruntime", purpose="running a graph to measure it")
    require("onnx_ir", extra="export", purpose="reading ONNX graphs")
    import onnx_ir as ir

    if isinstance(model, Path):
        path, precision = model, ir.load(model).metadata_props.get(PRECISION_KEY, "fp32")
    else:
        path, precision = folder / "model.onnx", model.metadata_props.get(PRECISION_KEY, "fp32")
        save_apart(model.clone(), path)  # writing changes a model, which other threads may read
    if cpu_bf16 and precision == "bf16" and _computes_bf16():
        try:
            return Session(_OpenVINOGraph(path, num_threads), precision)
        except RuntimeError as exc:
            raise _cannot_run(precision, exc) from exc
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = num_threads or 0
    # Spinning threads would use as much processor time again without changing a value.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if node_by_node or precision == "int8":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its exceptions share no base class
        raise _cannot_run(precision, exc) from exc
    return Session(session, precision)


def _computes_bf16() -> bool:
    info = BACKENDS["openvino"]
    return cpu_class() in BF16_CLASSES and is_installed(info.library) and not info.cannot_compute("bf16")


def _cannot_run(precision: str, exc: Exception) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"the library cannot run this {precision} graph on a CPU: {str(exc).strip()}. Expected one that it "
        "has kernels for, and memory for its values; measure it where it will run (scm-export validate)."
    )
