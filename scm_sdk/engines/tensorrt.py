"""Load TensorRT or TensorRT-RTX, and translate their log messages.

Both have the same Python interface. ``tensorrt`` builds on the GPU that will run the engine; ``tensorrt_rtx`` builds
ahead of time on any machine and completes the compilation when the engine is loaded.
"""

from __future__ import annotations

import importlib
import re
from collections import deque
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from .._util.lazy import require
from ..errors import BackendUnavailable

if TYPE_CHECKING:
    from ..bundle.engine_record import Flavor

MIN_TENSORRT = (10, 12)
"""Minimum version: the first with complete strong typing. Version 11 removed weak typing."""
_KEPT_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING")
_KEPT_MESSAGES = 500
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


def load_flavor(flavor: Flavor, *, purpose: str) -> ModuleType:
    """Import one of the two libraries.

    Args:
        flavor: The library.
        purpose: What needs the library; the subject of the message.

    Raises:
        BackendUnavailable: If it is missing or too old.
    """
    if flavor == "tensorrt_rtx":
        try:  # only the wheel of the bindings, without the package that renames it
            return importlib.import_module("tensorrt_rtx")
        except ImportError:
            try:
                return importlib.import_module("tensorrt_rtx_bindings")
            except ImportError:
                return require("tensorrt_rtx", extra=EXTRAS[flavor], purpose=purpose)
    library = require("tensorrt", extra=EXTRAS[flavor], purpose=purpose)
    if version_tuple(library.__version__)[:2] < MIN_TENSORRT:
        least = ".".join(map(str, MIN_TENSORRT))
        raise BackendUnavailable(
            f"{purpose} found TensorRT {library.__version__}, expected {least} or later: older ones cannot take the "
            "precision from the graph. Install it with: pip install -U tensorrt"
        )
    return library


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for example ``(1, 7, 1, 116)``."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


LibraryObject = Any
"""An object of TensorRT's or TensorRT-RTX's bindings, which have no stubs."""


class Logger(Protocol):
    """A logger of one of the libraries that keeps what it hears."""

    kernels: list[str]

    def errors(self) -> list[str]:
        """Return the errors kept, each once."""
        ...

    def warnings(self) -> list[str]:
        """Return the warnings kept, each once."""
        ...


def make_logger(library: ModuleType, *, kernels: bool = False) -> Logger:
    """Return a logger for one of the libraries that keeps the last warnings and errors that it hears.

    The libraries hold no reference to the logger: keep it as long as the objects that use it.

    Args:
        library: The library.
        kernels: Also keep all messages that name kernels; for a build.

    Returns:
        An object with ``errors()``, ``warnings()`` and ``kernels``, the texts that name kernels.
    """

    class Collector(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            # Bounded, because an engine may run and log warnings for months.
            self.messages: deque[tuple[str, str]] = deque(maxlen=_KEPT_MESSAGES)
            self.kernels: list[str] = []

        def log(self, severity: object, message: str) -> None:
            name = str(severity).rpartition(".")[2]
            if name in _KEPT_SEVERITIES:
                self.messages.append((name, message))
            elif kernels and "LayerType: " in message:
                self.kernels.append(message)

        def errors(self) -> list[str]:
            return self._of("ERROR", "INTERNAL_ERROR")

        def warnings(self) -> list[str]:
            return self._of("WARNING")

        def _of(self, *severities: str) -> list[str]:
            return list(dict.fromkeys(text for severity, text in list(self.messages) if severity in severities))

    return Collector()
