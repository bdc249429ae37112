"""What long work reports: stages, steps, results, and what was skipped.

Every function that runs for more than a moment takes ``events``, one object for everything that it reports. ``Silent``
ignores all of it and is what to subclass; ``EventLines`` writes each event as a line, ``ProgressBar`` shows the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import TaskID


@runtime_checkable
class Events(Protocol):
    """Receives what long work reports, in the order in which it happens, on the thread that does the work.

    An exception that a method raises ends the work as Ctrl-C does: nothing half-made is left behind.
    """

    def stage(self, title: str, /) -> None:
        """A stage of the work begins; ``title`` is a few words, such as ``trace the network``."""

    def step(self, text: str, done: int, total: int, /) -> None:
        """One of the steps of a stage is done.

        Args:
            text: What was done or found, or what is counted.
            done: Steps done, this one included.
            total: Steps in all; an upper bound while a search decides what it looks at next.
        """

    def result(self, made: object, /) -> None:
        """Something is ready, such as a ``Variant``, an ``EngineVariant`` or a ``Parity``; ``str`` describes it."""

    def skip(self, reason: str, /) -> None:
        """Something that was asked for is left out, since it cannot be made or run here."""

    def note(self, text: str, /) -> None:
        """Something that a person may want to know."""


class Silent:
    """Ignores every event; subclass it and override what you need."""

    def stage(self, title: str, /) -> None:
        """See ``Events.stage``."""

    def step(self, text: str, done: int, total: int, /) -> None:
        """See ``Events.step``."""

    def result(self, made: object, /) -> None:
        """See ``Events.result``."""

    def skip(self, reason: str, /) -> None:
        """See ``Events.skip``."""

    def note(self, text: str, /) -> None:
        """See ``Events.note``."""


SILENT: Events = Silent()
"""The default of ``events``."""


class EventLines(Silent):
    """Writes each event as one line; ``EventLines(print)`` shows all of them.

    Args:
        write: Called with each line.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def stage(self, title: str, /) -> None:
        """Write the title."""
        self._write(title)

    def step(self, text: str, done: int, total: int, /) -> None:
        """Write the counts and the text."""
        self._write(f"{done} of {total}: {text}")

    def result(self, made: object, /) -> None:
        """Write what ``str`` says of it."""
        self._write(str(made))

    def skip(self, reason: str, /) -> None:
        """Write the reason."""
        self._write(f"skip {reason}")

    def note(self, text: str, /) -> None:
        """Write the text."""
        self._write(text)


class ProgressBar(Silent):
    """Shows the steps of each stage as a bar on stderr, inside a ``with`` statement.

    ``with ProgressBar() as bar: gen(100, events=bar)``
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        title = TextColumn("{task.description}", markup=False)
        self._bars = Progress(
            title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        )
        self._title = ""
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bars.stop()

    def stage(self, title: str, /) -> None:
        """Give the steps that follow a bar of their own."""
        self._title, self._task = title, None

    def step(self, text: str, done: int, total: int, /) -> None:
        """Move the bar."""
        if self._task is None:
            self._task = self._bars.add_task(self._title or text, total=total)
        self._bars.update(self._task, completed=done, total=total)


class Counter:
    """Counts the steps of a search and reports each.

    Args:
        events: Receives the steps.
        total: Steps that are expected.
    """

    def __init__(self, events: Events, total: int) -> None:
        self._events, self.done, self._left = events, 0, total

    def expect(self, left: int) -> None:
        """Say how many steps are left at most."""
        self._left = left

    def step(self, text: str) -> None:
        """Report that a step was done."""
        self.done, self._left = self.done + 1, max(0, self._left - 1)
        self._events.step(text, self.done, self.done + self._left)
