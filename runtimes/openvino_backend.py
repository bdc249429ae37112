"""Run the sampler graph with OpenVINO on the CPU; torch is never imported.

OpenVINO is fastest where it knows the batch: one picture takes 1.5 times as long in a graph of any batch. So a
graph that is small is compiled once for each batch size, when it is first asked for (about a second), and kept for
``FIXED_BATCHES`` of them; a large one is compiled once for all, since each would hold the weights again.

It computes in float32, but for the layers that a graph of precision ``int8-cpu`` quantizes. Which precisions it is not
given, and why, stands in ``scm_sdk.dispatch.BACKENDS``.

Threads: ``sample`` may be called from many; each call takes an idle request of the library or makes one. The library
runs one at a time in each of its streams, so there is a stream for every call that the cores hold.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._lazy import require
from scm_sdk.errors import BackendFailure, BackendUnavailable, IntegrityError
from scm_sdk.processor import calls_side_by_side, limited_threads
from scm_sdk.spec import SamplerSpec

from .base import (
    SPEC_KEY,
    check_artifact,
    check_graph,
    check_images,
    check_inputs,
    check_num_threads,
    cuda_index,
    first_line,
)

FIXED_BATCHES = 8
"""Batch sizes of a small graph that stay compiled; of more, the one unused for longest goes."""
FIXED_BYTES = 64 * 2**20
"""Largest graph, weights included, that is compiled for each batch size."""
_TYPES = {"f32": "float32", "i64": "int64"}


def open_backend(
    artifact_path: Path, spec: SamplerSpec, *, device: str | None = None, num_threads: int | None = None
) -> OpenVINOBackend:
    """Load a sampler graph, check it against ``spec`` and compile it for one image.

    Args:
        artifact_path: The ``.onnx`` file; its external data lies beside it.
        spec: What the manifest says the graph is.
        device: ``"cpu"`` or None.
        num_threads: Threads of one call; None leaves OpenVINO's own choice, within the cores of a container.

    Raises:
        BackendUnavailable: If openvino or the device is not here, or it has no kernel for a node.
        IntegrityError: If the file is missing, damaged, or is not the graph the manifest describes.
    """
    return OpenVINOBackend(artifact_path, spec, device=device, num_threads=num_threads)


class OpenVINOBackend:
    """A sampler graph and what it was compiled to; see ``Backend``."""

    name = "openvino"
    device = "cpu"

    def __init__(
        self, artifact_path: Path, spec: SamplerSpec, *, device: str | None = None, num_threads: int | None = None
    ) -> None:
        openvino = require("openvino", extra="openvino", purpose="backend 'openvino'")
        check_num_threads(num_threads)
        check_artifact(artifact_path)
        if cuda_index(device, backend="openvino") is not None:
            raise BackendUnavailable(
                f"device is {device!r}, but backend 'openvino' runs on the CPU. Use device='cpu', or another backend."
            )
        # Not pinned to cores: two models in one process would be pinned to the same ones.
        self._settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        if num_threads is not None:
            streams = calls_side_by_side(num_threads)
            self._settings |= {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams * num_threads}
        elif (limit := limited_threads()) is not None:
            self._settings |= {"INFERENCE_NUM_THREADS": limit}
        self._openvino: Any = openvino
        self._core: Any = openvino.Core()
        self._model: Any = _load(self._core, artifact_path)
        found = [_describe(port) for port in (*self._model.inputs, *self._model.outputs)]
        check_graph(spec, found, _spec_text(self._model), artifact_path)
        self.spec = spec
        self._fixed = _graph_bytes(artifact_path) <= FIXED_BYTES
        self._compiled: OrderedDict[int, _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._for_batch(1)
        except RuntimeError as exc:
            raise BackendUnavailable(
                f"openvino {openvino.__version__} cannot compile {artifact_path}: {first_line(exc)}. Expected a "
                "precision that this CPU computes; fp32 runs everywhere."
            ) from exc

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        feeds = check_inputs(self.spec, noise, conditioning)
        batch = len(noise[0])
        try:
            images = self._for_batch(batch).run(feeds)
        except RuntimeError as exc:
            raise BackendFailure(
                f"openvino failed on a batch of {batch} on cpu: {first_line(exc)}. "
                "Expected images; try a smaller batch_size, and report it if that does not help."
            ) from exc
        return check_images(self.spec, images, batch, backend="openvino")

    def close(self) -> None:
        """Drop what was compiled, which owns the memory."""
        with self._lock:
            self._model = None
            self._compiled.clear()

    def _for_batch(self, batch: int) -> _Compiled:
        key = batch if self._fixed else 0
        with self._lock:
            if self._model is None:
                raise BackendFailure("this openvino backend was closed, expected an open one. Open it again.")
            if key not in self._compiled:
                model = self._model.clone()
                size = batch if self._fixed else self._openvino.Dimension(1, self.spec.max_batch)
                model.reshape({port: [size, *list(port.partial_shape)[1:]] for port in model.inputs})
                self._compiled[key] = _Compiled(self._core.compile_model(model, "CPU", self._settings))
                while len(self._compiled) > FIXED_BATCHES:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]


class _Compiled:
    """A compiled graph and its idle requests: one runs one call at a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: list[Any] = []

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        try:
            request = self._idle.pop()  # atomic: no lock
        except IndexError:
            request = self._compiled.create_infer_request()
        outputs = request.infer(feeds, share_inputs=True)
        images: np.ndarray = outputs[0]  # a copy: the request's own memory is written again by its next call
        self._idle.append(request)
        return images


def _load(core: Any, path: Path) -> Any:
    try:
        return core.read_model(path)
    except RuntimeError as exc:
        raise IntegrityError(
            f"openvino cannot load {path}: {first_line(exc)}. "
            "Expected a sampler graph of scm-export with its external data beside it. Export it again."
        ) from exc


def _describe(port: Any) -> tuple[str, str, tuple[object, ...]]:
    kind = port.element_type.to_string()
    shape = tuple(d.get_length() if d.is_static else "?" for d in list(port.partial_shape)[1:])
    return port.any_name, _TYPES.get(kind, kind), shape


def _spec_text(model: Any) -> str:
    path = ["framework", SPEC_KEY]  # where OpenVINO puts an ONNX file's metadata
    return str(model.get_rt_info(path).astype(str)) if model.has_rt_info(path) else ""


def _graph_bytes(path: Path) -> int:
    """Return the size of a graph and of the data beside it."""
    return sum(each.stat().st_size for each in path.parent.iterdir() if each.name.startswith(path.name))
