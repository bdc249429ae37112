"""The boundary of ``scm-export``: exit codes, signals, errors as one line, and the list of verbs in its help."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from scm_sdk._util.files import final_path
from scm_sdk.errors import ScmError

from .common import say, write_any_text
from .libraries import explain_import_error

EXIT_CODES: Mapping[int, str] = {
    0: "success",
    1: "a failure that no other code names: training, export, or a backend that failed while it ran",
    2: "wrong usage: an unknown option, value or label",
    3: "two backends differ by more than the gate allows",
    4: "a latency budget is exceeded",
    5: "an engine or a graph does not fit this GPU, system or library version",
    6: "a bundle is missing, damaged or cannot be written",
    7: "a library or device that the command needs is not on this machine",
    130: "interrupted by Ctrl-C (SIGINT)",
    143: "ended by SIGTERM",
}
"""Every exit code of the command and its meaning. The help and docs/commands.md repeat it; a test compares them."""
RESUMABLE = ("train", "distill", "all", "engine", "evaluate")
"""Verbs that keep what was done before an interruption and continue from it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM. A ``KeyboardInterrupt``, so that code that saves on Ctrl-C also saves here."""


class _Failure(click.ClickException):
    """A ``ScmError`` as click shows it: one line, and the exit code of the error."""

    def __init__(self, error: ScmError) -> None:
        super().__init__(final_path(str(error)))
        self.exit_code = error.exit_code  # type: ignore[misc]


class SummaryGroup(click.Group):
    """Lists each of its commands with the complete first sentence, which click cuts to a line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by name."""
        self.write_summaries(formatter, "Commands", self.list_commands(ctx))

    def write_summaries(self, formatter: click.HelpFormatter, title: str, names: Sequence[str]) -> None:
        """Write a section of the help, with these commands."""
        with formatter.section(title):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])


class ScmGroup(SummaryGroup):
    """Prints a ``ScmError`` as one line; any other exception keeps its traceback."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sections: dict[str, tuple[str, ...]] = {}

    def add_section(self, title: str, verbs: Sequence[click.Command]) -> None:
        """Add a section of verbs to the help."""
        for verb in verbs:
            self.add_command(verb)
        self.sections[title] = tuple(verb.name or "" for verb in verbs)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs by section."""
        for title, names in self.sections.items():
            self.write_summaries(formatter, title, names)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; ``version`` and ``help`` are options, not verbs."""
        if args[0] in ("version", "help"):
            ctx.fail(f"No such command {args[0]!r}. Did you mean --{args[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the verb."""
        write_any_text()
        with _signals() as received:
            try:
                return super().invoke(ctx)
            except ScmError as exc:
                # An interrupted library may raise its own error, as TensorRT's builder does.
                if received:
                    _exit_interrupted(ctx, received[0])
                raise _Failure(exc) from exc
            except ImportError as exc:
                error = explain_import_error(exc)
                if isinstance(error, ScmError):
                    raise _Failure(error) from exc
                raise
            except KeyboardInterrupt as exc:
                _exit_interrupted(ctx, signal.SIGTERM if isinstance(exc, Terminated) else signal.SIGINT)


def _exit_interrupted(ctx: click.Context, number: int) -> NoReturn:
    word = "Terminated" if number == signal.SIGTERM else "Interrupted"
    resumable = ctx.invoked_subcommand in RESUMABLE
    then = "Run the same command again to continue." if resumable else "If run again, it starts from the beginning."
    say(f"{word}. {then}")
    sys.exit(128 + number)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Raise on SIGINT and SIGTERM in the main thread, and note which came first; restore the handlers at the end.

    Yields:
        Numbers of the signals that came.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, for example in a service
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
