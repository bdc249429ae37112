"""JSON of msgspec structs: one layout for files, and one list of what an untrusted text can raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from ..errors import ScmError

Value = TypeVar("Value")
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Exceptions of ``msgspec.json.decode`` for a text that is not JSON or does not have the type."""


def to_json(value: object) -> bytes:
    """Return indented JSON with a newline at its end, one line for each field."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def from_json(text: str | bytes, kind: type[Value], refuse: Callable[[Exception], ScmError]) -> Value:
    """Parse JSON of a type.

    Args:
        text: The JSON.
        kind: The type.
        refuse: Returns the exception that is raised for a text that cannot be read.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except UNREADABLE as exc:
        raise refuse(exc) from exc
