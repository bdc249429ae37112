"""The names that a pickle may contain, and the stand-ins for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import BundleError

MAX_STEPS = 3_000_000
"""Instructions in one file; EDM's largest networks take a tenth of that."""


@dataclass(frozen=True)
class Allowed:
    """What stands in for one global.

    Attributes:
        call: Makes the stand-in of ``global(*args)``; None where the global is never called.
        new: Makes the stand-in of ``global.__new__(global)``; None where that is not allowed.
    """

    call: Callable[..., Any] | None = None
    new: Callable[[], Any] | None = None


class Buildable:
    """A stand-in that may be given a state, once."""

    def build(self, state: Any) -> None:
        """Take the state that the pickle gives.

        Raises:
            ValueError: If it is not of the form that this stand-in knows.
        """
        raise ValueError("takes no state")


@dataclass(frozen=True)
class Known:
    """An allowed global on the stack."""

    name: str
    allowed: Allowed


@dataclass
class Budget:
    """Steps that are left, shared by the pickles inside a pickle."""

    steps: int = MAX_STEPS

    def spend(self, where: str) -> None:
        """Take one step.

        Raises:
            BundleError: If there is none left.
        """
        self.steps -= 1
        if self.steps < 0:
            raise BundleError(
                f"{where} takes more than {MAX_STEPS} instructions, more than any network needs. It is refused; "
                "do not open it with Python's pickle either."
            )
