"""Run the sampler graph with ONNX Runtime; torch is never imported.

Opening checks three conditions that ONNX Runtime does not: the requested execution provider runs (ONNX Runtime falls
back to the CPU silently), inputs and output of the graph match the spec, and the spec in the graph equals that of the
manifest.

An ``int8`` graph is made for engines: here its Q/DQ nodes are computed in floating point, because the fused int8
kernels saturate on a CPU without VNNI. ``int8-cpu`` is the fast form for CPUs.

Threads: ``InferenceSession.run`` is thread-safe, so ``sample`` takes no lock. The worker threads of the session do not
spin while they wait, which would waste cores of a shared machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._util.lazy import install_command, require
from scm_sdk._util.processor import limited_threads
from scm_sdk.errors import BackendFailure, BackendUnavailable, IntegrityError
from scm_sdk.spec import SamplerSpec, TensorSpec

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
    first_line,
)

PRECISION_KEY = "scm_precision"
"""Key under which it writes the precision, if that is not fp32."""
_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
_ERRORS_ONLY = 3
_PREFIX = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : |Load model from .*? failed: ?|/\S+\.(?:cc|h):\d+ \S.*\) (?=[A-Z])"
)


class OrtBackend:
    """One ``InferenceSession`` over a sampler graph; see ``Backend``.

    Args:
        artifact_path: The ``.onnx`` file; its external data is next to it.
        spec: What the manifest says the graph is.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None is ``"cpu"``.
        num_threads: Threads within one operator; None leaves ONNX Runtime's own choice, within a
            container's cores.

    Raises:
        BackendUnavailable: If onnxruntime or the execution provider for ``device`` is not here.
        IntegrityError: If the file is missing, damaged, or is not the graph the manifest describes.
    """

    name = "onnxruntime"

    def __init__(
        self,
        artifact_path: Path,
        spec: SamplerSpec,
        *,
        device: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        session, index = _open_session(artifact_path, device, num_threads)
        check_graph(spec, _tensors(session), _metadata(session, SPEC_KEY), artifact_path)
        self.spec = spec
        self.device = "cpu" if index is None else f"cuda:{index}"
        self._session: Any = session

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        feeds = check_inputs(self.spec, noise, conditioning)
        session = self._session
        if session is None:
            raise BackendFailure("this onnxruntime backend was closed, expected an open one. Open it again.")
        try:
            (images,) = session.run([self.spec.output_name], feeds)
        except Exception as exc:  # onnxruntime's errors have no common base class
            raise BackendFailure(
                f"onnxruntime failed on a batch of {len(noise[0])} on {self.device}: {_message(exc)}. "
                "Expected images; try a smaller batch_size, and report it if that does not help."
            ) from exc
        return check_images(self.spec, images, len(noise[0]), backend="onnxruntime")

    def close(self) -> None:
        """Release the session, which owns the memory."""
        self._session = None


def open_graph(
    path: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    device: str | None = None,
    num_threads: int | None = None,
) -> LoadedGraph:
    """Open a graph that is no sampler; see ``backends.open_graph``.

    Raises:
        BackendUnavailable: If onnxruntime or the execution provider for ``device`` is not here.
        IntegrityError: If the file is missing, damaged, or has other inputs or outputs.
    """
    session, _ = _open_session(path, device, num_threads, arena=False)
    check_tensors(_tensors(session), inputs, outputs, path)
    infer = partial(session.run, [tensor.name for tensor in outputs])
    return LoadedGraph(path, infer, library="onnxruntime", errors=Exception, explain=_message)  # no common base class


def _open_session(
    path: Path, device: str | None, num_threads: int | None, *, arena: bool = True
) -> tuple[Any, int | None]:
    """Return a session that runs where ``device`` says, and the number of its GPU.

    ``arena`` keeps freed memory of the CPU for later calls, which is faster for small tensors; a decoder's are large.
    """
    ort = require("onnxruntime", extra="onnxruntime", purpose="backend 'onnxruntime'")
    check_num_threads(num_threads)
    check_artifact(path)
    provider, index = _provider(ort, device)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.intra_op_num_threads = num_threads or limited_threads() or 0  # 0: chosen by the library
    settings = [provider] if index is None else [(provider, _cuda_options(index))]
    session = _load(ort, path, options, settings)
    if _metadata(session, PRECISION_KEY).partition(" ")[0] == "int8" and index is None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = _load(ort, path, options, settings)
    if session.get_providers()[:1] != [provider]:
        raise BackendUnavailable(
            f"onnxruntime runs {path.name} on {session.get_providers()}, expected {provider} "
            "first: it fell back silently. Check the driver (scm-export doctor) or use device='cpu'."
        )
    return session, index


def _load(ort: Any, path: Path, options: Any, settings: Any) -> Any:
    name = os.fsencode(path).decode(errors="backslashreplace")
    if name != str(path):
        raise BackendUnavailable(
            f"{name} is no UTF-8, but onnxruntime opens no other paths. Rename the folder, or use backend='openvino' "
            "or 'torch'."
        )
    try:
        return ort.InferenceSession(name, options, providers=settings)
    except Exception as exc:  # onnxruntime's errors have no common base class
        text = _message(exc)
        if "NOT_IMPLEMENTED" in text:
            raise BackendUnavailable(
                f"onnxruntime {ort.__version__} has no kernel for a node of {path}: {text}. Expected a precision "
                "that this device computes; fp32 runs everywhere, bf16 on a GPU, or by backend 'openvino' on a CPU "
                "with BF16 instructions."
            ) from exc
        if "Unsupported model IR version" in text or "is under development" in text:
            raise BackendUnavailable(
                f"onnxruntime {ort.__version__} is too old for {path}: {text}. Expected 1.23 or later. Install: "
                f"{install_command('onnxruntime', '--upgrade')}"
            ) from exc
        raise IntegrityError(
            f"onnxruntime {ort.__version__} cannot load {path}: {text}. "
            "Expected a sampler graph of scm-export with its external data next to it, and memory for both. Export it "
            "again."
        ) from exc


def _message(exc: Exception) -> str:
    """Return onnxruntime's message without prefixes and source locations."""
    return _PREFIX.sub("", first_line(exc))


def _metadata(session: Any, key: str) -> str:
    return str(session.get_modelmeta().custom_metadata_map.get(key, ""))


def _provider(ort: Any, device: str | None) -> tuple[str, int | None]:
    index = cuda_index(device, backend="onnxruntime")
    if index is None:
        return "CPUExecutionProvider", None
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendUnavailable(
            f"device is {device!r}, but this onnxruntime offers {ort.get_available_providers()}. "
            f"Use device='cpu', or: pip uninstall onnxruntime && {install_command('onnxruntime-gpu')}"
        )
    return "CUDAExecutionProvider", index


def _cuda_options(index: int) -> dict[str, str]:
    """Return the options of the CUDA provider. Its default computes float32 as TF32, with 10 bits of mantissa."""
    return {"device_id": str(index), "use_tf32": "0"}


def _tensors(session: Any) -> list[tuple[str, str, tuple[object, ...]]]:
    """Return name, dtype and shape without the batch of each input, then of each output."""
    nodes = (*session.get_inputs(), *session.get_outputs())
    return [(node.name, _TYPES.get(node.type, str(node.type)), tuple(node.shape[1:])) for node in nodes]


open_backend = OrtBackend
