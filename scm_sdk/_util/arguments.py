"""Check the names of keyword arguments, and suggest the nearest name for an unknown one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import ParamSpec, TypeVar

from ..errors import UnknownArgument

P = ParamSpec("P")
R = TypeVar("R")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a sentence with the known name that is nearest to a wrong one, or with all of them if none is near."""
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}."


def nearest_hint(name: object, known: Iterable[str]) -> str:
    """Return a sentence with the known name that is nearest to a wrong one, after a space; "" if none is near."""
    close = get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def check_names(given: Iterable[object], known: Sequence[str], *, of: str) -> None:
    """Raise ``UnknownArgument`` if a keyword is none of a function's; the message suggests the nearest one."""
    for name in given:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UnknownArgument(f"{of} got {name!r}, expected one of its arguments. {hint}")


def checked_names(of: str, *options: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function or method refuse an unknown keyword with ``UnknownArgument``, as ``check_names`` does.

    Type checkers see the function's own signature.

    Args:
        of: What the message calls the function.
        *options: Each ``TypedDict`` that the function unpacks into keywords.
    """
    unpacked = tuple(name for kind in options for name in kind.__annotations__)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = (
            tuple(
                name
                for name, parameter in signature(function).parameters.items()
                if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
                and name not in ("self", "cls")
            )
            + unpacked
        )

        @wraps(function)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            check_names(keywords, known, of=of)
            return function(*args, **keywords)

        return checked

    return decorate
