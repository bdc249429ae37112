"""What keeps an engine from running, found before any GPU is asked: damage, another machine, no trust.

The engine is real, and so is every refusal.
"""

import dataclasses
import shutil
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers.engine_helpers import record_of, rewrite
from helpers.played_gpu import HOST, L4, host, trt
from helpers.recorded_events import Recorded
from scm_sdk._util.gpu import Gpu, gpus
from scm_sdk.engines.compatibility import EngineHost
from scm_sdk.errors import BackendUnavailable, ConfigError, IncompatibleEngineError, IntegrityError, SchemaError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.inference.generator import Generator
from scm_sdk.runtimes.tensorrt import backend, device_memory
from scm_sdk.runtimes.tensorrt.backend import open_backend
from scm_sdk.runtimes.tensorrt.device_memory import Buffer, Cuda, OutOfMemory
from scm_sdk.runtimes.tensorrt.engine_file import read_engine
from scm_sdk.spec import SamplerSpec


@pytest.fixture
def spec(engine: Path) -> SamplerSpec:
    return record_of(engine).spec


def test_a_good_engine_passes_every_check(engine: Path, spec: SamplerSpec) -> None:
    record, blob = read_engine(engine, spec, HOST)
    assert len(blob) == record.engine_bytes and record.precision == "fp16"


def test_damage_is_found_before_the_library_sees_it(engine: Path, spec: SamplerSpec) -> None:
    good = engine.read_bytes()
    engine.write_bytes(good[:-1])
    with pytest.raises(IntegrityError, match=r"has \d+ bytes, expected \d+: .*scm-export engine"):
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
    with pytest.raises(IntegrityError, match="Expected it next to the engine"):
        read_engine(engine, spec, HOST)


def test_an_engine_of_another_sampler_is_refused(engine: Path, spec: SamplerSpec) -> None:
    with pytest.raises(IntegrityError, match="another sampler: times differ"):
        read_engine(engine, msgspec.structs.replace(spec, times=(1.5,)), HOST)


@pytest.mark.parametrize(
    ("changes", "machine", "error", "message"),
    [
        ({}, {"gpu": None}, BackendUnavailable, "no NVIDIA GPU here, expected one of compute capability 8.9"),
        ({}, {"versions": {}}, BackendUnavailable, r"not installed, expected .*pip install 'tensorrt-rtx-cu13>="),
        ({}, {"platform": "windows-amd64"}, IncompatibleEngineError, "was built for .*this is windows-amd64"),
        ({}, {"versions": {"tensorrt_rtx": "1.8.0.1"}}, IncompatibleEngineError, r"1\.8\.0\.1 is installed"),
        ({}, {"gpu": Gpu(index=0, name="T4", compute_capability="7.5", memory_bytes=1, driver="12.0")},
         IncompatibleEngineError, r"built for 8\.9, this T4 is 7\.5; .*--target sm_75"),
        ({"flavor": "tensorrt"}, {}, BackendUnavailable, r"pip install 'tensorrt>="),
    ],
)  # fmt: skip
def test_each_reason_has_its_own_message(engine, spec, changes, machine, error, message) -> None:
    rewrite(engine, **changes)
    with pytest.raises(error, match=message):
        read_engine(engine, spec, host(**machine))


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_without_a_gpu_the_other_backends_go_on(engine_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))
    with Generator.from_pretrained(bundle, num_inference_steps=1) as gen:
        assert gen(1, class_labels=[0]).info.backend == "torch", "nothing else was compared yet"
        (row,) = (row for row in gen.plan() if row.backend == "tensorrt_rtx")
        assert row.reason == "no NVIDIA GPU here"
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU here"):
        Generator.from_pretrained(bundle, backend="tensorrt_rtx", num_inference_steps=1)
    engine = bundle / "engines/tensorrt_rtx-sm89-fp16-1step/model.engine"
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU here"):
        open_backend(engine, record_of(engine).spec)
    events = Recorded()
    results = validate_bundle(bundle, precisions=["fp16"], num_seeds=2, batches=[1], events=events)
    assert results and any("tensorrt_rtx" in line and "no NVIDIA GPU" in line for line in events.skipped)


def test_the_device_is_a_gpu(engine: Path, spec: SamplerSpec) -> None:
    for device in ("cpu", "cuda:x", "gpu"):
        with pytest.raises(ConfigError, match=r"expected .*'cuda' or 'cuda:N'"):
            open_backend(engine, spec, device=device)


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_the_cuda_runtime_says_what_it_misses() -> None:
    with pytest.raises(BackendUnavailable, match="the CUDA runtime sees 0 GPUs"):
        Cuda(0, extra="tensorrt-rtx")


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


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_the_real_library_refuses_without_a_gpu(
    engine: Path, spec: SamplerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineHost, "here", classmethod(lambda cls, **_: HOST))
    monkeypatch.setattr(backend, "Cuda", lambda index, extra: None)
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
    monkeypatch.setattr(backend, "Cuda", lambda index, extra: None)
    monkeypatch.setattr(backend, "is_trusted", lambda sha256: False)
    fake = types.SimpleNamespace(Runtime=Runtime, EngineValidity=trt.EngineValidity, ILogger=trt.ILogger)
    monkeypatch.setattr(backend, "load_flavor", lambda flavor, purpose: fake)
    with pytest.raises(IncompatibleEngineError):
        open_backend(engine, spec)
    assert allowed == [False], "a plain engine needs no such leave"
    rewrite(engine, facts=msgspec.structs.replace(record_of(engine).facts, version_compatible=True))
    with pytest.raises(BackendUnavailable, match="holds code that runs on the host"):
        open_backend(engine, spec)
    assert allowed == [False]
    with pytest.raises(IncompatibleEngineError):
        open_backend(engine, spec, trust_engines=True)
    assert allowed == [False, True]
