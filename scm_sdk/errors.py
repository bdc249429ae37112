"""Every exception this package raises on purpose.

* ScmError
  - ConfigError              a value we were given breaks its contract
    - UnknownArgument        a call's arguments are not those of the function; also a TypeError
  - ShapeError               a tensor has the wrong shape or dtype
  - BundleError              a bundle on disk cannot be used
    - IntegrityError         a file is missing, altered or truncated
    - SchemaError            the manifest is malformed or from a newer version
  - BackendError
    - BackendUnavailable     the backend's library or device is not here
    - BackendFailure         the backend ran and its library raised
    - QueueFull              more waits for the backend than may wait
    - IncompatibleEngineError  an engine was built for another GPU or version
  - ExportError              a network could not be turned into a graph
    - UnsupportedGraphError  the graph holds what a target cannot run
  - ParityError              two backends disagree beyond their tolerance
  - LatencyError             a measured latency is over its budget
  - TrainError               training cannot start or go on

Each message says three things: what was found, what was expected, what to do next.
Each class carries the exit code with which the command line ends.
Anything that is not a ``ScmError`` is a bug in this package: please report it.
"""

from __future__ import annotations

import re
from typing import ClassVar

_LONGEST = 4000
"""Characters of a message. A value of an untrusted file may be megabytes long, and a message repeats it."""
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text of an untrusted file with what a terminal obeys escaped: control codes and changes of direction."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class ScmError(Exception):
    """Base class: catch this to catch everything raised on purpose."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the message, printable, and without the middle of one that is longer than a page."""
        text = super().__str__()
        half = _LONGEST // 2
        return printable(text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}")


class ConfigError(ScmError):
    """A value we were given breaks its contract."""

    exit_code = 2


class UnknownArgument(ConfigError, TypeError):
    """A call's arguments are not those of the function."""


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
    """A backend cannot run or did not run well."""

    exit_code = 7


class BackendUnavailable(BackendError):
    """The library or the device that a backend needs is not on this machine."""


class BackendFailure(BackendError):
    """A backend ran and its own library raised."""

    exit_code = 1


class QueueFull(BackendError):
    """More images wait for a backend than may wait; the same request may succeed later."""

    exit_code = 1


class IncompatibleEngineError(BackendError):
    """An engine was built for another GPU, another library version or another system."""

    exit_code = 5


class ExportError(ScmError):
    """A network could not be turned into a graph."""


class UnsupportedGraphError(ExportError):
    """The graph holds an operator or a type that the target cannot run."""

    exit_code = 5


class ParityError(ScmError):
    """Two backends disagree beyond their tolerance."""

    exit_code = 3


class LatencyError(ScmError):
    """A measured latency is over its budget."""

    exit_code = 4


class TrainError(ScmError):
    """Training cannot start or cannot go on."""
