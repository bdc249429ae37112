"""One way through an engine: a context for one batch size, its stream, its buffers and its recorded graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from scm_sdk.errors import BackendFailure
from scm_sdk.spec import SamplerSpec

from .device_memory import Buffer, Cuda
from .engine_file import REBUILD


class Lane:
    """A context for one batch size with everything it touches.

    Args:
        trt: The library.
        cuda: The GPU.
        context: A fresh execution context; the lane owns it.
        spec: The sampler.
        batch: Its batch size.
        record: Whether to record a CUDA graph on the second run.
        addresses: Memory of the caller by tensor name; None makes buffers.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        context: Any,
        spec: SamplerSpec,
        batch: int,
        *,
        record: bool,
        addresses: Mapping[str, int] | None = None,
    ) -> None:
        self.batch, self.stream = batch, cuda.stream()
        self._cuda, self._context, self._spec = cuda, context, spec
        self._record, self._runs, self._graph = record, 0, None
        self._buffers: dict[str, Buffer] = {}
        shapes = {t.name: ((batch, *t.shape), np.dtype(t.dtype)) for t in spec.inputs}
        output = ((batch, *spec.image_shape), np.dtype(np.float32))
        if addresses is None:
            self._buffers = {
                name: Buffer(cuda, shape, dtype)
                for name, (shape, dtype) in {**shapes, spec.output_name: output}.items()
            }
            addresses = {name: buffer.device for name, buffer in self._buffers.items()}
        done = [context.set_input_shape(name, shape) for name, (shape, _) in shapes.items()]
        done += [context.set_tensor_address(name, address) for name, address in addresses.items()]
        missing = context.infer_shapes()
        found = tuple(context.get_tensor_shape(spec.output_name))
        if not all(done) or missing or found != output[0]:
            self.close()
            raise BackendFailure(
                f"the engine gives {spec.output_name} {found} for a batch of {batch} (unset: {missing}), expected "
                f"{output[0]}. {REBUILD}"
            )

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Copy in, run, copy out."""
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
        """Put the engine's work into the stream."""
        if not self._context.execute_async_v3(int(self.stream)):
            raise BackendFailure(
                "the engine refused to run, expected its work in the stream. Try a smaller batch_size."
            )

    def close(self) -> None:
        """Give everything back."""
        self._cuda.destroy(stream=self.stream, graph=self._graph)
        self._graph = self._context = None
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
        """Record copies and work as one graph; where that fails the lane goes on without, and says so."""
        self._cuda.begin_capture(self.stream)
        try:
            self._enqueue()
        except BackendFailure as exc:
            self._record = False
            warnings.warn(f"no CUDA graph for batch {self.batch}: {exc}", RuntimeWarning, stacklevel=5)
        try:
            graph = self._cuda.end_capture(self.stream)
        except BackendFailure as exc:
            self._record = False
            warnings.warn(f"no CUDA graph for batch {self.batch}: {exc}", RuntimeWarning, stacklevel=5)
        else:
            self._graph = graph if self._record else None
