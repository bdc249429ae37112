"""``Batcher``: dynamic batching of the requests of many threads.

    with gen.batcher() as batcher:                # share it between threads
        out = batcher(seed=7, class_labels="red")  # like gen(...), blocks
        future = batcher.submit(seed=8)            # or a concurrent.futures.Future

Requests that arrive while a batch runs are queued, and the next batch takes them together. No request waits for a batch
to fill: if the queue is empty and a batch may run, the calling thread runs its own request, without the millisecond of
a thread switch. Noise is drawn by the calling threads, and outputs are converted while the next batch runs. Between two
batches of a long request, one batch of other requests runs.

On a CPU a small image gains little from a second core. If a call uses only some cores
(``from_pretrained(..., num_threads=1)``), as many batches run concurrently as fit on the cores.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from .._util.forked import check_process
from .._util.processor import concurrent_calls
from ..errors import BackendFailure, ConfigError, QueueFull
from .backends import BACKENDS
from .batching import Job, Ran, finish, first_batch, run_jobs
from .output import GeneratorOutput
from .request import RequestOptions, check_arguments, check_count
from .session import Opened
from .sources import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


LONGEST_BATCHES = 16
"""Maximum number of batches of one request that is larger than the queue."""
_THREAD = "scm-batcher"
_LOG = logging.getLogger(__name__)


def concurrent_batches(opened: Opened, num_threads: int | None) -> int:
    """Return how many batches of ``num_threads`` cores can run concurrently; on a GPU one."""
    info = BACKENDS.get(opened.row.backend)
    alone = opened.device != "cpu" or (info is not None and info.one_at_a_time)
    return 1 if alone else concurrent_calls(num_threads)


@dataclass(frozen=True, eq=False)
class _Ticket:
    job: Job
    future: Future[GeneratorOutput]


class Batcher:
    """Runs the requests of many threads in shared batches. Create it with ``Generator.batcher``.

    Every image equals that of its own call. Requests run in the order of arrival; a request with another number of
    steps than the first waits for the next batch. An error is raised to the caller of its request. A batcher that is no
    longer referenced finishes its queue and ends its threads.

    Args:
        prepare: Checks the arguments of a call.
        source: The model on disk.
        max_queue_size: Largest number of images that wait; a longer request is accepted when nothing else waits.
        max_concurrent_batches: Largest number of batches that run at the same time.
    """

    def __init__(
        self,
        prepare: Callable[[Mapping[str, Any]], Job],
        source: Source,
        *,
        max_queue_size: int,
        max_concurrent_batches: int,
    ) -> None:
        self._max_queue_size = check_count("max_queue_size", max_queue_size)
        check_count("max_concurrent_batches", max_concurrent_batches)
        self._prepare = prepare
        self._queue = _Queue(source, max_queue_size=max_queue_size, max_concurrent_batches=max_concurrent_batches)
        weakref.finalize(self, self._queue.stop).atexit = False  # the threads reference the queue, not the batcher

    def submit(
        self, num_images: int = 1, *, timeout: float | None = None, **arguments: Unpack[RequestOptions]
    ) -> Future[GeneratorOutput]:
        """Queue a request; wait only if the queue is full.

        Args:
            num_images: Number of images; at most ``max_queue_size`` or 16 of the model's largest
                batches, whichever is more.
            timeout: Seconds to wait for room in the queue; 0 refuses at once, None waits without a limit.
            **arguments: The others of ``Generator.__call__``, without ``events`` and ``batch_size``.

        Returns:
            A future. ``cancel()`` works until its batch starts; the images are then never computed. Functions passed to
            ``add_done_callback`` run on the batcher's thread and must be short.

        Raises:
            QueueFull: If the queue stayed full.
            BackendFailure: If the batcher is closed.
            ScmError: If the arguments are wrong.
        """
        return self._queue.put(self._make_job("submit", num_images, arguments), timeout)

    def __call__(
        self, num_images: int = 1, *, timeout: float | None = None, **arguments: Unpack[RequestOptions]
    ) -> GeneratorOutput:
        """Run a request at once if the queue is empty, else queue it and wait; return its output.

        Arguments and errors are those of ``submit`` and of the run.
        """
        job = self._make_job("batcher", num_images, arguments)
        if (result := self._queue.run_now(job)) is not None:
            if isinstance(result, BaseException):
                raise result
            return result
        future = self._queue.put(job, timeout)
        try:
            return future.result()
        except CancelledError:  # no other code references the future
            raise BackendFailure(
                "this batcher was closed with cancel_waiting before the request ran, expected an open one. Make "
                "another: gen.batcher()"
            ) from None
        except BaseException:  # the caller was interrupted
            future.cancel()
            raise

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._queue.waiting

    def close(self, *, cancel_waiting: bool = False) -> None:
        """Accept no more requests, finish the queued ones, and return when all are done.

        May be called twice, and by a ``with`` statement; the generator stays open. In a forked process it returns at
        once.

        Args:
            cancel_waiting: Cancel the queued requests, and end a request of several batches after its current batch.
        """
        self._queue.close(cancel_waiting=cancel_waiting)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel_waiting=kind is not None)

    def _make_job(self, of: str, num_images: int, options: RequestOptions) -> Job:
        check_process(self._queue.pid, "batcher")  # before the lock, which a thread of the parent process may hold
        job = self._prepare(check_arguments({"num_images": num_images, **options}, of=of))
        if len(job) > (most := max(self._max_queue_size, LONGEST_BATCHES * job.batch_size)):
            raise ConfigError(
                f"num_images is {len(job)}, expected at most {most} in one request: others would wait for it. Split it."
            )
        return job.with_noise()


class _Queue:
    """The queue and its worker threads, which end when it is closed and empty.

    Attributes:
        pid: Id of the process that created it.
    """

    def __init__(self, source: Source, *, max_queue_size: int, max_concurrent_batches: int) -> None:
        self.pid = os.getpid()
        self._source, self._max_queue_size = source, max_queue_size
        self._free = self._max_concurrent_batches = max_concurrent_batches
        self._waiting: deque[_Ticket] = deque()
        self._closed = self._canceling = False
        self._changed = threading.Condition()
        # One more than may run: it makes the pictures of the batch before. Daemons: a batcher that is never closed must
        # not keep the program from ending.
        self._workers = [
            threading.Thread(target=self._work, name=_THREAD, daemon=True) for _ in range(max_concurrent_batches + 1)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        with self._changed:
            self._forget_cancelled()
            return sum(len(ticket.job) for ticket in self._waiting)

    def put(self, job: Job, timeout: float | None) -> Future[GeneratorOutput]:
        """Queue a job; see ``Batcher.submit``."""
        ticket = _Ticket(job, _Future())
        until = None if timeout is None else monotonic() + timeout
        with self._changed:
            while not self._has_room(len(job)):
                left = None if until is None else until - monotonic()
                if left is not None and left <= 0:
                    raise QueueFull(
                        f"{self.waiting} images wait, expected room for {len(job)} within {timeout} s and "
                        f"max_queue_size = {self._max_queue_size}. Try again later, or wait longer."
                    )
                self._changed.wait(left)
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket.future

    def run_now(self, job: Job) -> GeneratorOutput | BaseException | None:
        """Run a job of one batch on the calling thread; None if it must be queued."""
        if len(job) > job.batch_size or not self._enter():
            return None
        try:
            (ran,) = self._run([job])
        finally:
            self._leave()
        return _finish(job, ran)

    def close(self, *, cancel_waiting: bool) -> None:
        """See ``Batcher.close``."""
        if os.getpid() != self.pid:
            return
        self.stop(cancel_waiting=cancel_waiting)
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join()
        with self._changed:  # callers that run their own request
            self._changed.wait_for(lambda: self._free == self._max_concurrent_batches)

    def stop(self, *, cancel_waiting: bool = False) -> None:
        """Accept no more jobs. It never waits: the garbage collector may call it on any thread, in any process."""
        if os.getpid() != self.pid:
            return
        with self._changed:
            self._closed = True
            self._canceling |= cancel_waiting
            left: deque[_Ticket] = deque()
            if cancel_waiting:
                left, self._waiting = self._waiting, left
            self._changed.notify_all()
        for ticket in left:  # without the lock, because callbacks of futures are user code
            ticket.future.cancel()
            ticket.future.set_running_or_notify_cancel()

    def _has_room(self, images: int) -> bool:
        if self._closed:
            raise BackendFailure("this batcher was closed, expected an open one. Make another: gen.batcher()")
        waiting = self.waiting
        return not waiting or waiting + images <= self._max_queue_size

    def _forget_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._waiting if ticket.future.cancelled()]:
            self._waiting.remove(ticket)
            ticket.future.set_running_or_notify_cancel()  # wakes concurrent.futures.wait

    def _enter(self) -> bool:
        """Reserve a batch slot if the queue is empty; the caller must ``_leave``."""
        with self._changed:
            self._forget_cancelled()
            if self._closed or self._waiting or not self._free:
                return False
            self._free -= 1
            return True

    def _leave(self) -> None:
        with self._changed:
            self._free += 1
            if (
                self._waiting or self._closed
            ):  # otherwise no thread can continue, and waking them would only slow the caller
                self._changed.notify_all()

    def _wait(self) -> list[_Ticket] | None:
        """Wait for requests and a batch slot; return the next batch, None when the queue is closed and empty."""
        with self._changed:
            while True:
                self._forget_cancelled()
                if self._closed and not self._waiting:
                    return None
                if self._waiting and self._free:
                    break
                self._changed.wait()
            self._free -= 1
            return self._take(self._waiting)

    def _take(self, waiting: Iterable[_Ticket]) -> list[_Ticket]:
        """Remove and return the jobs of the next batch that were not canceled."""
        waiting = list(waiting)
        tickets = [waiting[i] for i in first_batch(ticket.job for ticket in waiting)]
        taken = set(tickets)
        self._waiting = deque(ticket for ticket in self._waiting if ticket not in taken)
        self._changed.notify_all()
        return [ticket for ticket in tickets if ticket.future.set_running_or_notify_cancel()]

    def _work(self) -> None:
        while (tickets := self._wait()) is not None:
            results = self._run([ticket.job for ticket in tickets]) if tickets else []
            self._leave()
            _answer(tickets, results)

    def _run(self, jobs: list[Job]) -> list[Ran | BaseException]:
        try:
            return list(run_jobs(jobs, self._source, between=self._between))
        except BaseException as exc:  # the thread must survive, and no caller may block indefinitely
            return [exc] * len(jobs)

    def _between(self) -> None:
        """Between two batches of a long job: end it if queued jobs are canceled, or run one batch of them."""
        with self._changed:
            if self._canceling:
                raise BackendFailure(
                    "this batcher was closed with cancel_waiting while a request of several batches ran, expected an "
                    "open one. Make another: gen.batcher()"
                )
            self._forget_cancelled()
            tickets = self._take(ticket for ticket in self._waiting if len(ticket.job) <= ticket.job.batch_size)
        if tickets:
            _answer(tickets, self._run([ticket.job for ticket in tickets]))


class _Future(Future[GeneratorOutput]):
    """A future whose callbacks cannot end the batcher's thread or keep other callbacks from running."""

    def add_done_callback(self, fn: Callable[[Future[GeneratorOutput]], object]) -> None:
        """See ``Future.add_done_callback``."""

        def call(future: Future[GeneratorOutput]) -> None:
            try:
                fn(future)
            except BaseException as exc:
                if isinstance(exc, Exception) or threading.current_thread().name != _THREAD:
                    raise  # concurrent.futures logs an Exception; a BaseException would end the calling thread
                _LOG.exception("a done-callback of a batcher's future raised %s", type(exc).__name__)

        super().add_done_callback(call)


def _answer(tickets: list[_Ticket], results: list[Ran | BaseException]) -> None:
    for ticket, ran in zip(tickets, results, strict=True):
        result = _finish(ticket.job, ran)
        if isinstance(result, BaseException):
            ticket.future.set_exception(result)
        else:
            ticket.future.set_result(result)


def _finish(job: Job, ran: Ran | BaseException) -> GeneratorOutput | BaseException:
    return finish(job, ran) if isinstance(ran, Ran | Exception) else ran
