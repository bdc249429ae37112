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
        module: What is imported.
    """
    library = module.partition(".")[0]
    if is_on(TELEMETRY_VARIABLE):
        yield
    elif library == "onnxruntime":
        # Its own switch, read when it starts; a user's value stays.
        os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"
        yield
        # Where the program imported it before, it has read its switch.
        getattr(sys.modules.get(library), "disable_telemetry_events", lambda: None)()
    elif library == "openvino" and _OF_OPENVINO not in sys.modules:
        # It has no switch but a file in the home folder; where its client is not installed it does without.
        sys.modules[_OF_OPENVINO] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules[_OF_OPENVINO]
    else:
        yield
