"""Output that the verbs share: text on stderr, one JSON document on stdout, tables and progress."""

from __future__ import annotations

import codecs
import functools
import json
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from scm_sdk._util.events import Silent
from scm_sdk._util.files import final_path
from scm_sdk.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from scm_sdk.bundle.status import ModelStatus

Command = TypeVar("Command", bound=Callable[..., Any])

_WIDE = 1000
"""Columns of a table that is written to a file or a pipe: wide enough that nothing is cut."""
_ASCII = {"→": "->", "×": "x", "–": "-", "±": "+-"}
_results: TextIO | None = None


def json_option(command: Command) -> Command:
    """Add ``--json``: stdout holds exactly one JSON document, whatever a library prints goes to stderr.

    An error is not JSON: it is text on stderr and an exit code, and stdout stays empty unless the command has a result
    to judge, as ``validate``.
    """

    @functools.wraps(command)
    def with_json(*args: Any, as_json: bool, **options: Any) -> Any:
        if not as_json:
            return command(*args, as_json=False, **options)
        with _stdout_for_results():
            return command(*args, as_json=True, **options)

    option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    return option(with_json)  # type: ignore[return-value]


@contextmanager
def _stdout_for_results() -> Iterator[None]:
    """Keep stdout for ``print_json``; what Python code and C libraries print meanwhile goes to stderr."""
    global _results
    outer, stdout = _results, sys.stdout
    stdout.flush()
    try:
        saved = os.dup(1) if stdout.fileno() == 1 else None
    except (OSError, ValueError):  # an object of Python's, as in tests and notebooks
        saved = None
    try:
        with redirect_stdout(sys.stderr):
            if saved is None:
                _results = stdout
                yield
            else:
                os.dup2(2, 1)
                with os.fdopen(os.dup(saved), "w", encoding="utf-8") as _results:
                    yield
    finally:
        _results = outer
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def print_json(value: object) -> None:
    """Write a value as indented JSON to stdout."""
    click.echo(final_path(json.dumps(value, indent=2, default=str)), file=_results)


def say(text: str) -> None:
    """Write a line for people to stderr; stdout belongs to results."""
    click.echo(final_path(printable(text)), err=True)


class _LogLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.name}: {record.getMessage()}")


@contextmanager
def log_lines() -> Iterator[None]:
    """Write the package's log, everything from debug on, to stderr."""
    package, handler = logging.getLogger("scm_sdk"), _LogLines()
    before = package.level
    package.addHandler(handler)
    package.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 image``, ``2 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def prompts_option(command: Command) -> Command:
    """Add ``--prompts``: the conditioning of a text model while it is measured or compared."""
    return click.option(
        "--prompts", type=click.Path(path_type=Path), metavar="FILE",
        help="File of prompts, one per line, or .safetensors file of the model's inputs; default: random inputs.",
    )(command)  # fmt: skip


def timed_batches_option(command: Command) -> Command:
    """Add ``--batch``: the batch sizes that are timed."""
    return click.option(
        "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8, 32),
        help="Batch size to time, images; may be repeated.",
    )(command)  # fmt: skip


def make_console(*, stderr: bool = False) -> Console:
    """Return the console that tables and progress are printed on; the only place that makes one.

    It colors no numbers, reads no markup, and is as wide as its content where the output is no terminal (COLUMNS sets
    another width).
    """
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _WIDE
    return console


def make_table(*headers: str, title: str = "") -> Table:
    """Return an empty table whose cells are printable; ``print_table`` fits it to the terminal."""
    from rich.table import Table

    class Printable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    table = Printable(box=None, title=title or None)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Write a table to stdout: lines are broken between words, and a table too wide for that becomes a list."""
    console, title = make_console(), str(table.title or "")
    table.title = None  # rich would break it where the table ends
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    widths = _column_widths(columns, console.width)
    if widths is None:
        lines = _as_list(columns)
    else:
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().splitlines()]
    click.echo(final_path("\n".join([title, *lines] if title else lines)))


def _column_widths(columns: list[list[str]], width: int) -> list[int] | None:
    """Return the widths of a table that breaks no word, the widest columns narrowed first; None if there are none."""
    from rich.cells import cell_len

    longest = [max(map(cell_len, cells)) for cells in columns]
    words = [max((cell_len(word) for cell in cells for word in cell.split()), default=0) for cells in columns]
    room = width - 2 * len(columns)  # a space on either side of a cell
    for limit in range(max(longest), 0, -1):
        widths = [min(most, max(word, limit)) for most, word in zip(longest, words, strict=True)]
        if sum(widths) <= room:
            return widths
    return None


def _as_list(columns: list[list[str]]) -> list[str]:
    """Return the lines of a table as a list: the first cell of each row, and a line for each other one below it."""
    (_, *names), *others = columns
    lines: list[str] = []
    indent = max((len(header) for header, *_ in others), default=0)
    for row, name in enumerate(names, start=1):
        lines += [f" {name}", *(f"   {cells[0]:<{indent}}  {cells[row]}".rstrip() for cells in others if cells[row])]
    return lines


def write_any_text() -> None:
    """Make stdout and stderr accept characters outside their encoding, which are written as ASCII or as escapes."""
    codecs.register_error("scm-export", _replace_character)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="scm-export")


def _replace_character(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = "".join(_ASCII.get(c) or unicodedata.normalize("NFKD", c) for c in characters)
    known = "".join(c for c in plain if c.isascii())
    return known or characters.encode("ascii", "backslashreplace").decode(), error.end


def say_warnings(status: ModelStatus) -> None:
    """Write the reasons why a model is no finished product to stderr, one per line."""
    for text in status.warnings:
        say(f"warning: {text}")


PLAIN_SECONDS = 30.0
"""Seconds between lines of progress where stderr is no terminal: a job's log, a file, a pipe."""


@contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar with count, rate and ETA on stderr; plain lines now and then where that is no terminal.

    Yields:
        ``update(completed, note=None, total=None)``; what is None stays as it is.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = make_console(stderr=True)
    if hidden or not console.is_terminal:
        yield (lambda *_told: None) if hidden else _plain_progress(description, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done, note="")

        def update(completed: int, note: str | None = None, total: int | None = None) -> None:
            if note is not None:
                progress.update(task, note=note)
            progress.update(task, completed=completed, total=total)

        yield update


def _plain_progress(description: str, total: int) -> Callable[..., None]:
    """Return ``update`` of ``progress_bar``, which writes a line every ``PLAIN_SECONDS``."""
    began = said = monotonic()
    first: int | None = None
    last_note = ""

    def update(completed: int, note: str | None = None, new_total: int | None = None) -> None:
        nonlocal first, said, last_note, total
        total = new_total or total
        now, last_note = monotonic(), last_note if note is None else note
        first = completed if first is None else first  # a resumed run does not begin at 0
        if now - said < PLAIN_SECONDS:
            return
        said = now
        rate = (completed - first) / (now - began)
        left = f", {_duration((total - completed) / rate)} left" if rate > 0 else ""
        say(f"{description}: {completed:,} of {total:,}, {_duration(now - began)} so far{left}  {last_note}".rstrip())

    return update


class TerminalEvents(Silent):
    """Shows events on stderr: a line each, and one bar for the steps of a stage. Close it, or use ``with``.

    Args:
        indent: What each line begins with.
        title: Title of the bar of work that reports no stage.
        total: Steps of such work; its bar is shown from the start.
        show_results: Whether results are shown; they are collected in any case.
        hide_bars: Whether steps are not shown.

    Attributes:
        results: What was made, in order.
        skipped: Why something was left out, in order.
    """

    def __init__(
        self,
        indent: str = "  ",
        *,
        title: str = "working",
        total: int | None = None,
        show_results: bool = True,
        hide_bars: bool = False,
    ) -> None:
        self._indent, self._show_results, self._hide_bars = indent, show_results, hide_bars
        self._bar, self._stage = ExitStack(), title
        self._update: Callable[..., None] | None = None
        self._total = total
        self.results: list[Any] = []
        self.skipped: list[str] = []

    def __enter__(self) -> TerminalEvents:
        if self._total is not None:
            self._open_bar(self._total)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._line("")

    def stage(self, title: str, /) -> None:
        """Write the title; later steps belong to it."""
        self._stage = title
        self._line(f"{title} …")

    def step(self, text: str, done: int, total: int, /) -> None:
        """Move the bar of the stage, or write a line now and then where stderr is no terminal."""
        (self._update or self._open_bar(total))(done, text, total)

    def result(self, made: object, /) -> None:
        """Collect the result and write it as ``str`` does."""
        self.results.append(made)
        self._line(str(made) if self._show_results else "")

    def skip(self, reason: str, /) -> None:
        """Collect and write the reason."""
        self.skipped.append(reason)
        self._line(f"skip  {reason}")

    def note(self, text: str, /) -> None:
        """Write the text."""
        self._line(f"      {text}")

    def _open_bar(self, total: int) -> Callable[..., None]:
        bar = progress_bar(f"{self._indent}{self._stage}", total, hidden=self._hide_bars)
        self._update = self._bar.enter_context(bar)
        return self._update

    def _line(self, text: str) -> None:
        self._bar.close()
        self._update = None
        if text:
            say(f"{self._indent}{text}")


def passed_and_skipped(results: Sequence[object], events: TerminalEvents) -> str:
    """Return how many comparisons passed, and how many had nothing to run on here."""
    return f"{plural(sum(map(bool, results)), 'comparison')} passed, {len(events.skipped)} skipped"


def _duration(seconds: float) -> str:
    """Return hours, minutes and seconds as H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))
