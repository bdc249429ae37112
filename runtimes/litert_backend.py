"""Run the sampler with LiteRT (TensorFlow Lite) on the CPU; torch is never imported.

Labels are int32 there: the exporter of LiteRT narrows every int64 input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._util.lazy import installed_version, require
from scm_sdk._util.processor import limited_threads
from scm_sdk.errors import IntegrityError

from .fixed_batch import FixedBatchBackend, Port, cannot_load


class LiteRTBackend(FixedBatchBackend):
    """One interpreter over a ``.tflite`` file; see ``Backend``."""

    name = "litert"
    int64_as = "int32"

    def load(self, path: Path, num_threads: int | None) -> tuple[Sequence[Port], Sequence[Port]]:
        """See ``FixedBatchBackend.load``."""
        require("ai_edge_litert", extra="litert", purpose="backend 'litert'")
        library = require("ai_edge_litert.interpreter", extra="litert", purpose="backend 'litert'")
        try:
            self._interpreter: Any = library.Interpreter(str(path), num_threads=num_threads or limited_threads())
            self._interpreter.allocate_tensors()
            signatures = self._interpreter.get_signature_list()
        except Exception as exc:  # ValueError and RuntimeError of its C++ parts
            raise cannot_load("litert", installed_version("ai_edge_litert"), path, exc) from exc
        if len(signatures) != 1:
            raise IntegrityError(
                f"{path} has {len(signatures)} signatures, expected one. Make it again with scm-export edge."
            )
        self._runner: Any = self._interpreter.get_signature_runner(next(iter(signatures)))
        return _ports(self._runner.get_input_details()), _ports(self._runner.get_output_details())

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``FixedBatchBackend.run``."""
        images: np.ndarray = self._runner(**feeds)[self.spec.output_name]
        return images

    def unload(self) -> None:
        """See ``FixedBatchBackend.unload``."""
        self._runner = self._interpreter = None


def _ports(details: Mapping[str, Mapping[str, Any]]) -> list[Port]:
    return [(name, np.dtype(d["dtype"]).name, tuple(map(int, d["shape"]))) for name, d in details.items()]


open_backend = LiteRTBackend
