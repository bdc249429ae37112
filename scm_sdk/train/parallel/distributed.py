"""The processes of a distributed run: rank, agreement, and errors when one is lost.

``torchrun`` starts the processes; any other run is a single process. Every process computes the same random numbers and
takes its rows, so the result does not depend on the number of processes, up to the order of summation. Only process 0
writes and prints.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from ...errors import ConfigError, ScmError, TrainError

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets in each process."""
_EXCHANGING = ("torch.distributed.", "torch.nn.parallel.distributed", "torch.autograd.graph")
"""Modules of torch that communicate between processes."""
Value = TypeVar("Value")


class RemoteError(TrainError):
    """Raised on other processes when process 0 reports the failure."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Distribution of a run over processes. It does not change the result and may differ between starts.

    Attributes:
        parallel: ``ddp`` replicates everything in each process; ``fsdp`` (FSDP2) shards weights, averages, teacher and
            optimizer, and gathers one block at a time.
        accumulate: Number of parts of the batch of a process; their gradients are summed.
        recompute: Recompute the activations of the blocks in the backward pass instead of storing them. The tangent is
            computed before, without gradient.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA if available and the run has several processes.
        timeout: Seconds after which a waiting process gives up.
    """

    parallel: Literal["ddp", "fsdp"] = "ddp"
    accumulate: int = 1
    recompute: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ConfigError(f"accumulate is {self.accumulate}, expected 1 or more.")
        if not self.timeout > 0:
            raise ConfigError(f"timeout is {self.timeout}, expected more than 0 seconds.")


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
        device: Device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each number over all processes, on every process."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total / self.size]

    def run_on_all(self, action: Callable[[], Value]) -> Value:
        """Run an action on every process and continue only if all succeeded.

        Raises:
            ScmError: On process 0: its own error or that of the first failed process.
            RemoteError: On the other processes.
        """
        if self.size == 1:
            return action()
        mine: ScmError | None = None
        try:
            value = action()
        except ScmError as exc:
            mine = exc
        failures = self.gather(None if mine is None else str(mine))
        failed = [(rank, message) for rank, message in enumerate(failures) if message is not None]
        if not failed:
            return value  # pyright: ignore[reportReturnType]
        if not self.is_main:
            raise RemoteError(failed[0][1]) from mine
        if mine is not None:
            raise mine
        raise TrainError(f"process {failed[0][0]} of {self.size}: {failed[0][1]}")

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes by rank, on every process; values are pickled."""
        found: list[Any] = [value]
        if self.size > 1:
            found *= self.size
            dist.all_gather_object(found, value)
        return found

    def run_on_main(self, action: Callable[[], Value]) -> Value:
        """Run an action on process 0 while the others wait, and return its pickled value on all processes.

        Raises:
            ScmError: The error of the action; ``RemoteError`` on the other processes.
        """
        value = self.run_on_all(lambda: action() if self.is_main else None)
        if self.size == 1:
            return value  # type: ignore[return-value]
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        result: Value = box[0]
        return result


def is_main_process() -> bool:
    """Return whether this process has rank 0, or was not started by torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(scale: Scale) -> Iterator[World]:
    """Join the processes of torchrun; without torchrun a single process.

    Yields:
        The world.

    Raises:
        TrainError: If a GPU is missing, the other processes do not join, or one is lost.
        ConfigError: If torchrun is configured to restart processes that could not find each other.
    """
    if not all(name in os.environ for name in LAUNCHED):
        yield World(device=_device(scale.device, local_rank=0, alone=True))
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device(scale.device, local_rank=int(os.environ["LOCAL_RANK"]), alone=size == 1)
    ours = not dist.is_initialized()
    _check_restarts()
    try:
        if ours:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=scale.timeout))
        yield World(rank=rank, size=size, device=device)
    except RuntimeError as exc:
        if not _is_about_the_others(exc):
            raise
        reason = str(exc).splitlines()[0][-200:]
        raise TrainError(
            f"process {rank} of {size} lost the others: one of them ended, or did not answer within "
            f"{scale.timeout:g} s (--timeout). The first error that torchrun lists says which and why. Run the same "
            f"command again to continue from the last checkpoint. ({reason})"
        ) from exc
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _device(kind: str, *, local_rank: int, alone: bool) -> torch.device:
    available = torch.cuda.is_available()
    if kind == "cpu" or (kind == "auto" and (alone or not available)):
        return torch.device("cpu")
    count = torch.cuda.device_count() if available else 0
    if local_rank >= count:
        raise TrainError(
            f"process {local_rank} of this machine has no GPU: there are {count}. "
            f"Start as many processes as there are GPUs (--nproc-per-node {count or 1}), or use --device cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _check_restarts() -> None:
    """Refuse restarts that cannot work, because torchrun's store keeps the addresses of the previous processes.

    Source: github.com/pytorch/pytorch/issues/135712; seen with PyTorch 2.13.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"torchrun was given --max-restarts {restarts}, but started again the processes would call the "
            "earlier ones at their old addresses (PyTorch issue 135712). Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for "
            "torchrun, with --standalone or --rdzv-backend c10d."
        )


def _is_about_the_others(exc: RuntimeError) -> bool:
    """Return whether an error of torch was raised during communication. Gloo's errors have no specific class.

    Communication happens in ``torch.distributed`` and in the backward pass, where DDP reduces gradients.
    """
    if isinstance(exc, dist.DistError | torch.OutOfMemoryError):
        return isinstance(exc, dist.DistError)
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(exc.__traceback__)]
    inside = itertools.takewhile(lambda name: name.partition(".")[0] == "torch", reversed(modules))
    return any(name.startswith(_EXCHANGING) for name in inside)


@contextmanager
def stop_signals(world: World) -> Iterator[Callable[[], int]]:
    """Convert Ctrl-C and SIGTERM to a stop request: all processes end after the same iteration.

    A second Ctrl-C raises KeyboardInterrupt in a single process at once.

    Yields:
        The number of the received signal; 0 for none.
    """
    asked = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread receives signals
        return

    def note(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked == number == signal.SIGINT and world.size == 1:
            raise KeyboardInterrupt
        asked = number

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, note) for one in signals]
    try:
        yield lambda: asked
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
