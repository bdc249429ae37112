"""A GPU that is played: the library's engine and the driver as a recorder on host memory.

It shows that shapes and addresses are set before the engine runs, that each batch has its own context, that a graph is
captured once, and that everything is given back. ``test_gpu.py`` runs the real thing.
"""

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engine_helpers import record_of, rewrite
from scm_sdk._util.gpu import Gpu
from scm_sdk._util.processor import platform_tag
from scm_sdk.engines.compatibility import EngineHost
from scm_sdk.noise import draw_noise
from scm_sdk.runtimes.tensorrt import backend
from scm_sdk.runtimes.tensorrt.backend import TrtBackend, open_backend
from scm_sdk.spec import SamplerSpec

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 Linux and Windows")

L4 = Gpu(index=0, name="NVIDIA L4", compute_capability="8.9", memory_bytes=24 << 30, driver="13.0")
HOST = EngineHost(
    gpu=L4, versions={"tensorrt_rtx": trt.__version__, "tensorrt": None}, platform=platform_tag(),
    trusts=lambda sha256: True,
)  # fmt: skip
"""A machine with an L4 that trusts every engine."""


def host(**changes: Any) -> EngineHost:
    """Return ``HOST`` with changes."""
    return dataclasses.replace(HOST, **changes)


class Recorder:
    """Stands for the library's engine and the driver; computes images as the sum of the noise."""

    def __init__(self, spec: SamplerSpec, batch: tuple[int, int, int]) -> None:
        self.spec, self.batch = spec, batch
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, np.ndarray] = {}
        self.live: set[Any] = set()
        self.contexts = 0
        self.capturing: list[Any] | None = None
        self.next = 1000

    def new(self, kind: str) -> int:
        self.next += 1
        self.live.add((kind, self.next))
        return self.next

    # the engine
    num_io_tensors = property(lambda self: len(self.spec.inputs) + 1)
    device_memory_size_v2 = 1 << 20

    def get_tensor_name(self, i: int) -> str:
        return [*(t.name for t in self.spec.inputs), self.spec.output_name][i]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.OUTPUT if name == self.spec.output_name else trt.TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> str:
        return "DataType.INT64" if name == "class_labels" else "DataType.FLOAT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shapes = {t.name: t.shape for t in self.spec.inputs} | {self.spec.output_name: self.spec.image_shape}
        return (-1, *shapes[name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(b, *self.get_tensor_shape(name)[1:]) for b in self.batch]

    def create_execution_context(self, config: Any = None) -> Any:
        self.contexts += 1
        return Context(self, self.contexts)

    def create_runtime_config(self) -> Any:
        self.runtime_config = types.SimpleNamespace(
            create_runtime_cache=lambda: types.SimpleNamespace(
                serialize=lambda: b"kernels", deserialize=lambda b: True
            ),
            set_runtime_cache=lambda cache: True,
            cuda_graph_strategy=None,
        )
        return self.runtime_config


class Context:
    def __init__(self, recorder: Recorder, number: int) -> None:
        self.recorder, self.number = recorder, number
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [t.name for t in self.recorder.spec.inputs if t.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shapes["noise_0"][0], *self.recorder.spec.image_shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self.addresses) == {t.name for t in self.recorder.spec.inputs} | {self.recorder.spec.output_name}
        self.recorder.calls.append(("execute", self.number, stream))

        def work() -> None:
            memory, spec = self.recorder.memory, self.recorder.spec
            noise = sum(memory[self.addresses[t.name]] for t in spec.noise_inputs)
            memory[self.addresses[spec.output_name]] = np.asarray(noise, np.float32)

        self.recorder.capturing.append(work) if self.recorder.capturing is not None else work()
        return True


class PlayedCuda:
    """What ``device_memory`` offers, on host memory."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def use(self) -> None: ...
    def free_bytes(self) -> int:
        return 1 << 30

    def stream(self) -> int:
        return self.recorder.new("stream")

    def synchronize(self, stream: int) -> None:
        self.recorder.calls.append(("synchronize", stream))

    def order(self, first: Any, then: Any) -> None:
        self.recorder.calls.append(("order", first, then))

    def begin_capture(self, stream: int) -> None:
        self.recorder.capturing = []
        self.recorder.calls.append(("capture", stream))

    def end_capture(self, stream: int) -> Any:
        work, self.recorder.capturing = self.recorder.capturing, None
        self.recorder.live.add(("graph", id(work)))
        return work

    def launch(self, graph: Any, stream: int) -> None:
        self.recorder.calls.append(("launch", stream))
        for step in graph:
            step()

    def destroy(self, *, stream: Any = None, graph: Any = None) -> None:
        self.recorder.live.discard(("stream", stream))
        self.recorder.live.discard(("graph", id(graph)))


class PlayedBuffer:
    def __init__(self, cuda: PlayedCuda, shape: tuple[int, ...], dtype: Any) -> None:
        self.recorder = cuda.recorder
        self.device = self.recorder.new("buffer")
        self.host = np.zeros(shape, dtype)

    def _do(self, step: Any) -> None:
        self.recorder.capturing.append(step) if self.recorder.capturing is not None else step()

    def upload(self, stream: int) -> None:
        self._do(lambda: self.recorder.memory.__setitem__(self.device, self.host.copy()))

    def download(self, stream: int) -> None:
        self._do(lambda: np.copyto(self.host, self.recorder.memory[self.device]))

    def close(self) -> None:
        self.recorder.live.discard(("buffer", self.device))


def play(engine: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., TrtBackend], Recorder]:
    """Return a maker of backends whose GPU is played, and the recorder."""
    spec = record_of(engine).spec
    recorder = Recorder(spec, record_of(engine).facts.batch)
    monkeypatch.setattr(EngineHost, "here", classmethod(lambda cls, **_: HOST))
    monkeypatch.setattr(backend, "Cuda", lambda index, extra: PlayedCuda(recorder))
    monkeypatch.setattr("scm_sdk.runtimes.tensorrt.context.Buffer", PlayedBuffer)
    monkeypatch.setattr(TrtBackend, "_deserialize", lambda self, blob: recorder)

    def make(flavor: str = "tensorrt_rtx") -> TrtBackend:
        if flavor == "tensorrt":
            rewrite(engine, flavor="tensorrt")
            here = host(versions={"tensorrt": record_of(engine).facts.library_version})
            monkeypatch.setattr(EngineHost, "here", classmethod(lambda cls, **_: here))
            monkeypatch.setattr(backend, "load_flavor", lambda flavor, purpose: trt)
        return open_backend(engine, spec)

    return make, recorder


def inputs(spec: SamplerSpec, batch: int, first: int = 0):
    labels = {"class_labels": np.zeros(batch, np.int64)}
    return draw_noise(spec, list(range(first, first + batch))), labels
