"""The exceptions of scm-sdk.

Catch ``ScmError`` to catch all of them. Each message states what was found, what was expected and what to do. Each
class carries the exit code of the command line. An exception that is not a ``ScmError`` is a bug: please report it.

::

    ScmError
    ├── ConfigError                  an argument or a setting is invalid
    │   └── UnknownArgument          a call has an unknown or misspelled argument; also a TypeError
    ├── ShapeError                   a tensor has the wrong shape or dtype
    ├── BundleError                  a bundle on disk cannot be used
    │   ├── IntegrityError           a file is missing, altered or truncated
    │   └── SchemaError              the manifest is malformed or from a newer version
    ├── BackendError                 a backend cannot run
    │   ├── BackendUnavailable       its library or device is not on this machine
    │   ├── BackendFailure           its library raised while it ran
    │   ├── QueueFull                the queue of a batcher is full
    │   └── IncompatibleEngineError  an engine was built for another GPU or version
    ├── ExportError                  a network could not be converted to a graph
    │   └── UnsupportedGraphError    the graph has an operator that a target cannot run
    ├── ParityError                  two backends differ by more than the gate allows
    ├── LatencyError                 a measured latency exceeds its budget
    └── TrainError                   training cannot start or continue
"""

from __future__ import annotations

import re
from typing import ClassVar

_LONGEST = 4000
"""Maximum characters of a message: a value from an untrusted file may be megabytes long."""
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Escape the control codes and direction changes that a terminal would execute in untrusted text."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class ScmError(Exception):
    """Base class of every exception that scm-sdk raises."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the message in printable form; the middle of a message over 4,000 characters is cut."""
        text = super().__str__()
        half = _LONGEST // 2
        return printable(text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}")


class ConfigError(ScmError):
    """An argument or a setting is invalid."""

    exit_code = 2


class UnknownArgument(ConfigError, TypeError):
    """A call has an unknown or misspelled argument. Also a ``TypeError``."""


class ShapeError(ScmError):
    """A tensor has the wrong shape or dtype."""

    exit_code = 2


class BundleError(ScmError):
    """A bundle on disk cannot be used."""

    exit_code = 6


class IntegrityError(BundleError):
    """A file of a bundle is missing, altered or truncated."""


class SchemaError(BundleError):
    """The manifest is malformed or from a newer version of this package."""


class BackendError(ScmError):
    """A backend cannot run, or failed while it ran."""

    exit_code = 7


class BackendUnavailable(BackendError):
    """The library or device that a backend needs is not on this machine."""


class BackendFailure(BackendError):
    """The library of a backend raised an error while it ran."""

    exit_code = 1


class QueueFull(BackendError):
    """The queue of a batcher is full; the same request may succeed later."""

    exit_code = 1


class IncompatibleEngineError(BackendError):
    """An engine was built for another GPU, library version or operating system."""

    exit_code = 5


class ExportError(ScmError):
    """A network could not be converted to a graph."""


class UnsupportedGraphError(ExportError):
    """The graph has an operator or a type that the target cannot run."""

    exit_code = 5


class ParityError(ScmError):
    """Two backends differ by more than the gate allows."""

    exit_code = 3


class LatencyError(ScmError):
    """A measured latency exceeds its budget."""

    exit_code = 4


class TrainError(ScmError):
    """Training cannot start or continue."""
