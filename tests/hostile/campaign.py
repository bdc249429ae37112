"""Run hostile cases in worker processes and count their outcomes.

``run_campaign`` names an entry point, ``MODULE:FUNCTION``. Each worker process calls it once as
``FUNCTION(setup, scratch)``; what it returns is called with each case and says what became of it:

* it returns: the program did what is right;
* it raises a ``ScmError``: the case was refused;
* it raises ``Silent``: the program accepted something and did something else;
* it raises anything else: a foreign exception;
* the worker dies: a crash; its memory, open files and processor time are limited;
* the deadline passes: the worker hangs;
* files that were not there before the case remain in ``scratch``, or it raises ``Left``: something was left behind.

A worker runs many cases; after a crash or a hang a new one continues with the next case.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKERS = int(os.environ.get("SCM_HOSTILE_WORKERS", "2"))
SEED = int(os.environ.get("SCM_HOSTILE_SEED", "0"))
"""Of the random cases, so that a run can be repeated and another one can look elsewhere."""
FAULTS = ("silent", "foreign", "crashed", "hung", "left")
"""Outcomes that fail a class."""
ACCEPTED: Mapping[str, str] = {
    "forged graphs: ['pads_of_2_40', 'openvino']": "OpenVINO 2026.4 crashes when it computes a pad by 2^40 values",
    "forged graphs: ['nodes_20000', 'openvino']": "OpenVINO 2026.4 takes minutes for 20,000 operators in a row",
    "environments: ['8 open files', 'precision']": "no file is left to open to walk a hidden folder; the next command "
    "removes it",
}
"""Cases that may end in a fault, as ``CLASS: CASE``, each with the reason; SECURITY.md lists them, too."""
_MEMORY = "/dev/shm"
"""A file system in memory: thousands of cases write and flush megabytes."""
_TELL_SECONDS = 30.0
_EXAMPLES = 20
"""Faults of a class that are described; all are counted."""


class Silent(Exception):
    """The program accepted a case and did something else than what is right."""


class Left(Exception):
    """Files remain that nothing will take away."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker may take.

    Attributes:
        cpu_seconds: Processor time of one case, after which it counts as hung.
        wall_seconds: Time of one case that waits for something that never comes.
        memory_bytes: Address space beyond what the worker has when it is ready.
        open_files: Number of file descriptors.
    """

    cpu_seconds: float = 20.0
    wall_seconds: float = 120.0
    memory_bytes: int = 2 << 30
    open_files: int = 256


@dataclass(kw_only=True)
class Tally:
    """Outcomes of one class of cases.

    Attributes:
        name: The class.
        counts: How often each outcome was seen.
        faults: Descriptions of the first of them that fail the class.
    """

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, outcome: str, case: object = "", detail: str = "") -> str:
        """Count an outcome and describe it if it is a fault; return it, or ``accepted``."""
        if outcome in FAULTS and f"{self.name}: {case}" in ACCEPTED:
            outcome = "accepted"
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        if outcome in FAULTS and len(self.faults) < _EXAMPLES:
            self.faults.append(f"{outcome}: {case}: {detail}")
        return outcome

    @property
    def tried(self) -> int:
        """Number of cases."""
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        """Number of cases with a fault."""
        return sum(self.counts.get(outcome, 0) for outcome in FAULTS)


def run_campaign(
    name: str,
    entry: str,
    cases: Iterable[Any],
    *,
    setup: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    workers: int = WORKERS,
) -> Tally:
    """Run cases in worker processes.

    Args:
        name: Name of the class in the table.
        entry: ``MODULE:FUNCTION`` that a worker calls; see above.
        cases: JSON values.
        setup: JSON values that each worker gets.
        limits: What a worker may take.
        workers: How many run concurrently.
    """
    tally, lock, left = Tally(name=name), threading.Lock(), iter(cases)
    told = time.monotonic()

    def tell(tally: Tally, outcome: str, what: str) -> None:
        """Print faults as they come, and from time to time how far it is; ``pytest -s`` shows it."""
        nonlocal told
        if outcome in FAULTS:
            print(f"{name}: {outcome}: {what}", flush=True)
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            print(f"{name}: {tally.tried} tried, {tally.failed} faults", flush=True)

    def feed() -> None:
        worker = None
        try:
            while True:
                with lock:
                    case = next(left, _END)
                if case is _END:
                    return
                if worker is None:
                    worker = Worker(entry, setup or {}, limits or Limits())
                outcome, detail = worker.judge(case)
                with lock:
                    tell(tally, tally.add(outcome, case, detail), f"{case}: {detail}")
                if outcome in ("crashed", "hung"):
                    worker.close()
                    worker = None
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=feed) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


_END = object()


class Worker:
    """A process that judges one case after the other."""

    def __init__(self, entry: str, setup: Mapping[str, Any], limits: Limits) -> None:
        self.limits = limits
        self.home = Path(tempfile.mkdtemp(prefix="scm-hostile-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))
        (self.home / "scratch").mkdir()
        self.errors = (self.home / "stderr").open("w+b")
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = {"entry": entry, "setup": dict(setup), "limits": vars(limits), "answers": theirs.fileno()}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hostile.campaign", json.dumps(arguments)],
                cwd=self.home / "scratch",
                env=worker_environment(self.home / "scratch"),
                stdin=subprocess.DEVNULL,
                stdout=self.errors,
                stderr=self.errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.answers = ours
        self._rest = b""
        if (ready := self._answer(300.0, 600.0)) != {"ready": True}:
            said = self._said()
            self.close()
            raise RuntimeError(f"a worker of {entry} does not start: {ready} {said}")

    def judge(self, case: Any) -> tuple[str, str]:
        """Return the outcome of one case, and what there is to say about it."""
        self.answers.sendall(json.dumps(case).encode() + b"\n")
        answer = self._answer(self.limits.cpu_seconds, self.limits.wall_seconds)
        if isinstance(answer, str):
            return answer, self._said()
        return answer["outcome"], answer["detail"]

    def _answer(self, cpu_seconds: float, wall_seconds: float) -> Any:
        start, spent = time.monotonic(), self._processor_time()
        while b"\n" not in self._rest:
            readable, _, _ = select.select([self.answers], [], [], 0.5)
            if readable:
                try:
                    data = self.answers.recv(1 << 16)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return "crashed"
                self._rest += data
            elif self._processor_time() - spent > cpu_seconds or time.monotonic() - start > wall_seconds:
                return "hung"
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _processor_time(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def _said(self) -> str:
        """Return the end of what the worker wrote, with its exit code if it ended."""
        try:
            code = self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            code = None
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 2000))
        text = self.errors.read().decode(errors="replace").strip()
        return f"exit code {code}; {text[-500:]}"

    def close(self) -> None:
        """End the process and remove its files."""
        self.answers.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()
        shutil.rmtree(self.home, ignore_errors=True)


def worker_environment(scratch: Path) -> dict[str, str]:
    """Return the environment of a process whose cache, home and temporary files are in ``scratch``."""
    (scratch / "tmp").mkdir(exist_ok=True)
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("SCM_", "PYTEST_"))},
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "HOME": str(scratch),
        "SCM_CACHE_DIR": str(scratch / "cache"),
        "TMPDIR": str(scratch / "tmp"),
    }


def left_behind(scratch: Path, before: set[str]) -> list[str]:
    """Return what is in a folder and was not there before; in the cache only what no reader will ever find."""
    found = sorted(listing(scratch) - before)
    kept = ("cache", "tmp/scm-sdk-", "tmp/torchinductor", ".cache", "intel")  # the last four are libraries'
    return [name for name in found if not name.startswith(kept) or name.endswith((".partial", ".old", ".removed"))]


def listing(folder: Path) -> set[str]:
    """Return the relative paths of everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _serve(arguments: Mapping[str, Any]) -> None:
    """Judge the cases that come, until no more come."""
    answers = socket.socket(fileno=arguments["answers"])
    scratch, limits = Path.cwd(), Limits(**arguments["limits"])
    module, _, function = arguments["entry"].partition(":")
    attempt = getattr(importlib.import_module(module), function)(arguments["setup"], scratch)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.open_files,) * 2)
    answers.sendall(b'{"ready": true}\n')
    before = listing(scratch)
    for line in answers.makefile("r", encoding="utf-8"):
        outcome, detail = judge(attempt, json.loads(line))
        left = left_behind(scratch, before)
        if left and outcome in ("right", "refused"):
            outcome, detail = "left", f"{', '.join(left[:5])} after: {outcome} {detail}"
        for name in reversed(left):
            path = scratch / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        answers.sendall(json.dumps({"outcome": outcome, "detail": detail}).encode() + b"\n")


def judge(attempt: Callable[[Any], object], case: Any) -> tuple[str, str]:
    """Return what became of one case."""
    from scm_sdk.errors import ScmError

    try:
        attempt(case)
    except ScmError as exc:
        return check_message(str(exc))
    except Silent as exc:
        return "silent", str(exc)
    except Left as exc:
        return "left", str(exc)
    except BaseException as exc:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        return "foreign", f"{type(exc).__name__}: {str(exc)[-800:]} ({where.filename}:{where.lineno})"
    return "right", ""


def commands(text: str) -> list[str]:
    """Return the characters of a text that control a terminal or change the direction of what follows."""
    direction = {"ALM", "LRM", "RLM", "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    control = {c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"}
    return sorted(control | {c for c in text if unicodedata.bidirectional(c) in direction})


def check_message(text: str) -> tuple[str, str]:
    """Return the outcome of a refusal: a message may not be a page long or control a terminal."""
    if len(text) > 20_000:
        return "silent", f"the refusal has {len(text)} characters: {text[:200]}"
    if odd := commands(text):
        return "silent", f"the refusal holds {odd[:5]}: {text[:200]!r}"
    return "refused", text[:300]


if __name__ == "__main__":
    # Under its own name, so that what the entry's module imports from here is the same module.
    sys.modules.setdefault("hostile.campaign", sys.modules["__main__"])
    _serve(json.loads(sys.argv[1]))
