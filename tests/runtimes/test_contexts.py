"""Execution contexts of the TensorRT backend under failures, low memory and threads: nothing is lost or kept."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.engine_helpers import record_of
from helpers.played_gpu import Context, PlayedBuffer, inputs
from scm_sdk.errors import BackendFailure
from scm_sdk.runtimes.tensorrt.context_pool import MAX_IDLE_CONTEXTS
from scm_sdk.runtimes.tensorrt.device_memory import OutOfMemory
from scm_sdk.spec import SamplerSpec


@pytest.fixture
def spec(engine: Path) -> SamplerSpec:
    return record_of(engine).spec


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


def test_a_lane_that_cannot_be_set_up_leaves_nothing(played, spec: SamplerSpec, monkeypatch) -> None:
    make, recorder = played
    backend = make()
    with monkeypatch.context() as patch:

        def foreign(self: Context) -> list[str]:
            raise RuntimeError("a pybind exception")

        patch.setattr(Context, "infer_shapes", foreign)
        with pytest.raises(BackendFailure, match="RuntimeError: a pybind exception"):
            backend.sample(*inputs(spec, 1))
    made: list[PlayedBuffer] = []

    def second_fails(*args: Any) -> PlayedBuffer:
        if made:
            raise OutOfMemory("full")
        made.append(PlayedBuffer(*args))
        return made[-1]

    monkeypatch.setattr("scm_sdk.runtimes.tensorrt.context.Buffer", second_fails)
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
    assert [context.batch for context in backend._pool._idle] == [3]
    backend.close()
    assert recorder.live == set()


def test_close_waits_for_the_call_that_runs(played, spec: SamplerSpec, monkeypatch) -> None:
    make, recorder = played
    backend = make()
    inside, go_on = threading.Event(), threading.Event()
    execute = Context.execute_async_v3

    def slow(self: Context, stream: int) -> bool:
        inside.set()
        assert go_on.wait(120)
        return execute(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", slow)
    noise, labels = inputs(spec, 1)
    found: list[np.ndarray] = []
    caller = threading.Thread(target=lambda: found.append(backend.sample(noise, labels)))
    closer = threading.Thread(target=backend.close)
    caller.start()
    assert inside.wait(120)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive() and recorder.live, "the call still uses its context"
    go_on.set()
    caller.join(10), closer.join(10)
    np.testing.assert_array_equal(found[0], noise[0])
    assert recorder.live == set()


def test_idle_lanes_are_few(played, spec: SamplerSpec) -> None:
    make, recorder = played
    backend = make()
    threads = [threading.Thread(target=lambda: backend.sample(*inputs(spec, 2))) for _ in range(3 * MAX_IDLE_CONTEXTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(backend._pool._idle) <= MAX_IDLE_CONTEXTS
    backend.close()
    assert recorder.live == set()


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
