"""``Batcher``: many callers, one generator, full batches.

    with gen.batcher() as batcher:                # share it between threads
        out = batcher(seed=7, class_labels="red")  # like gen(...), for a thread that waits
        future = batcher.submit(seed=8)            # or a concurrent.futures.Future

While a batch runs, what arrives gathers; the next batch takes it together. Nobody waits for a batch to fill: a caller
who finds nothing waiting and room for a batch runs its own, without the millisecond of a hand-over between threads.
Noise is drawn by the callers' threads, and pictures are made while the next batch runs.

On a CPU a small picture gains little from a second core. Where a call was given some of the cores only
(``from_pretrained(..., num_threads=1)``), as many batches run side by side as fit beside one another.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from .dispatch import BACKENDS
from .errors import BackendFailure, ConfigError, QueueFull
from .forked import check_process
from .opened import Opened
from .output import GeneratorOutput
from .packing import Job, Ran, finish, first_batch, run_jobs
from .processor import calls_side_by_side
from .request import RequestOptions, check_arguments, check_count
from .sources import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


LONGEST_BATCHES = 16
"""Batches that one request may fill: the others wait for it."""


def side_by_side(opened: Opened, num_threads: int | None) -> int:
    """Return how many batches fit beside one another, each on ``num_threads`` cores; a call on a GPU takes it all."""
    info = BACKENDS.get(opened.row.backend)
    alone = opened.device != "cpu" or (info is not None and info.one_at_a_time)
    return 1 if alone else calls_side_by_side(num_threads)


@dataclass(frozen=True)
class _Ticket:
    job: Job
    future: Future[GeneratorOutput]


class Batcher:
    """Runs what many threads ask for in shared batches. Make one with ``Generator.batcher``.

    Every image equals that of its own call. Requests are taken in the order in which they were accepted; one whose
    number of steps differs from the first one's waits for the next batch. An error reaches the caller of its request.

    Args:
        prepare: Checks the arguments of a call.
        source: The model on disk.
        max_waiting: Images that may wait; a longer request is accepted when nothing else waits.
        max_running: Batches that may run side by side.
    """

    def __init__(
        self, prepare: Callable[[Mapping[str, Any]], Job], source: Source, *, max_waiting: int, max_running: int
    ) -> None:
        self._max_waiting = check_count("max_waiting", max_waiting)
        self._free = self._max_running = check_count("max_running", max_running)
        self._prepare, self._source = prepare, source
        self._waiting: deque[_Ticket] = deque()
        self._closed = False
        self._pid = os.getpid()
        self._changed = threading.Condition()
        # One more than may run: it makes the pictures of the batch before. Daemons: a batcher that is never closed must
        # not keep the program from ending.
        self._workers = [
            threading.Thread(target=self._work, name="scm-batcher", daemon=True) for _ in range(max_running + 1)
        ]
        for worker in self._workers:
            worker.start()

    def submit(
        self, num_images: int = 1, *, timeout: float | None = None, **arguments: Unpack[RequestOptions]
    ) -> Future[GeneratorOutput]:
        """Queue a request and return at once, or when there is room.

        Args:
            num_images: How many; no more than ``max_waiting`` and 16 of the model's largest batches.
            timeout: Seconds to wait for room in the queue; 0 refuses at once, None waits without a limit.
            **arguments: The others of ``Generator.__call__``, without ``progress`` and ``batch_size``.

        Returns:
            A future. ``cancel()`` works until its batch starts; the images are then never computed. What
            ``add_done_callback`` is given runs on the batcher's thread: keep it short.

        Raises:
            QueueFull: If there was no room in time.
            BackendFailure: If the batcher is closed.
            ScmError: If the arguments are wrong.
        """
        return self._queue(self._make_job("submit", num_images, arguments), timeout)

    def __call__(
        self, num_images: int = 1, *, timeout: float | None = None, **arguments: Unpack[RequestOptions]
    ) -> GeneratorOutput:
        """Run a request at once where nothing waits before it, else queue it and wait; return its output.

        Arguments and errors are those of ``submit`` and of its run.
        """
        job = self._make_job("batcher", num_images, arguments)
        if self._enter():
            try:
                (ran,) = self._run([job])
            finally:
                self._leave()
            result = self._finish(job, ran)
            if isinstance(result, BaseException):
                raise result
            return result
        future = self._queue(job, timeout)
        try:
            return future.result()
        except BaseException:  # an interrupted caller no longer wants it
            future.cancel()
            raise

    def _make_job(self, of: str, num_images: int, options: RequestOptions) -> Job:
        check_process(self._pid, "batcher")  # before the lock, which a thread of the other process may hold
        job = self._prepare(check_arguments({"num_images": num_images, **options}, of=of))
        if len(job) > (most := max(self._max_waiting, LONGEST_BATCHES * job.batch_size)):
            raise ConfigError(
                f"num_images is {len(job)}, expected at most {most} in one request: others would wait for it. Split it."
            )
        return job.with_noise()

    def _queue(self, job: Job, timeout: float | None) -> Future[GeneratorOutput]:
        ticket = _Ticket(job, Future())
        until = None if timeout is None else monotonic() + timeout
        with self._changed:
            while not self._has_room(len(ticket.job)):
                left = None if until is None else until - monotonic()
                if left is not None and left <= 0:
                    raise QueueFull(
                        f"{self.waiting} images wait, expected room for {len(ticket.job)} within {timeout} s and "
                        f"max_waiting = {self._max_waiting}. Try again later, or wait longer."
                    )
                self._changed.wait(left)
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket.future

    @property
    def waiting(self) -> int:
        """Images that wait for their batch."""
        with self._changed:
            self._forget_cancelled()
            return sum(len(ticket.job) for ticket in self._waiting)

    def close(self, *, cancel_waiting: bool = False) -> None:
        """Take no more requests, finish those that wait (or cancel them), and return when all is done.

        May be called twice, and from a ``with`` statement; the generator stays open. A process that inherited the
        batcher has nothing to wait for.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closed = True
            if cancel_waiting:
                for ticket in self._waiting:
                    ticket.future.cancel()
            self._changed.notify_all()
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join()
        with self._changed:  # callers that run their own
            self._changed.wait_for(lambda: self._free == self._max_running)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel_waiting=kind is not None)

    def _has_room(self, images: int) -> bool:
        if self._closed:
            raise BackendFailure("this batcher was closed, expected an open one. Make another: gen.batcher()")
        waiting = self.waiting
        return not waiting or waiting + images <= self._max_waiting

    def _forget_cancelled(self) -> None:
        if any(ticket.future.cancelled() for ticket in self._waiting):
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.future.cancelled())

    def _enter(self) -> bool:
        """Take room for a batch if nothing waits; whoever got it must ``_leave``."""
        with self._changed:
            self._forget_cancelled()
            if self._closed or self._waiting or not self._free:
                return False
            self._free -= 1
            return True

    def _leave(self) -> None:
        with self._changed:
            self._free += 1
            if self._waiting or self._closed:  # else nobody can go on: waking them would only slow the caller
                self._changed.notify_all()

    def _take(self) -> list[_Ticket] | None:
        """Wait for requests and room; return those of the next batch, None when the batcher is closed and all done."""
        with self._changed:
            while True:
                self._forget_cancelled()
                tickets = [self._waiting[i] for i in first_batch(ticket.job for ticket in self._waiting)]
                if self._closed and not tickets:
                    return None
                if tickets and self._free:
                    break
                self._changed.wait()
            self._free -= 1
            taken = set(map(id, tickets))
            self._waiting = deque(ticket for ticket in self._waiting if id(ticket) not in taken)
            self._changed.notify_all()
        return tickets

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            tickets = [ticket for ticket in taken if ticket.future.set_running_or_notify_cancel()]
            results = self._run([ticket.job for ticket in tickets]) if tickets else []
            self._leave()
            for ticket, result in zip(tickets, results, strict=True):
                self._answer(ticket, result)

    def _run(self, jobs: list[Job]) -> list[Ran | BaseException]:
        try:
            return list(run_jobs(jobs, self._source))
        except BaseException as exc:  # the thread must live, and nobody may wait for ever
            return [exc] * len(jobs)

    @staticmethod
    def _finish(job: Job, ran: Ran | BaseException) -> GeneratorOutput | BaseException:
        return finish(job, ran) if isinstance(ran, Ran | Exception) else ran

    def _answer(self, ticket: _Ticket, ran: Ran | BaseException) -> None:
        result = self._finish(ticket.job, ran)
        if isinstance(result, BaseException):
            ticket.future.set_exception(result)
        else:
            ticket.future.set_result(result)
