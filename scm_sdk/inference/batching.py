"""Dynamic batching: run many small requests as few large batches; each gets the images of its own call.

Requests of the same number of steps share a batch; nothing else about them has to agree. That is possible because
an image depends on its own seed, label and numbers alone. Callers: ``Generator.stream`` and ``Batcher``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from .output import GenerationInfo, GeneratorOutput, make_output
from .request import OutputType, Request, check_arguments, merge
from .session import Opened
from .sources import Source

WINDOW_BATCHES = 4
"""A stream holds at most about this many batches: read and not run, or run and not yet given back."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request, what runs it, and what its images are to become.

    Attributes:
        opened: The backend.
        request: The checked request.
        output_type: See ``Generator.__call__``.
        batch_size: Images that this backend may run at once.
    """

    opened: Opened
    request: Request
    output_type: OutputType
    batch_size: int

    def __len__(self) -> int:
        return len(self.request)

    def with_noise(self) -> Job:
        """Return this job with its noise drawn, unless it is longer than a batch: many callers draw in parallel."""
        return self if len(self) > self.batch_size else replace(self, request=self.request.with_noise())


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a backend returned for one job: its part of a shared run.

    Attributes:
        raw: (N, *image_shape) float32, data units.
        info: What ran; batches and timings are those of the shared run.
        start: When that began, seconds of ``perf_counter``.
    """

    raw: np.ndarray
    info: GenerationInfo
    start: float


def first_batch(waiting: Iterable[Job]) -> list[int]:
    """Return the positions of the jobs that run next: the first, and those after it that fit into its batch.

    Jobs of other backends are passed over, those of the same one never: each number of steps keeps its order.
    A job longer than a batch runs alone.
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


def run_jobs(
    jobs: Sequence[Job], source: Source, *, between: Callable[[], object] = lambda: None
) -> list[Ran | Exception]:
    """Run jobs of one backend together; when that fails, each alone, so that only those at fault fail.

    Args:
        jobs: What runs.
        source: The model on disk.
        between: Called between the batches of a job that is longer than one; ends it by raising.
    """
    start = perf_counter()
    opened = jobs[0].opened
    images = sum(map(len, jobs))
    try:
        request = merge([job.request for job in jobs])
        raw, batches, timings = opened.run(
            request, jobs[0].batch_size, lambda done: between() if done < images else None
        )
    except Exception as exc:
        if len(jobs) == 1:
            return [exc]
        return [each for job in jobs for each in run_jobs([job], source, between=between)]
    info = opened.info(source, batches=batches, timings=timings)
    ends = np.cumsum([len(job) for job in jobs])
    parts = np.split(raw, ends[:-1])
    # Copies: who keeps one small output must not keep the whole batch in memory.
    return [Ran(raw=part.copy() if len(jobs) > 1 else part, info=info, start=start) for part in parts]


def finish(job: Job, ran: Ran | Exception) -> GeneratorOutput | Exception:
    """Turn what ran into what was asked for."""
    if isinstance(ran, Exception):
        return ran
    try:
        info = ran.info.with_total((perf_counter() - ran.start) * 1e3)
        return make_output(job.request, ran.raw, job.output_type, info)
    except Exception as exc:
        return exc


@dataclass(eq=False)
class _Slot:
    """One request of a stream: waiting while there is no result."""

    job: Job | None = None
    result: GeneratorOutput | Exception | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.job) if self.job else 0


def run_in_order(
    requests: Iterable[Mapping[str, Any]], prepare: Callable[[Mapping[str, Any]], Job], source: Source
) -> Iterator[GeneratorOutput | Exception]:
    """Answer requests in order, reading ahead to fill batches. The last answer is what ``requests`` raised, if it did.

    A batch runs when it is full, when the window is full, or when the requests end. Reading waits until the caller
    has taken what is ready.
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
        except Exception as exc:  # those before it are answered first
            yield _Slot(result=exc)
            return
        try:
            slot = _Slot(prepare(check_arguments(arguments, of="stream")))
        except Exception as exc:  # whatever it is, it is this request's
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
