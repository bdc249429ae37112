"""Run commands of ``scm-export`` in forked processes that die at a file-system event, or that others kill.

One process that has imported everything forks the commands, so that each of them really dies.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RENAMES_AND_FSYNCS = frozenset({"os.rename", "os.fsync"})
EVERY_CHANGE = RENAMES_AND_FSYNCS | {
    "open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "os.utime"
}  # fmt: skip
"""Audit events before which a process may die; ``open`` only where it is for writing."""


@dataclass
class Child:
    """A forked process.

    Attributes:
        pid: Its process id.
        counted: Read end of a pipe to which it writes how many events it has seen, when it ends by itself.
    """

    pid: int
    counted: int
    _code: int | None = field(default=None)

    def wait(self) -> int:
        """Return its exit code; -9 if it was killed."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def ended(self) -> bool:
        """Return whether it has ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def kill(self) -> None:
        """End it at once."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)

    def events(self) -> int:
        """Return how many events a child that ended by itself has seen."""
        self.wait()
        with os.fdopen(self.counted, "rb") as stream:
            return int(stream.read() or b"0")


def fork(
    action: Callable[[], Any],
    *,
    die_at: int = 0,
    events: Collection[str] = EVERY_CHANGE,
    output: Path | None = None,
) -> Child:
    """Run an action in a forked process that dies by SIGKILL just before its ``die_at``-th event.

    Args:
        action: What it does; the process ends with 0 if it returns, with 1 if it raises.
        die_at: Number of the event, from 1; 0 is never.
        events: Audit events that count, and ``os.fsync``, which Python does not report.
        output: File for what it writes.
    """
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return Child(pid, reading)
    os.close(reading)
    seen, code = 0, 1
    try:
        if output is not None:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in events and (event != "open" or _writes(arguments)):
                seen += 1
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        fsync = os.fsync

        def counted_fsync(handle: Any) -> None:
            count("os.fsync", ())
            fsync(handle)

        os.fsync = counted_fsync
        sys.addaudithook(count)
        action()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os.write(writing, b"%d" % seen)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wxa+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def command(arguments: list[str]) -> Callable[[], None]:
    """Return an action that runs ``scm-export`` with these arguments."""

    def run() -> None:
        from scm_sdk.export.cli import main

        main(arguments)

    return run
