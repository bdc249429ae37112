"""An execution context for one batch size, with its stream, buffers and CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import numpy as np

from scm_sdk.engines.tensorrt import LibraryObject
from scm_sdk.errors import BackendFailure, ScmError
from scm_sdk.spec import SamplerSpec

from .device_memory import Buffer, Cuda, Handle


@contextmanager
def own_errors(doing: str) -> Iterator[None]:
    """Convert exceptions of the library bindings to ``BackendFailure``."""
    try:
        yield
    except ScmError:
        raise
    except (RuntimeError, TypeError, ValueError, MemoryError) as exc:
        raise BackendFailure(
            f"{doing} failed with {type(exc).__name__}: {exc}; expected the library to do it. See: scm-export doctor"
        ) from exc


class ExecutionContext:
    """An execution context for one batch size, with its stream, memory and recorded graph.

    Args:
        cuda: The GPU.
        context: A new execution context of the library, which this object owns.
        spec: The sampler.
        batch: Batch size.
        record: Whether to record a CUDA graph on the second run.
        buffers: Whether to allocate buffers, for ``run``; without them ``bind`` sets those of the caller.
        rebuild: Advice for errors about a wrong engine.

    Raises:
        BackendFailure: If it cannot be created; resources are released.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: LibraryObject,
        spec: SamplerSpec,
        batch: int,
        *,
        record: bool = False,
        buffers: bool = True,
        rebuild: str = "",
    ) -> None:
        self.batch, self.has_buffers = batch, buffers
        self.stream: Handle = None
        self._cuda, self._spec = cuda, spec
        self._context: LibraryObject = context
        self._record, self._runs, self._graph = record, 0, None
        self._buffers: dict[str, Buffer] = {}
        shapes = {t.name: ((batch, *t.shape), np.dtype(t.dtype)) for t in spec.inputs}
        output = ((batch, *spec.image_shape), np.dtype(np.float32))
        try:
            with own_errors("setting an engine up"):
                self.stream = cuda.stream()
                done = [context.set_input_shape(name, shape) for name, (shape, _) in shapes.items()]
                missing = context.infer_shapes()
                found = tuple(context.get_tensor_shape(spec.output_name))
                if not all(done) or missing or found != output[0]:
                    raise BackendFailure(
                        f"the engine gives {spec.output_name} {found} for a batch of {batch} (unset: {missing}), "
                        f"expected {output[0]}. {rebuild}"
                    )
                if buffers:
                    for name, (shape, dtype) in {**shapes, spec.output_name: output}.items():
                        self._buffers[name] = Buffer(cuda, shape, dtype)
                    self.bind({name: buffer.device for name, buffer in self._buffers.items()})
        except BaseException:
            self.close()
            raise

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set the GPU address of each tensor for the following runs."""
        with own_errors("giving an engine its memory"):
            if not all([self._context.set_tensor_address(name, address) for name, address in addresses.items()]):
                raise BackendFailure("the engine refused its memory, expected to take it. See: scm-export doctor")

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Copy in, run, copy out."""
        with own_errors("running the engine"):
            self._cuda.use()
            for name, array in feeds.items():
                np.copyto(self._buffers[name].host, array)
            if self._graph is None and self._record and self._runs == 1:
                self._capture()
            if self._graph is not None:
                self._cuda.launch(self._graph, self.stream)
            else:
                self._enqueue()
            self._cuda.synchronize(self.stream)
            self._runs += 1
            return self._buffers[self._spec.output_name].host.copy()

    def execute(self) -> None:
        """Enqueue the engine in the stream."""
        with own_errors("running the engine"):
            if not self._context.execute_async_v3(int(self.stream)):
                raise BackendFailure(
                    "the engine refused to run, expected its work in the stream. Try a smaller batch_size."
                )

    def close(self) -> None:
        """Wait for running work, then release all resources."""
        if self.stream is not None:
            with suppress(BackendFailure):  # a failed stream has no work to wait for
                self._cuda.synchronize(self.stream)
        self._cuda.destroy(stream=self.stream, graph=self._graph)
        self.stream = self._graph = self._context = None
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers = {}

    def _enqueue(self) -> None:
        output = self._spec.output_name
        for name, buffer in self._buffers.items():
            if name != output:
                buffer.upload(self.stream)
        self.execute()
        self._buffers[output].download(self.stream)

    def _capture(self) -> None:
        """Record copies and work as one graph; where that fails the context continues without it and logs a warning."""
        try:
            self._cuda.begin_capture(self.stream)
            try:
                self._enqueue()
            finally:  # end the capture in any case, because a recording stream cannot be used otherwise
                self._graph = self._cuda.end_capture(self.stream)
        except Exception as exc:  # a graph is an optimization only
            self._record = False
            self._cuda.destroy(graph=self._graph)
            self._graph = None
            warnings.warn(f"no CUDA graph for batch {self.batch}: {exc}", RuntimeWarning, stacklevel=5)
