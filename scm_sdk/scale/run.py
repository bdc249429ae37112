"""Write the shards of a plan: in this process, in a pool of processes, or on a Ray cluster.

Executors only choose who writes which shard. ``shards.write_shard`` does the work, so a shard has the same bytes
for every executor. A worker that dies loses its shard, which another worker writes again.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from .._util.events import SILENT, Events
from .._util.lazy import require
from .._util.processor import limited_threads
from ..errors import BackendFailure, ConfigError
from ..inference.generator import Generator
from .plan import SamplePlan, read_prompts
from .shards import missing_shards, write_shard
from .store import Store

STALL_SECONDS = 3600.0
"""Default time without a finished shard after which a run is given up, seconds."""
MOST_LOSSES = 3
"""How many times in a row workers may die before any of them finishes a shard."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a process needs to write shards. It can be pickled; the model is opened in the process.

    Attributes:
        bundle: The bundle: a folder, a ``.scmz`` file or a hub id that every worker can open.
        out: Folder or URL of the shards.
        plan: The plan.
        device: As for ``Generator.from_pretrained``.
        num_threads: CPU threads of a worker; None leaves the library's choice.
        trust_engines: As for ``Generator.from_pretrained``.
    """

    bundle: str
    out: str
    plan: SamplePlan
    device: str | None = None
    num_threads: int | None = None
    trust_engines: bool = False

    def open(self) -> Callable[[int], int]:
        """Open the model and return a function that writes one shard and returns its number."""
        plan, store = self.plan, Store(self.out)
        prompts = read_prompts(store, plan)
        generator = Generator.from_pretrained(
            self.bundle,
            backend=plan.backend,
            precision=plan.precision,
            device=self.device,
            num_inference_steps=plan.num_inference_steps,
            num_threads=self.num_threads,
            trust_engines=self.trust_engines,
        )

        def write(shard: int) -> int:
            write_shard(generator, store, plan, shard, prompts)
            return shard

        return write


def run_local(
    worker: Worker,
    shards: Sequence[int] | None = None,
    *,
    workers: int = 1,
    events: Events = SILENT,
    stall_seconds: float = STALL_SECONDS,
) -> int:
    """Write shards in this process or in a pool of processes.

    Args:
        worker: What each process opens.
        shards: Shards to write, as ``missing_shards`` lists them; None lists all that are missing.
        workers: Number of processes; 1 uses this one. Each has its own copy of the model.
        events: Receives a step for each shard that was written, in this process.
        stall_seconds: Give up when no shard was finished for so long; only with several processes.

    Returns:
        How many shards were written.

    Raises:
        BackendFailure: If workers die ``MOST_LOSSES`` times without finishing a shard, or no shard is finished in time.
        ScmError: What writing a shard raises; shards that are complete stay.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}, expected 1 or more.")
    todo = missing_shards(Store(worker.out), worker.plan) if shards is None else list(shards)
    if not todo:
        return 0
    if workers == 1:
        write = worker.open()
        for done, shard in enumerate(todo, 1):
            write(shard)
            events.step(f"shard {shard}", done, len(todo))
        return len(todo)
    if worker.num_threads is None:
        cores = limited_threads() or os.cpu_count() or 1
        worker = replace(worker, num_threads=max(1, cores // workers))
    left, losses = set(todo), 0
    while left:
        before = len(left)
        try:
            for shard in _run_pool(worker, sorted(left), min(workers, len(left)), stall_seconds):
                left.discard(shard)
                events.step(f"shard {shard}", len(todo) - len(left), len(todo))
        except BrokenProcessPool as exc:
            losses = 0 if len(left) < before else losses + 1
            if losses >= MOST_LOSSES:
                raise BackendFailure(
                    f"a worker process died {losses} times before it finished a shard, expected it to run: {exc}. "
                    "Memory may be short: use fewer workers or a smaller batch size."
                ) from exc
    return len(todo)


def _run_pool(worker: Worker, shards: Sequence[int], workers: int, stall_seconds: float) -> Iterator[int]:
    """Yield each shard when a process of a pool has written it."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of libraries
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_open_in_process, initargs=(worker,))
    try:
        pending: set[Future[int]] = {pool.submit(_write_in_process, shard) for shard in shards}
        while pending:
            done, pending = wait(pending, timeout=stall_seconds, return_when=FIRST_COMPLETED)
            if not done:
                for process in list(pool._processes.values()):
                    process.kill()
                raise _stalled(stall_seconds)
            broken = None
            for future in done:
                try:
                    yield future.result()
                except BrokenProcessPool as exc:  # those that were finished count
                    broken = exc
            if broken is not None:
                raise broken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None
_write: Callable[[int], int] | None = None
"""Both of a process of a pool."""


def _open_in_process(worker: Worker) -> None:
    global _worker
    _worker = worker


def _write_in_process(shard: int) -> int:
    global _write
    if _write is None:  # here and not in the initializer, whose errors a pool does not pass on
        assert _worker is not None, "a pool calls the initializer first"
        _write = _worker.open()
    return _write(shard)


def _stalled(seconds: float) -> BackendFailure:
    return BackendFailure(
        f"no shard was finished for {seconds:.0f} s, expected at least one. Look at the workers' logs, or allow more "
        "time with --stall-timeout."
    )


def run_ray(
    worker: Worker,
    shards: Sequence[int] | None = None,
    *,
    workers: int,
    address: str | None = None,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    events: Events = SILENT,
    stall_seconds: float = STALL_SECONDS,
) -> int:
    """Write shards on a Ray cluster, with Ray Data's pool of actors.

    Ray passes code between its processes: use a cluster that only trusted people reach. A cluster that is started here
    wants Ray's token, has no dashboard and reports no usage. Every node must see ``worker.bundle`` and ``worker.out``.

    Args:
        worker: What each actor opens.
        shards: Shards to write, as ``missing_shards`` lists them; None lists all that are missing.
        workers: Number of actors, each with its own copy of the model.
        address: Address of a cluster; None starts one on this machine.
        cpus_per_worker: Logical CPUs of an actor.
        gpus_per_worker: Logical GPUs of an actor.
        events: Receives a step for each shard that was written.
        stall_seconds: Give up when no shard was finished for so long.

    Returns:
        How many shards were written.

    Raises:
        BackendUnavailable: If Ray is not installed.
        ConfigError: If a local cluster would want no token, or the actors would leave no CPU for Ray Data's own tasks,
            which then wait without end.
        BackendFailure: If no shard is finished in time, or Ray fails.
    """
    todo = missing_shards(Store(worker.out), worker.plan) if shards is None else list(shards)
    if not todo:
        return 0
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules:  # Ray reads it when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray = require("ray", extra="ray", purpose="sampling on a Ray cluster")
    if address is None and not ray.is_initialized() and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            "RAY_AUTH_MODE is not 'token', expected it, since a cluster listens on every network address. Set "
            "RAY_AUTH_MODE=token before Ray is imported, or give the address of a cluster."
        )
    data = require("ray.data", extra="ray", purpose="sampling on a Ray cluster")
    workers = min(workers, len(todo))
    started = not ray.is_initialized()
    if started:
        options = {"address": address} if address else {"include_dashboard": False}
        try:
            ray.init(**options, log_to_driver=False)
        except (RuntimeError, ConnectionError, TimeoutError, OSError) as exc:
            raise BackendFailure(f"Ray does not start: {exc}. Look at the logs in its folder.") from exc
    try:
        cpus = ray.cluster_resources().get("CPU", 0.0)
        if workers * cpus_per_worker + 1 > cpus:
            raise ConfigError(
                f"{workers} actors of {cpus_per_worker:g} CPUs leave {cpus - workers * cpus_per_worker:g} of the "
                f"cluster's {cpus:g} CPUs, expected at least 1 for Ray Data's own tasks, or it would wait without end. "
                "Use fewer workers or --cpus-per-worker below 1."
            )
        data.DataContext.get_current().enable_progress_bars = False
        rows = data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo)).map_batches(
            _Actor,
            fn_constructor_args=(worker,),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker or None,
        )
        for done, row in enumerate(_with_deadline(rows.iter_rows(), stall_seconds), 1):
            events.step(f"shard {row['shard']}", done, len(todo))
        return len(todo)
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """Ray's side of a worker."""

    def __init__(self, worker: Worker) -> None:
        self._write = worker.open()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"shard": [self._write(int(shard)) for shard in batch["shard"]]}


def _with_deadline(rows: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield rows of an iterator that may wait without end; raise if none comes for so long."""
    arrived: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    end = object()

    def pump() -> None:
        try:
            for row in rows:
                arrived.put((row, None))
            arrived.put((end, None))
        except BaseException as exc:
            arrived.put((end, exc))

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            row, error = arrived.get(timeout=seconds)
        except queue.Empty:
            raise _stalled(seconds) from None
        if error is not None:
            raise BackendFailure(f"Ray failed: {error}. Complete shards stay; run the same command again.") from error
        if row is end:
            return
        yield row
