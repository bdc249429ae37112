"""Run the sampler from an OpenVINO IR of fixed shapes; torch is never imported.

The IR is meant for NPUs, which take fixed shapes alone; here the CPU runs it, in float32, so that it can be validated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._util.lazy import require
from scm_sdk._util.processor import limited_threads

from .fixed_batch import FixedBatchBackend, Port, cannot_load
from .openvino_backend import same_signal_stack

_TYPES = {"f32": "float32", "i64": "int64"}


class OpenVINOIRBackend(FixedBatchBackend):
    """One compiled IR; see ``Backend``."""

    name = "openvino_ir"

    def load(self, path: Path, num_threads: int | None) -> tuple[Sequence[Port], Sequence[Port]]:
        """See ``FixedBatchBackend.load``."""
        openvino = require("openvino", extra="openvino", purpose="backend 'openvino_ir'")
        settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads := num_threads or limited_threads():
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            with same_signal_stack():
                compiled = core.compile_model(core.read_model(path), "CPU", settings)
            self._request: Any = compiled.create_infer_request()
            return [_port(p) for p in compiled.inputs], [_port(p) for p in compiled.outputs]
        except Exception as exc:  # RuntimeError of its C++ parts
            raise cannot_load("openvino", openvino.__version__, path, exc) from exc

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``FixedBatchBackend.run``."""
        images: np.ndarray = self._request.infer(dict(feeds), share_inputs=True)[0]
        return images

    def unload(self) -> None:
        """See ``FixedBatchBackend.unload``."""
        self._request = None


def _port(port: Any) -> Port:
    kind = port.element_type.to_string()
    return port.any_name, _TYPES.get(kind, str(kind)), tuple(port.shape)


open_backend = OpenVINOIRBackend
