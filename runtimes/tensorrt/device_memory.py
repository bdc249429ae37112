"""GPU memory, streams and graphs through cuda-bindings; torch is not needed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from scm_sdk._util.gpu import gpus
from scm_sdk._util.lazy import require
from scm_sdk.errors import BackendFailure, BackendUnavailable

Handle = Any
"""Opaque handle of a stream, event or graph of cuda-bindings, whose types have no stubs."""
_RETRY = "Try a smaller batch_size; see: scm-export doctor"
_OUT_OF_MEMORY, _OLD_DRIVER = 2, 35
"""``cudaErrorMemoryAllocation`` and ``cudaErrorInsufficientDriver``, which is also raised without a driver."""


class OutOfMemory(BackendFailure):
    """GPU memory or pinned host memory is exhausted."""


class Cuda:
    """The CUDA runtime on one GPU. Every call checks its status.

    Args:
        index: Number of the GPU.
        extra: The extra that installs cuda-bindings.

    Raises:
        BackendUnavailable: If cuda-bindings, the driver or the GPU is missing.
    """

    def __init__(self, index: int, *, extra: str) -> None:
        self.api: Any = require("cuda.bindings.runtime", extra=extra, purpose="running an engine")
        self.index = index
        status, count = self.api.cudaGetDeviceCount()
        if int(status) == _OLD_DRIVER and (found := gpus()):
            major = int(found[0].driver.partition(".")[0])
            raise BackendUnavailable(
                f"the driver is too old: it knows CUDA {found[0].driver}, the installed cuda-bindings need a later one "
                f"({status.name}). Update the driver, or: pip install 'cuda-bindings<{major + 1}'"
            )
        if int(status) != 0 or index >= count:
            raise BackendUnavailable(
                f"device 'cuda:{index}' was asked for, but the CUDA runtime sees {count or 0} GPUs ({status.name}), "
                "expected that one. Check the driver: scm-export doctor"
            )
        self.use()

    def use(self) -> None:
        """Make this GPU current for the calling thread."""
        self._check(self.api.cudaSetDevice(self.index), "choosing the GPU")

    def free_bytes(self) -> int:
        """Return the free device memory, bytes."""
        free, _ = self._check(self.api.cudaMemGetInfo(), "asking for free memory")
        return int(free)

    def stream(self) -> Handle:
        """Return a new stream that does not wait for the default one."""
        return self._check(self.api.cudaStreamCreateWithFlags(self.api.cudaStreamNonBlocking), "making a stream")

    def synchronize(self, stream: Handle) -> None:
        """Wait until a stream's work is done."""
        self._check(self.api.cudaStreamSynchronize(stream), "running the engine")

    def order(self, first: Handle, then: Handle) -> None:
        """Make ``then`` wait for the work enqueued in ``first``, without waiting on the host."""
        event = self._check(self.api.cudaEventCreateWithFlags(self.api.cudaEventDisableTiming), "making an event")
        try:
            self._check(self.api.cudaEventRecord(event, first), "recording an event")
            self._check(self.api.cudaStreamWaitEvent(then, event, 0), "waiting for an event")
        finally:
            self.api.cudaEventDestroy(event)

    def begin_capture(self, stream: Handle) -> None:
        """Record the work of a stream instead of running it; other threads are not affected."""
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(self.api.cudaStreamBeginCapture(stream, mode), "capturing a graph")

    def end_capture(self, stream: Handle) -> Handle:
        """Return the recorded graph, ready to launch."""
        graph = self._check(self.api.cudaStreamEndCapture(stream), "capturing a graph")
        try:
            return self._check(self.api.cudaGraphInstantiate(graph, 0), "preparing a graph")
        finally:
            self.api.cudaGraphDestroy(graph)

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Run a recorded graph."""
        self._check(self.api.cudaGraphLaunch(graph, stream), "launching a graph")

    def destroy(self, *, stream: Handle | None = None, graph: Handle | None = None) -> None:
        """Destroy a stream or a graph."""
        if graph is not None:
            self.api.cudaGraphExecDestroy(graph)
        if stream is not None:
            self.api.cudaStreamDestroy(stream)

    def _check(self, answer: tuple[Any, ...], doing: str) -> Any:
        status, *values = answer
        if int(status) != 0:
            error = OutOfMemory if int(status) == _OUT_OF_MEMORY else BackendFailure
            raise error(f"{doing} failed on cuda:{self.index}: {status.name}. {_RETRY}")
        return values[0] if len(values) == 1 else tuple(values)


class Buffer:
    """An array in pinned host memory and on the GPU; copies between them are asynchronous.

    Args:
        cuda: The GPU.
        shape: Shape of the array.
        dtype: dtype of the array.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._cuda = cuda
        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        self.device: int = int(cuda._check(cuda.api.cudaMalloc(self.nbytes), f"taking {self.nbytes} bytes"))
        try:
            self._pinned = int(cuda._check(cuda.api.cudaHostAlloc(self.nbytes, 0), f"pinning {self.nbytes} bytes"))
        except BaseException:
            cuda.api.cudaFree(self.device)
            raise
        raw = memoryview((ctypes.c_byte * self.nbytes).from_address(self._pinned))
        self.host: np.ndarray = np.frombuffer(raw, dtype=dtype).reshape(shape)

    def upload(self, stream: Handle) -> None:
        """Copy host to GPU."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        answer = self._cuda.api.cudaMemcpyAsync(self.device, self._pinned, self.nbytes, kind, stream)
        self._cuda._check(answer, "copying to the GPU")

    def download(self, stream: Handle) -> None:
        """Copy GPU to host."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        answer = self._cuda.api.cudaMemcpyAsync(self._pinned, self.device, self.nbytes, kind, stream)
        self._cuda._check(answer, "copying from the GPU")

    def close(self) -> None:
        """Free both."""
        self._cuda.api.cudaFree(self.device)
        self._cuda.api.cudaFreeHost(self._pinned)
