"""Progress of long work: lines of text, some of which count the steps of a search."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], object]
"""Called with a few words for each stage; the steps of a search are a ``Step``."""


class Step(str):
    """A line about one of several steps.

    Attributes:
        done: Steps done, this one included.
        total: Steps in all; an upper bound while a search decides what it looks at next.
    """

    done: int
    total: int

    def __new__(cls, text: str, done: int, total: int) -> Step:
        """Make a line that counts."""
        self = super().__new__(cls, text)
        self.done, self.total = done, total
        return self


class Counter:
    """Counts the steps of a search and reports each.

    Args:
        report: Called with a ``Step`` for each.
        total: Steps that are expected.
    """

    def __init__(self, report: Progress, total: int) -> None:
        self._report, self.done, self._left = report, 0, total

    def expect(self, left: int) -> None:
        """Say how many steps are left at most."""
        self._left = left

    def step(self, text: str) -> None:
        """Report that a step was done."""
        self.done, self._left = self.done + 1, max(0, self._left - 1)
        self._report(Step(text, self.done, self.done + self._left))
