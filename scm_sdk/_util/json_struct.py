"""JSON of msgspec structs: one layout for files, and one list of what an untrusted text can raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

import msgspec

from ..errors import SchemaError, ScmError

if TYPE_CHECKING:
    from typing_extensions import Self

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


class JsonFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a JSON file, each of whose fields is checked.

    Attributes:
        TITLE: What error messages call the file.
        REMEDY: What to do if it cannot be read, a sentence.
        ERROR: What is raised then.
    """

    TITLE: ClassVar[str]
    REMEDY: ClassVar[str]
    ERROR: ClassVar[type[ScmError]] = SchemaError

    def to_json(self) -> bytes:
        """Return indented JSON that ``from_json`` reads back to an equal value."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse the file.

        Raises:
            ScmError: ``ERROR``, if it is not JSON or violates the schema.
        """
        return from_json(data, cls, lambda exc: cls.ERROR(f"{cls.TITLE} cannot be read: {exc}. {cls.REMEDY}"))
