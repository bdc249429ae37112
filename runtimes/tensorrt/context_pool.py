"""A pool of execution contexts of one engine, one for each concurrent call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from scm_sdk.errors import BackendFailure

from .context import ExecutionContext
from .device_memory import OutOfMemory

MAX_IDLE_CONTEXTS = 8
"""Execution contexts that are kept for the next call; the longest unused goes first."""


class ContextPool:
    """Safe for threads.

    Args:
        make: Makes a context of a batch size, with or without buffers of its own.
        name: Of the backend; the subject of messages.
    """

    def __init__(self, make: Callable[[int, bool], ExecutionContext], *, name: str) -> None:
        self._make, self._name = make, name
        self._idle: list[ExecutionContext] = []
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()
        self._making = threading.Lock()  # contexts of an engine are created one at a time

    @contextmanager
    def context(self, batch: int, *, buffers: bool = True) -> Iterator[ExecutionContext]:
        """Lend a context; one whose use fails is not lent again.

        Raises:
            BackendFailure: If the pool is closed, or a context cannot be made.
        """
        with self._changed:
            if self._closed:
                raise BackendFailure(f"this {self._name} backend was closed, expected an open one. Open it again.")
            self._running += 1
            context = next((x for x in self._idle if (x.batch, x.has_buffers) == (batch, buffers)), None)
            if context is not None:
                self._idle.remove(context)
        kept = False
        try:
            context = context or self._new(batch, buffers)
            yield context
            kept = True
        finally:
            try:
                if context is not None and not kept:
                    context.close()
            finally:  # otherwise ``close`` would block indefinitely
                self._return(context if kept else None)

    def close(self) -> None:
        """Wait for the contexts that are lent, then close all."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._running == 0)
        self._drop_idle()

    def _new(self, batch: int, buffers: bool) -> ExecutionContext:
        with self._making:
            try:
                return self._make(batch, buffers)
            except OutOfMemory:
                if not self._drop_idle():
                    raise
                return self._make(batch, buffers)

    def _return(self, context: ExecutionContext | None) -> None:
        with self._changed:
            if context is not None:
                self._idle.append(context)
            dropped = self._idle.pop(0) if len(self._idle) > MAX_IDLE_CONTEXTS else None
        try:
            if dropped is not None:
                dropped.close()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _drop_idle(self) -> int:
        """Close the contexts that are not in use; return how many there were."""
        with self._changed:
            contexts, self._idle = self._idle, []
        for context in contexts:
            context.close()
        return len(contexts)
