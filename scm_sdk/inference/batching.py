"""Dynamic batching: run many small requests as few large batches; each gets the images of its own call.

Requests with the same number of steps share a batch; they may differ in everything else, because an image depends only
on its own seed, label and conditioning. Callers: ``Generator.stream`` and ``Batcher``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from .._util.events import Silent
from .output import GenerationInfo, GeneratorOutput, make_output
from .request import OutputType, Request, check_arguments, merge
from .session import Opened
from .sources import Source

WINDOW_BATCHES = 4
"""Maximum number of batches that a stream holds: read but not run, or run but not yet returned."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with its backend and output type.

    Attributes:
        opened: The backend.
        request: The checked request.
        output_type: See ``Generator.__call__``.
        batch_size: Largest batch of the backend.
    """

    opened: Opened
    request: Request
    output_type: OutputType
    batch_size: int

    def __len__(self) -> int:
        return len(self.request)

    def with_noise(self) -> Job:
        """Return this job with its noise drawn by the calling thread, unless it is larger than a batch."""
        return self if len(self) > self.batch_size else replace(self, request=self.request.with_noise())


@dataclass(frozen=True, kw_only=True)
class Ran:
    """Result of one job: its part of a shared run.

    Attributes:
        raw: ``(N, *image_shape)`` float32, data units.
        info: Description of the run; batches and timings are those of the shared run.
        start: Start time of the run, seconds of ``perf_counter``.
    """

    raw: np.ndarray
    info: GenerationInfo
    start: float


def first_batch(waiting: Iterable[Job]) -> list[int]:
    """Return the positions of the next jobs: the first, and later ones that fit into its batch.

    Jobs of other backends are skipped, those of the same backend are not: each number of steps keeps its order. A job
    larger than a batch runs alone.
    """
    chosen: list[int] = []
    first: Job | None = None
    held = 0
    for i, job in enumerate(waiting):
        first = first or job
        if job.opened is not first.opened:
            continue
        if chosen and held + len(job) > job.batch_size:
            break
        chosen.append(i)
        held += len(job)
    return chosen


class _Between(Silent):
    """Calls a function after each batch but the last."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def step(self, text: str, done: int, total: int, /) -> None:
        """Call it if batches are left."""
        if done < total:
            self._call()


def run_jobs(
    jobs: Sequence[Job], source: Source, *, between: Callable[[], object] = lambda: None
) -> list[Ran | Exception]:
    """Run jobs of one backend together; on failure run each alone, so that only faulty jobs fail.

    Args:
        jobs: The jobs.
        source: The model on disk.
        between: Called between the batches of a job of several batches; it may raise to end the job.
    """
    start = perf_counter()
    opened = jobs[0].opened
    try:
        request = merge([job.request for job in jobs])
        raw, batches, timings = opened.run(request, jobs[0].batch_size, _Between(between))
    except Exception as exc:
        if len(jobs) == 1:
            return [exc]
        return [each for job in jobs for each in run_jobs([job], source, between=between)]
    info = opened.info(source, batches=batches, timings=timings)
    ends = np.cumsum([len(job) for job in jobs])
    parts = np.split(raw, ends[:-1])
    # Copies, so that one small output does not keep the memory of the whole batch.
    return [Ran(raw=part.copy() if len(jobs) > 1 else part, info=info, start=start) for part in parts]


def finish(job: Job, ran: Ran | Exception) -> GeneratorOutput | Exception:
    """Convert the result of a job to its output."""
    if isinstance(ran, Exception):
        return ran
    try:
        info = ran.info.with_total((perf_counter() - ran.start) * 1e3)
        return make_output(job.request, ran.raw, job.output_type, info)
    except Exception as exc:
        return exc


@dataclass(eq=False)
class _Slot:
    """One request of a stream; without a result it is waiting."""

    job: Job | None = None
    result: GeneratorOutput | Exception | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.job) if self.job else 0


def run_in_order(
    requests: Iterable[Mapping[str, Any]], prepare: Callable[[Mapping[str, Any]], Job], source: Source
) -> Iterator[GeneratorOutput | Exception]:
    """Return the outputs of requests in order, reading ahead to fill batches; an error of ``requests`` is last.

    A batch runs when it is full, when the window is full, or when the requests end. Reading pauses until the caller has
    taken the finished outputs.
    """
    held: deque[_Slot] = deque()
    for slot in _slots(requests, prepare):
        held.append(slot)
        if (job := slot.job) is not None:
            mine = [each for each in held if each.result is None and each.job and each.job.opened is job.opened]
            if sum(each.size for each in mine) >= job.batch_size:
                _run(mine, source)
            while sum(each.size for each in held) > WINDOW_BATCHES * job.batch_size and held[0].result is None:
                _run(_waiting(held), source)
        yield from _ready(held)
    while held:
        _run(_waiting(held), source)
        yield from _ready(held)


def _slots(requests: Iterable[Mapping[str, Any]], prepare: Callable[[Mapping[str, Any]], Job]) -> Iterator[_Slot]:
    iterator = iter(requests)
    while True:
        try:
            arguments = next(iterator)
        except StopIteration:
            return
        except Exception as exc:  # the earlier requests are finished first
            yield _Slot(result=exc)
            return
        try:
            slot = _Slot(prepare(check_arguments(arguments, of="stream")))
        except Exception as exc:  # any error belongs to this request
            slot = _Slot(result=exc)
        yield slot


def _waiting(held: Iterable[_Slot]) -> list[_Slot]:
    return [slot for slot in held if slot.result is None]


def _run(waiting: Sequence[_Slot], source: Source) -> None:
    jobs = [slot.job for slot in waiting if slot.job]
    chosen = first_batch(jobs)
    for i, ran in zip(chosen, run_jobs([jobs[i] for i in chosen], source), strict=True):
        waiting[i].result = finish(jobs[i], ran)


def _ready(held: deque[_Slot]) -> Iterator[GeneratorOutput | Exception]:
    while held and (result := held[0].result) is not None:
        held.popleft()
        yield result
