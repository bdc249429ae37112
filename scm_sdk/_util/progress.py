"""Progress of long operations: lines of text, some with a step count."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], object]
"""Called with a short text for each stage; the steps of a search are a ``Step``."""


class Step(str):
    """A line about one of several steps.

    Attributes:
        done: Completed steps, including this one.
        total: Total steps; an upper bound while a search decides its next steps.
    """

    done: int
    total: int

    def __new__(cls, text: str, done: int, total: int) -> Step:
        """Create a line with a step count."""
        self = super().__new__(cls, text)
        self.done, self.total = done, total
        return self


class Counter:
    """Counts the steps of a search and reports each.

    Args:
        report: Called with a ``Step`` for each step.
        total: Number of expected steps.
    """

    def __init__(self, report: Progress, total: int) -> None:
        self._report, self.done, self._left = report, 0, total

    def expect(self, left: int) -> None:
        """Set the maximum number of remaining steps."""
        self._left = left

    def step(self, text: str) -> None:
        """Report a completed step."""
        self.done, self._left = self.done + 1, max(0, self._left - 1)
        self._report(Step(text, self.done, self.done + self._left))
