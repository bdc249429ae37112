"""The TensorRT backend's calls, in order: what a run does to the library and the driver, here both played."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from helpers.engine_helpers import record_of, rewrite
from helpers.played_gpu import inputs, trt
from scm_sdk.errors import BackendFailure, IncompatibleEngineError, ShapeError
from scm_sdk.spec import SamplerSpec


@pytest.fixture
def spec(engine: Path) -> SamplerSpec:
    return record_of(engine).spec


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
    (context,) = backend._pool._idle
    once = [("order", "theirs", context.stream), ("execute", 1, context.stream), ("order", context.stream, "theirs")]
    assert recorder.calls == once * 2, "one context for both, and no thread waits for the GPU"
    backend.sample(noise, labels)
    assert recorder.contexts == 2, "a context with memory of its own is another"
    before = recorder.live.copy()
    with pytest.raises(KeyError), backend._pool.context(2, buffers=False):
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
