"""Disable the telemetry of runtime libraries unless ``SCM_TELEMETRY=1``.

ONNX Runtime 1.29 and later looks up a collector and keeps a device id in the home folder; importing OpenVINO sends an
event. A program that imports them before this package does must switch their telemetry off itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .switches import is_on

TELEMETRY_VARIABLE = "SCM_TELEMETRY"
_OF_OPENVINO = "openvino_telemetry"


@contextmanager
def without_telemetry(module: str) -> Iterator[None]:
    """Import a library within this context with its telemetry off.

    Args:
        module: Name of the module to import.
    """
    library = module.partition(".")[0]
    if is_on(TELEMETRY_VARIABLE):
        yield
    elif library == "onnxruntime":
        # The variable is read when the library starts; a value of the user is kept.
        os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"
        yield
        # If the program imported the library before, it has read the variable already.
        getattr(sys.modules.get(library), "disable_telemetry_events", lambda: None)()
    elif library == "openvino" and _OF_OPENVINO not in sys.modules:
        # OpenVINO has no variable, only a file in the home folder. Without its client package it sends nothing.
        sys.modules[_OF_OPENVINO] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules[_OF_OPENVINO]
    else:
        yield
