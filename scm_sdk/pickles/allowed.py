"""Allowed globals of a pickle, and their placeholders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import BundleError

MAX_STEPS = 3_000_000
"""Maximum number of instructions in one file; EDM's largest networks need a tenth."""


@dataclass(frozen=True)
class Allowed:
    """Placeholder of one global.

    Attributes:
        call: Returns the placeholder of ``global(*args)``; None if calls are not allowed.
        new: Returns the placeholder of ``global.__new__(global)``; None if it is not allowed.
    """

    call: Callable[..., Any] | None = None
    new: Callable[[], Any] | None = None


class Buildable:
    """A placeholder that accepts a state once."""

    def build(self, state: Any) -> None:
        """Set the state from the pickle.

        Raises:
            ValueError: If the state has another form.
        """
        raise ValueError("takes no state")


@dataclass(frozen=True)
class Known:
    """An allowed global on the stack."""

    name: str
    allowed: Allowed


@dataclass
class Budget:
    """Remaining instructions, shared by nested pickles."""

    steps: int = MAX_STEPS

    def spend(self, where: str) -> None:
        """Count one instruction.

        Raises:
            BundleError: If none are left.
        """
        self.steps -= 1
        if self.steps < 0:
            raise BundleError(
                f"{where} takes more than {MAX_STEPS} instructions, more than any network needs. It is refused; "
                "do not open it with Python's pickle either."
            )
