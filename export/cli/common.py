"""What the verbs share: exit codes, JSON output, the console and the progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import click

from scm_sdk.errors import ScmError

if TYPE_CHECKING:
    from scm_sdk.status import ModelStatus

Command = TypeVar("Command", bound=Callable[..., Any])


class _Failure(click.ClickException):
    """A ``ScmError`` as click shows it: one line, and the error's own exit code."""

    def __init__(self, error: ScmError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class ScmGroup(click.Group):
    """Shows a ``ScmError`` as one line; lets every other exception show its traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except ScmError as exc:
            raise _Failure(exc) from exc
        except KeyboardInterrupt:
            click.echo("Interrupted. Run the same command again to go on.", err=True)
            sys.exit(130)


def json_option(command: Command) -> Command:
    """Add ``--json``: machine-readable output on stdout, everything else on stderr."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def prompts_option(command: Command) -> Command:
    """Add ``--prompts``: what a model of prompts is told while it is measured or compared."""
    return click.option(
        "--prompts", type=click.Path(path_type=Path), metavar="FILE",
        help="Prompts, one a line, or a .safetensors file of the model's inputs; drawn at random when absent.",
    )(command)  # fmt: skip


def print_json(value: object) -> None:
    """Write a value as indented JSON to stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def say(text: str) -> None:
    """Write a line for people to stderr; stdout belongs to results."""
    click.echo(text, err=True)


def say_warnings(status: ModelStatus) -> None:
    """Write what forbids to take a model for a finished product to stderr, a line each."""
    for text in status.warnings:
        say(f"warning: {text}")


PLAIN_SECONDS = 30.0
"""Seconds between lines of progress where stderr is no terminal: a job's log, a file, a pipe."""


@contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar with count, rate and ETA on stderr; plain lines now and then where that is no terminal.

    Yields:
        ``update(completed, note="")``.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if hidden or not console.is_terminal:
        yield (lambda *_told: None) if hidden else _plain_progress(description, total)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done, note="")

        def update(completed: int, note: str | None = None) -> None:
            if note is not None:
                progress.update(task, note=note)
            progress.update(task, completed=completed)

        yield update


def _plain_progress(description: str, total: int) -> Callable[..., None]:
    """Return ``update`` of ``progress_bar``; it says a line when ``PLAIN_SECONDS`` have passed."""
    began = said = monotonic()
    first: int | None = None
    last_note = ""

    def update(completed: int, note: str | None = None) -> None:
        nonlocal first, said, last_note
        now, last_note = monotonic(), last_note if note is None else note
        first = completed if first is None else first  # a run that goes on does not begin at 0
        if now - said < PLAIN_SECONDS:
            return
        said = now
        rate = (completed - first) / (now - began)
        left = f", {_duration((total - completed) / rate)} left" if rate > 0 else ""
        say(f"{description}: {completed} of {total}, {_duration(now - began)} so far{left}  {last_note}".rstrip())

    return update


def _duration(seconds: float) -> str:
    """Return hours, minutes and seconds as H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))
