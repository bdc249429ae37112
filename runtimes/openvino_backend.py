"""Run the sampler graph with OpenVINO on the CPU; torch is never imported.

OpenVINO is fastest with a fixed batch size: with a dynamic one a single image takes 1.5 times as long. Compiling takes
about a second, so a small graph is compiled on demand for ``FIXED_SIZES`` only: a batch is run in parts of these sizes,
and an incomplete part repeats its last image. A large graph is compiled once with a dynamic batch, because each
compiled size holds a copy of the weights.

It computes a graph as it is written: fp32 in float32, bf16 in bf16 with the graph's own float32 islands, ``int8-cpu``
in float32 but for the layers that are quantized. Asked for bf16, it computes an fp32 graph in bf16, and chooses itself
what stays float32: marks on nodes do not reach its matrix products (2026.4), so islands need a bf16 graph. Which
precisions it is not given, and why, stands in ``scm_sdk.inference.backends.BACKENDS``.

Threads: ``sample`` may be called from many threads; each call takes an idle inference request or creates one. The
library runs one request per stream, so there are as many streams as concurrent calls fit on the cores.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._util.lazy import require
from scm_sdk._util.processor import concurrent_calls, limited_threads
from scm_sdk.errors import BackendFailure, BackendUnavailable, IntegrityError
from scm_sdk.spec import Precision, SamplerSpec, TensorSpec

from .base import (
    SPEC_KEY,
    LoadedGraph,
    check_artifact,
    check_graph,
    check_images,
    check_inputs,
    check_num_threads,
    check_tensors,
    cuda_index,
)

FIXED_SIZES = (32, 16, 8, 4, 1)
"""Batch sizes for which a small graph is compiled."""
FIXED_BYTES = 64 * 2**20
"""Largest graph, including weights, that is compiled for several batch sizes, bytes."""
_LEAST_FILLED = 0.875
"""Minimum share of requested images in a part of a fixed size."""
_TYPES = {"f32": "float32", "i64": "int64"}
_PLACE = re.compile(r"(Exception from|Check '.*' failed at) \S+:\d+:?")
_MAX_MESSAGE = 400


def cannot_compute(precision: str) -> str:
    """Return why OpenVINO cannot compute in a precision on this CPU, as it says itself; "" if it can."""
    openvino: Any = require("openvino", extra="openvino", purpose="backend 'openvino'")
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "" if precision.upper() in able else f"openvino computes {', '.join(sorted(able))} here, not {precision}"


class OpenVINOBackend:
    """A sampler graph with its compiled versions; see ``Backend``.

    Args:
        artifact_path: The ``.onnx`` file; its external data is next to it.
        spec: What the manifest says the graph is.
        device: ``"cpu"`` or None.
        num_threads: Threads of one call; None leaves OpenVINO's own choice, within the cores of a container.
        precision: ``"bf16"`` computes an fp32 graph in it; None computes a graph as it is written.

    Raises:
        BackendUnavailable: If openvino or the device is not here, or it has no kernel for a node.
        IntegrityError: If the file is missing, damaged, or is not the graph the manifest describes.
    """

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        artifact_path: Path,
        spec: SamplerSpec,
        *,
        device: str | None = None,
        num_threads: int | None = None,
        precision: Precision | None = None,
    ) -> None:
        openvino = _library(artifact_path, device, num_threads)
        self._settings = _settings(num_threads, precision)
        self._openvino: Any = openvino
        self._core: Any = openvino.Core()
        self._model: Any = _load(self._core, artifact_path)
        check_graph(spec, _tensors(self._model), _spec_text(self._model), artifact_path)
        self.spec = spec
        self._fixed = _graph_bytes(artifact_path) <= FIXED_BYTES
        self._compiled: dict[int, _Compiled] = {}
        self._lock = threading.Lock()
        try:
            self._for_size(1 if self._fixed else 0)
        except RuntimeError as exc:
            raise _cannot_compile(openvino, artifact_path, exc) from exc

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        feeds = check_inputs(self.spec, noise, conditioning)
        batch = len(noise[0])
        try:
            images = self._run(feeds, batch) if self._fixed else self._for_size(0).run(feeds)[0]
        except RuntimeError as exc:
            raise BackendFailure(
                f"openvino failed on a batch of {batch} on cpu: {_message(exc)}. "
                "Expected images; try a smaller batch_size, and report it if that does not help."
            ) from exc
        return check_images(self.spec, images, batch, backend="openvino")

    def close(self) -> None:
        """Release the compiled graphs, which own the memory."""
        with self._lock:
            self._model = None
            self._compiled.clear()

    def _run(self, feeds: dict[str, np.ndarray], batch: int) -> np.ndarray:
        parts = []
        start = 0
        for size in _sizes(batch, self.spec.max_batch):
            stop = min(start + size, batch)
            part = {name: array[start:stop] for name, array in feeds.items()}
            if stop - start < size:
                rows = np.minimum(np.arange(size), stop - start - 1)
                part = {name: array[rows] for name, array in part.items()}
            parts.append(self._for_size(size).run(part)[0][: stop - start])
            start = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _for_size(self, size: int) -> _Compiled:
        """Return the graph compiled for a batch size, or with a dynamic batch for 0."""
        with self._lock:
            if self._model is None:
                raise BackendFailure("this openvino backend was closed, expected an open one. Open it again.")
            if size not in self._compiled:
                model = self._model.clone()
                batch = size or self._openvino.Dimension(1, self.spec.max_batch)
                model.reshape({port: [batch, *list(port.partial_shape)[1:]] for port in model.inputs})
                with same_signal_stack():
                    compiled = self._core.compile_model(model, "CPU", self._settings)
                self._compiled[size] = _Compiled(compiled)
            return self._compiled[size]


def open_graph(
    path: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    device: str | None = None,
    num_threads: int | None = None,
) -> LoadedGraph:
    """Open a graph that is no sampler, compiled in float32 for any batch size; see ``backends.open_graph``.

    Raises:
        BackendUnavailable: If openvino or the device is not here, or it has no kernel for a node.
        IntegrityError: If the file is missing, damaged, or has other inputs or outputs.
    """
    openvino = _library(path, device, num_threads)
    core = openvino.Core()
    model = _load(core, path)
    check_tensors(_tensors(model), inputs, outputs, path)
    try:
        with same_signal_stack():
            compiled = _Compiled(core.compile_model(model, "CPU", _settings(num_threads, None)))
    except RuntimeError as exc:
        raise _cannot_compile(openvino, path, exc) from exc
    return LoadedGraph(path, compiled.run, library="openvino", errors=RuntimeError, explain=_message)


class _Compiled:
    """A compiled graph and its idle inference requests, each of which runs one call at a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: list[Any] = []

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            request = self._idle.pop()  # atomic: no lock
        except IndexError:
            request = self._compiled.create_infer_request()
        outputs = request.infer(feeds, share_inputs=True)
        # Copies, because the next call overwrites the memory of the request.
        copies: list[np.ndarray] = [outputs[i] for i in range(len(outputs))]
        self._idle.append(request)
        return copies


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Restore the alternate signal stack of the thread at the end.

    If there is such a stack (``faulthandler`` creates one), OpenVINO's CPU plugin replaces it when it compiles and
    restores it when it is released. If two models are released in the order of their compilation, the second restores
    the freed stack of the first, and the next signal, such as Ctrl-C, ends the process by SIGSEGV.
    """
    if sys.platform != "linux":
        yield
        return
    library, found = ctypes.CDLL(None), _SignalStack()
    known = library.sigaltstack(None, ctypes.byref(found)) == 0
    try:
        yield
    finally:
        if known:
            library.sigaltstack(ctypes.byref(found), None)


def _sizes(batch: int, max_batch: int) -> list[int]:
    """Split a batch into parts of ``FIXED_SIZES``, the largest first."""
    sizes = []
    while batch > 0:
        size = next(s for s in FIXED_SIZES if s == 1 or (s <= max_batch and batch >= _LEAST_FILLED * s))
        sizes.append(size)
        batch -= size
    return sizes


def _library(path: Path, device: str | None, num_threads: int | None) -> Any:
    """Return openvino after checking the arguments of an opening."""
    openvino = require("openvino", extra="openvino", purpose="backend 'openvino'")
    check_num_threads(num_threads)
    check_artifact(path)
    if cuda_index(device, backend="openvino") is not None:
        raise BackendUnavailable(
            f"device is {device!r}, but backend 'openvino' runs on the CPU. Use device='cpu', or another backend."
        )
    return openvino


def _settings(num_threads: int | None, precision: Precision | None) -> dict[str, str | int]:
    # Not pinned to cores, because two models in one process would be pinned to the same cores.
    settings: dict[str, str | int] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    if num_threads is not None:
        streams = concurrent_calls(num_threads)
        settings |= {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams * num_threads}
    elif (limit := limited_threads()) is not None:
        settings |= {"INFERENCE_NUM_THREADS": limit}
    return settings


def _cannot_compile(openvino: Any, path: Path, exc: Exception) -> BackendUnavailable:
    return BackendUnavailable(
        f"openvino {openvino.__version__} cannot compile {path}: {_message(exc)}. Expected a "
        "precision that this CPU computes; fp32 runs everywhere."
    )


def _load(core: Any, path: Path) -> Any:
    try:
        return core.read_model(path)
    except RuntimeError as exc:
        raise IntegrityError(
            f"openvino cannot load {path}: {_message(exc)}. "
            "Expected a sampler graph of scm-export with its external data next to it, and memory for both. Export it "
            "again."
        ) from exc


def _message(exc: Exception) -> str:
    """Return OpenVINO's message without source locations and full stop."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    found = " ".join(line for line in lines if not _PLACE.fullmatch(line)) or (lines or [type(exc).__name__])[-1]
    return found[:_MAX_MESSAGE].rstrip(". ")


def _tensors(model: Any) -> list[tuple[str, str, tuple[object, ...]]]:
    """Return name, dtype and shape without the batch of each input, then of each output."""
    return [_describe(port) for port in (*model.inputs, *model.outputs)]


def _describe(port: Any) -> tuple[str, str, tuple[object, ...]]:
    kind = port.element_type.to_string()
    if port.partial_shape.rank.is_dynamic:  # an input without a shape
        return port.any_name, _TYPES.get(kind, str(kind)), ("?",)
    shape = tuple(d.get_length() if d.is_static else "?" for d in list(port.partial_shape)[1:])
    return port.any_name, _TYPES.get(kind, str(kind)), shape


def _spec_text(model: Any) -> str:
    path = ["framework", SPEC_KEY]  # OpenVINO's location of ONNX metadata
    return str(model.get_rt_info(path).astype(str)) if model.has_rt_info(path) else ""


def _graph_bytes(path: Path) -> int:
    """Return the size of a graph including its external data, bytes."""
    return sum(each.stat().st_size for each in path.parent.iterdir() if each.name.startswith(path.name))


open_backend = OpenVINOBackend
