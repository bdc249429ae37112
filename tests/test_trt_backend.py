"""The TensorRT backend as far as a machine without a GPU can take it, and its calls beyond that, in order.

The engine is real; so is every refusal. What happens on the GPU is played by a recorder that stands for the library
and the driver: it shows that shapes and addresses are set before the engine runs, that each batch has its own
lane, that a graph is captured once, and that everything is given back. ``test_gpu.py`` runs the real thing.
"""

import dataclasses
import shutil
import threading
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from scm_sdk.build_record import BuildRecord
from scm_sdk.engine_fit import EngineHost, this_platform
from scm_sdk.errors import (
    BackendFailure,
    BackendUnavailable,
    ConfigError,
    IncompatibleEngineError,
    IntegrityError,
    SchemaError,
    ShapeError,
)
from scm_sdk.evaluate.gate import validate_bundle
from scm_sdk.export.engines import add_engines
from scm_sdk.export.precision import default_plan
from scm_sdk.export.variants import add_precision
from scm_sdk.generator import Generator
from scm_sdk.gpu import Gpu, gpus
from scm_sdk.noise import draw_noise
from scm_sdk.runtimes import device_memory, trt_backend
from scm_sdk.runtimes.device_memory import Buffer, Cuda, OutOfMemory
from scm_sdk.runtimes.engine_file import read_engine
from scm_sdk.runtimes.lane_pool import MAX_IDLE_LANES
from scm_sdk.runtimes.trt_backend import TrtBackend, open_backend
from scm_sdk.spec import SamplerSpec
from scm_sdk.targets import resolve_targets

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 Linux and Windows")

L4 = Gpu(index=0, name="NVIDIA L4", compute_capability="8.9", memory_bytes=24 << 30, driver="13.0")
HOST = EngineHost(
    gpu=L4, versions={"tensorrt_rtx": trt.__version__, "tensorrt": None}, platform=this_platform(),
    trusts=lambda sha256: True,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("trt") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[1], num_samples=1)
    add_engines(path, resolve_targets(["l4"]), precisions=["fp16"])
    return path


@pytest.fixture
def engine(bundle: Path, tmp_path: Path) -> Path:
    """An engine with its record, to be damaged."""
    return Path(shutil.copytree(bundle / "engines/tensorrt_rtx-sm89-fp16-1step", tmp_path / "engine")) / "model.engine"


@pytest.fixture
def spec(engine: Path) -> SamplerSpec:
    return record_of(engine).spec


def record_of(engine: Path) -> BuildRecord:
    return BuildRecord.from_json(engine.with_name("build.json").read_bytes())


def rewrite(engine: Path, **changes: Any) -> None:
    record = msgspec.structs.replace(record_of(engine), **changes)
    engine.with_name("build.json").write_bytes(record.to_json())


def host(**changes: Any) -> EngineHost:
    return EngineHost(**({name: getattr(HOST, name) for name in HOST.__dataclass_fields__} | changes))


def test_a_good_engine_passes_every_check(engine: Path, spec: SamplerSpec) -> None:
    record, blob = read_engine(engine, spec, HOST)
    assert len(blob) == record.engine_bytes and record.precision == "fp16"


def test_damage_is_found_before_the_library_sees_it(engine: Path, spec: SamplerSpec) -> None:
    good = engine.read_bytes()
    engine.write_bytes(good[:-1])
    with pytest.raises(
        IntegrityError, match=r"has \d+ bytes, expected \d+: it was cut short\. Build it again: scm-export"
    ):
        read_engine(engine, spec, HOST)
    engine.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(IntegrityError, match=r"is not the engine that build\.json describes"):
        read_engine(engine, spec, HOST)
    engine.unlink()
    with pytest.raises(IntegrityError, match="is not there"):
        read_engine(engine, spec, HOST)


def test_the_record_must_be_there_and_readable(engine: Path, spec: SamplerSpec) -> None:
    beside = engine.with_name("build.json")
    good = beside.read_bytes()
    beside.write_bytes(good[:-10])
    with pytest.raises(SchemaError, match=r"build\.json cannot be read"):
        read_engine(engine, spec, HOST)
    beside.write_bytes(good.replace(b'"schema_version": 1', b'"schema_version": 9', 1))
    with pytest.raises(SchemaError, match="schema version 9"):
        read_engine(engine, spec, HOST)
    beside.unlink()
    with pytest.raises(IntegrityError, match="Expected it beside the engine"):
        read_engine(engine, spec, HOST)


def test_an_engine_of_another_sampler_is_refused(engine: Path, spec: SamplerSpec) -> None:
    with pytest.raises(IntegrityError, match="another sampler: times differ"):
        read_engine(engine, msgspec.structs.replace(spec, times=(1.5,)), HOST)


@pytest.mark.parametrize(
    ("changes", "machine", "error", "message"),
    [
        ({}, {"gpu": None}, BackendUnavailable, "no NVIDIA GPU here, expected one of compute capability 8.9"),
        ({}, {"versions": {}}, BackendUnavailable, r"not installed, expected .*pip install 'scm-sdk\[tensorrt-rtx\]'"),
        ({}, {"platform": "windows-amd64"}, IncompatibleEngineError, "was built for .*this is windows-amd64"),
        ({}, {"versions": {"tensorrt_rtx": "1.8.0.1"}}, IncompatibleEngineError, r"1\.8\.0\.1 is installed"),
        ({}, {"gpu": Gpu(index=0, name="T4", compute_capability="7.5", memory_bytes=1, driver="12.0")},
         IncompatibleEngineError, r"built for 8\.9, this T4 is 7\.5; .*--target sm_75"),
        ({"flavour": "tensorrt"}, {}, BackendUnavailable, r"pip install 'scm-sdk\[tensorrt\]'"),
    ],
)  # fmt: skip
def test_each_reason_has_its_own_message(engine, spec, changes, machine, error, message) -> None:
    rewrite(engine, **changes)
    with pytest.raises(error, match=message):
        read_engine(engine, spec, host(**machine))


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_without_a_gpu_the_other_backends_go_on(bundle: Path) -> None:
    with Generator.from_pretrained(bundle, num_inference_steps=1) as gen:
        assert gen(1, class_labels=[0]).info.backend == "torch", "nothing else was compared yet"
        (row,) = (row for row in gen.plan() if row.backend == "tensorrt_rtx")
        assert row.reason == "no NVIDIA GPU here"
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU here"):
        Generator.from_pretrained(bundle, backend="tensorrt_rtx", num_inference_steps=1)
    engine = bundle / "engines/tensorrt_rtx-sm89-fp16-1step/model.engine"
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU here"):
        open_backend(engine, record_of(engine).spec)
    skipped: list[str] = []
    results = validate_bundle(bundle, num_seeds=2, batches=[1], on_skip=skipped.append)
    assert results and any("tensorrt_rtx" in line and "no NVIDIA GPU" in line for line in skipped)


def test_the_device_is_a_gpu(engine: Path, spec: SamplerSpec) -> None:
    for device in ("cpu", "cuda:x", "gpu"):
        with pytest.raises(ConfigError, match="expected 'cuda' or 'cuda:N' for an engine"):
            open_backend(engine, spec, device=device)


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_the_cuda_runtime_says_what_it_misses() -> None:
    with pytest.raises(BackendUnavailable, match="the CUDA runtime sees 0 GPUs"):
        Cuda(0, extra="tensorrt-rtx")


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


@pytest.fixture
def played(engine: Path, spec: SamplerSpec, monkeypatch: pytest.MonkeyPatch):
    """Return a maker of backends whose GPU is played, and the recorder."""
    recorder = Recorder(spec, record_of(engine).facts.batch)
    monkeypatch.setattr(EngineHost, "here", classmethod(lambda cls, **_: HOST))
    monkeypatch.setattr(trt_backend, "Cuda", lambda index, extra: PlayedCuda(recorder))
    monkeypatch.setattr("scm_sdk.runtimes.engine_lane.Buffer", PlayedBuffer)
    monkeypatch.setattr(TrtBackend, "_deserialize", lambda self, blob: recorder)

    def make(flavour: str = "tensorrt_rtx") -> TrtBackend:
        if flavour == "tensorrt":
            rewrite(engine, flavour="tensorrt")
            here = host(versions={"tensorrt": record_of(engine).facts.library_version})
            monkeypatch.setattr(EngineHost, "here", classmethod(lambda cls, **_: here))
            monkeypatch.setattr(trt_backend, "load_flavour", lambda flavour, purpose: trt)
        return open_backend(engine, spec)

    return make, recorder


def inputs(spec: SamplerSpec, batch: int, first: int = 0):
    labels = {"class_labels": np.zeros(batch, np.int64)}
    return draw_noise(spec, list(range(first, first + batch))), labels


def test_images_come_out_and_lanes_are_kept_for_their_batch(played, spec: SamplerSpec) -> None:
    make, recorder = played
    backend = make()
    assert (backend.name, backend.device) == ("tensorrt_rtx", "cuda:0")
    for batch in (1, 3, 1, 3, 1):
        noise, labels = inputs(spec, batch)
        np.testing.assert_array_equal(backend.sample(noise, labels), noise[0])
    assert recorder.contexts == 2, "one context for each batch size"
    config = recorder.runtime_config
    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == eager, "else a seed's bits change between calls"
    kinds = [call[0] for call in recorder.calls]
    assert kinds == ["execute", "synchronize"] * 5, "TensorRT-RTX captures graphs itself"
    backend.close()
    backend.close()
    assert recorder.live == set(), "streams, buffers and graphs are given back"
    with pytest.raises(BackendFailure, match="was closed, expected an open one"):
        backend.sample(*inputs(spec, 1))


def test_tensorrt_captures_a_graph_on_the_second_run_and_replays_it(played, spec: SamplerSpec) -> None:
    make, recorder = played
    backend = make("tensorrt")
    for first in (0, 10, 20, 30):
        noise, labels = inputs(spec, 2, first)
        np.testing.assert_array_equal(backend.sample(noise, labels), noise[0])
    kinds = [call[0] for call in recorder.calls]
    assert (
        kinds
        == ["execute", "synchronize", "capture", "execute", "launch", "synchronize"] + ["launch", "synchronize"] * 2
    )
    backend.close()
    assert recorder.live == set()


def test_a_failed_capture_ends_and_the_lane_goes_on(played, spec: SamplerSpec, monkeypatch) -> None:
    make, recorder = played
    backend = make("tensorrt")
    execute = Context.execute_async_v3

    def refuse_to_record(self: Context, stream: int) -> bool:
        if recorder.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return execute(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", refuse_to_record)
    noise, labels = inputs(spec, 2)
    backend.sample(noise, labels)
    with pytest.warns(RuntimeWarning, match=r"no CUDA graph for batch 2: .*not permitted"):
        np.testing.assert_array_equal(backend.sample(noise, labels), noise[0])
    assert recorder.capturing is None, "or nothing would ever run in this stream again"
    np.testing.assert_array_equal(backend.sample(noise, labels), noise[0])
    backend.close()
    assert recorder.live == set(), "the half graph too"


def test_the_callers_memory_is_used_in_the_order_of_its_stream(played, spec: SamplerSpec) -> None:
    make, recorder = played
    backend = make()
    noise, labels = inputs(spec, 2)
    names = [*(t.name for t in spec.inputs), spec.output_name]
    for base in (100, 200):
        addresses = {name: base + i for i, name in enumerate(names)}
        recorder.memory |= {addresses["noise_0"]: noise[0] + base, addresses["class_labels"]: labels["class_labels"]}
        backend._enqueue(addresses, 2, "theirs")
        np.testing.assert_array_equal(recorder.memory[addresses[spec.output_name]], noise[0] + base)
    (lane,) = backend._pool._idle
    once = [("order", "theirs", lane.stream), ("execute", 1, lane.stream), ("order", lane.stream, "theirs")]
    assert recorder.calls == once * 2, "one lane for both, and nobody waits for the GPU"
    backend.sample(noise, labels)
    assert recorder.contexts == 2, "a lane with memory of its own is another"
    before = recorder.live.copy()
    with pytest.raises(KeyError), backend._pool.lane(2, buffers=False):
        raise KeyError
    assert len(recorder.live) == len(before) - 1, "what failed is not lent again"
    backend.close()
    assert recorder.live == set()


def test_tensors_that_do_not_fit_are_refused_in_our_words(played, spec: SamplerSpec) -> None:
    make, _ = played
    backend = make()
    torch = pytest.importorskip("torch")
    noise, labels = inputs(spec, 2)
    tensors, theirs = [torch.from_numpy(x) for x in noise], {k: torch.from_numpy(x) for k, x in labels.items()}
    with pytest.raises(ShapeError, match=r"conditioning holds \[\], expected exactly \['class_labels'\]"):
        backend.sample_torch(tensors, {})
    with pytest.raises(ShapeError, match="noise holds 2 arrays, expected 1"):
        backend.sample_torch(tensors * 2, theirs)
    with pytest.raises(ShapeError, match=r"noise_0 is .* float32 on cpu, expected .* float32 on cuda:0"):
        backend.sample_torch(tensors, theirs)


def test_a_lane_that_cannot_be_set_up_leaves_nothing(played, spec: SamplerSpec, monkeypatch) -> None:
    make, recorder = played
    backend = make()
    with monkeypatch.context() as patch:

        def foreign(self: Context) -> list[str]:
            raise RuntimeError("a pybind exception")

        patch.setattr(Context, "infer_shapes", foreign)
        with pytest.raises(BackendFailure, match="setting an engine up failed with RuntimeError: a pybind exception"):
            backend.sample(*inputs(spec, 1))
    made: list[PlayedBuffer] = []

    def second_fails(*args: Any) -> PlayedBuffer:
        if made:
            raise OutOfMemory("full")
        made.append(PlayedBuffer(*args))
        return made[-1]

    monkeypatch.setattr("scm_sdk.runtimes.engine_lane.Buffer", second_fails)
    with pytest.raises(BackendFailure, match="full"):
        backend.sample(*inputs(spec, 1))
    assert recorder.live == set()
    backend.close()


def test_idle_lanes_go_when_memory_is_full(played, spec: SamplerSpec) -> None:
    make, recorder = played
    backend = make()
    for batch in (1, 2):
        backend.sample(*inputs(spec, batch))
    create = recorder.create_execution_context
    recorder.create_execution_context = lambda config=None: None if len(recorder.live) > 1 else create()  # type: ignore
    noise, labels = inputs(spec, 3)
    np.testing.assert_array_equal(backend.sample(noise, labels), noise[0])
    assert [lane.batch for lane in backend._pool._idle] == [3]
    backend.close()
    assert recorder.live == set()


def test_close_waits_for_the_call_that_runs(played, spec: SamplerSpec, monkeypatch) -> None:
    make, recorder = played
    backend = make()
    inside, go_on = threading.Event(), threading.Event()
    execute = Context.execute_async_v3

    def slow(self: Context, stream: int) -> bool:
        inside.set()
        assert go_on.wait(10)
        return execute(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", slow)
    noise, labels = inputs(spec, 1)
    found: list[np.ndarray] = []
    caller = threading.Thread(target=lambda: found.append(backend.sample(noise, labels)))
    closer = threading.Thread(target=backend.close)
    caller.start()
    assert inside.wait(10)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive() and recorder.live, "the call still uses its lane"
    go_on.set()
    caller.join(10), closer.join(10)
    np.testing.assert_array_equal(found[0], noise[0])
    assert recorder.live == set()


class FullHost:
    """The CUDA runtime where there is no pinned memory left, and a driver of CUDA 12."""

    def __init__(self) -> None:
        self.freed: list[int] = []

    status = staticmethod(lambda number, name: type("Status", (int,), {"name": name})(number))

    def cudaMalloc(self, nbytes: int) -> tuple[Any, int]:
        return self.status(0, "cudaSuccess"), 7

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, int]:
        return self.status(2, "cudaErrorMemoryAllocation"), 0

    def cudaFree(self, address: int) -> None:
        self.freed.append(address)

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return self.status(35, "cudaErrorInsufficientDriver"), 0


def test_half_a_buffer_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda.__new__(Cuda)
    cuda.api, cuda.index = FullHost(), 0
    with pytest.raises(OutOfMemory, match="pinning 16 bytes failed on cuda:0: cudaErrorMemoryAllocation"):
        Buffer(cuda, (4,), np.dtype(np.float32))
    assert cuda.api.freed == [7]


def test_an_old_driver_is_not_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "require", lambda name, extra, purpose: FullHost())
    monkeypatch.setattr(device_memory, "gpus", lambda: (dataclasses.replace(L4, driver="12.4"),))
    with pytest.raises(BackendUnavailable, match=r"driver is too old: it knows CUDA 12\.4.*'cuda-bindings<13'"):
        Cuda(0, extra="tensorrt")
    monkeypatch.setattr(device_memory, "gpus", lambda: ())
    with pytest.raises(BackendUnavailable, match="sees 0 GPUs"):
        Cuda(0, extra="tensorrt")


def test_idle_lanes_are_few(played, spec: SamplerSpec) -> None:
    make, recorder = played
    backend = make()
    threads = [threading.Thread(target=lambda: backend.sample(*inputs(spec, 2))) for _ in range(3 * MAX_IDLE_LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(backend._pool._idle) <= MAX_IDLE_LANES
    backend.close()
    assert recorder.live == set()


def test_the_runtime_cache_is_kept_for_the_next_time(played, spec: SamplerSpec, cache_home: Path) -> None:
    make, _ = played
    make().close()
    (kept,) = (cache_home / "scm-sdk/runtime").iterdir()
    assert kept.read_bytes() == b"kernels" and "NVIDIA_L4" in kept.name
    make().close()


def test_batches_outside_the_profile_are_refused(played, engine: Path, spec: SamplerSpec) -> None:
    make, recorder = played
    rewrite(engine, facts=msgspec.structs.replace(record_of(engine).facts, batch=(1, 2, 3)))
    recorder.batch = (1, 2, 3)
    backend = make()
    with pytest.raises(ShapeError, match=r"a batch of 4 was given .*expected 1\.\.3"):
        backend.sample(*inputs(spec, 4))


def test_an_engine_that_is_not_its_record_is_refused(played, engine: Path, spec: SamplerSpec) -> None:
    make, recorder = played
    recorder.batch = (1, 1, 1)
    with pytest.raises(IncompatibleEngineError, match=r"takes batches \(1, 1, 1\)"):
        make()
    recorder.get_tensor_dtype = lambda name: "DataType.HALF"  # type: ignore[method-assign]
    with pytest.raises(IncompatibleEngineError, match="has tensors"):
        make()


def test_no_memory_for_a_context_is_said(played, spec: SamplerSpec) -> None:
    make, recorder = played
    backend = make()
    recorder.create_execution_context = lambda config=None: None  # type: ignore[method-assign]
    with pytest.raises(BackendFailure, match="needs 1 MiB of GPU memory to run, 1024 MiB are free"):
        backend.sample(*inputs(spec, 1))


def test_a_failed_run_gives_its_lane_back(played, spec: SamplerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    make, recorder = played
    backend = make()
    monkeypatch.setattr(Context, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(BackendFailure, match="refused to run"):
        backend.sample(*inputs(spec, 1))
    assert recorder.live == set()


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_the_real_library_refuses_without_a_gpu(
    engine: Path, spec: SamplerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineHost, "here", classmethod(lambda cls, **_: HOST))
    monkeypatch.setattr(trt_backend, "Cuda", lambda index, extra: None)
    with pytest.raises(IncompatibleEngineError, match=r"cannot run here: .*Build it again: scm-export engine"):
        open_backend(engine, spec)


def test_host_code_runs_only_from_who_is_trusted(engine, spec, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[bool] = []

    class Runtime:
        def __init__(self, log: Any) -> None: ...
        def get_engine_validity(self, blob: bytes) -> tuple[Any, int]:
            return trt.EngineValidity.VALID, 0

        def deserialize_cuda_engine(self, blob: bytes) -> None:
            allowed.append(getattr(self, "engine_host_code_allowed", False))

    monkeypatch.setattr(EngineHost, "here", classmethod(lambda cls, **_: HOST))
    monkeypatch.setattr(trt_backend, "Cuda", lambda index, extra: None)
    monkeypatch.setattr(trt_backend, "is_trusted", lambda sha256: False)
    fake = types.SimpleNamespace(Runtime=Runtime, EngineValidity=trt.EngineValidity, ILogger=trt.ILogger)
    monkeypatch.setattr(trt_backend, "load_flavour", lambda flavour, purpose: fake)
    with pytest.raises(IncompatibleEngineError):
        open_backend(engine, spec)
    assert allowed == [False], "a plain engine needs no such leave"
    rewrite(engine, facts=msgspec.structs.replace(record_of(engine).facts, version_compatible=True))
    with pytest.raises(BackendUnavailable, match="holds code that runs on the host, expected one that you trust"):
        open_backend(engine, spec)
    assert allowed == [False]
    with pytest.raises(IncompatibleEngineError):
        open_backend(engine, spec, trust_engines=True)
    assert allowed == [False, True]
