"""Promises of the documents that a changed line would break without any other test failing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.batching import PLAIN
from scm_sdk.inference.backends import open_backend
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.latency_cache import recall, remember
from scm_sdk.inference.selection import Measured
from scm_sdk.runtimes.tensorrt.context_pool import MAX_IDLE_CONTEXTS, ContextPool

GRAPH = "onnx/fp32/2step/model.onnx"


class Context:
    """What a pool keeps of a GPU's execution context."""

    def __init__(self, batch: int, has_buffers: bool) -> None:
        self.batch, self.has_buffers, self.closed = batch, has_buffers, False

    def close(self) -> None:
        self.closed = True


def test_the_execution_context_that_was_unused_longest_goes_first() -> None:
    made: dict[int, Context] = {}

    def make(batch: int, buffers: bool) -> Any:
        assert batch not in made, "one that is kept is used again"
        return made.setdefault(batch, Context(batch, buffers))

    def use(batch: int) -> None:
        with pool.context(batch):
            pass

    pool = ContextPool(make, name="tensorrt")
    for batch in range(MAX_IDLE_CONTEXTS):
        use(batch)
    use(0), use(2)  # now the most recent
    gone = []
    for batch in range(100, 104):
        use(batch)
        gone += [each for each in made if made[each].closed and each not in gone]
    assert gone == [1, 3, 4, 5]
    use(0), use(2)


def test_openvino_compiles_each_size_once(linear_graph: Callable[..., None], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    linear_graph(tmp_path / "model.onnx", PLAIN)
    backend: Any = open_backend("openvino", tmp_path / "model.onnx", PLAIN)
    noise = [np.zeros((4, *PLAIN.sample_shape), np.float32)] * 2
    labels = np.zeros(4, np.int64)
    seen: dict[int, Any] = {}
    for batch in (1, 4, 3, 2, 1, 4):
        backend.sample([array[:batch] for array in noise], {"class_labels": labels[:batch]})
        assert seen.items() <= backend._compiled.items()
        seen = dict(backend._compiled)
    assert set(seen) == {1, 4}
    backend.close()


def test_a_latency_belongs_to_its_number_of_threads() -> None:
    where = {"num_inference_steps": 2, "device": None}
    key = ("onnxruntime", GRAPH, "fp32")
    for threads, ms in [(None, 1.0), (1, 2.0), (4, 3.0)]:
        remember({key: Measured(ms, 1)}, "build", num_threads=threads, **where)
    assert [recall("build", num_threads=threads, **where).get(key) for threads in (None, 1, 4, 2)] == [
        (1.0, 1), (2.0, 1), (3.0, 1), None,
    ]  # fmt: skip


@pytest.mark.parametrize("chosen", ["nothing", "high", "backends"])
def test_torch_computes_float32_as_float32_on_a_gpu(chosen: str, unet_checkpoint: Path, ort: Generator) -> None:
    """Without TF32, whichever of PyTorch's two ways the program has used to switch it on; and leaves that as it was."""
    switches: list[tuple[Any, str]] = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    if newer:
        where = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        switches = [(each, "fp32_precision") for each in where]
    elif chosen == "backends":
        pytest.skip("this PyTorch has one way only")
    start = [getattr(*switch) for switch in switches]
    backend: Any = open_backend("torch", unet_checkpoint, ort.opened(2).spec)
    backend.device = "cuda:0"  # no GPU is touched: only the switches of the process
    try:
        if chosen == "high":
            torch.set_float32_matmul_precision("high")
        elif chosen == "backends":
            for each in switches:
                setattr(*each, "tf32")
        before = [getattr(*switch) for switch in switches]
        with backend._settings():
            assert [getattr(*switch) for switch in switches] == ["ieee" if newer else False] * len(switches)
        assert [getattr(*switch) for switch in switches] == before
        assert chosen == "backends" or torch.backends.cudnn.allow_tf32, "the older way is as it was, too"
    finally:
        for switch, value in zip(switches, start, strict=True):
            setattr(*switch, value)


def test_onnxruntime_computes_float32_as_float32_on_a_gpu() -> None:
    from scm_sdk.runtimes.ort_backend import _cuda_options

    assert _cuda_options(1) == {"device_id": "1", "use_tf32": "0"}


def test_engines_compute_float32_as_float32(
    linear_graph: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from helpers.engine_helpers import options
    from scm_sdk.export.engines import builder, engine

    class Configured(Exception):
        pass

    def stop(self: Any) -> Any:
        config = configure(self)
        assert not config.get_flag(trt.BuilderFlag.TF32)
        raise Configured

    configure = builder.Build._configure
    monkeypatch.setattr(builder.Build, "_configure", stop)
    linear_graph(tmp_path / "model.onnx", PLAIN)
    with pytest.raises(Configured):
        engine.build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", options(batch=(1, 2, 4)))


def test_onnxruntimes_threads_do_not_spin(linear_bundle: Callable[..., Path]) -> None:
    with Generator.from_pretrained(linear_bundle(PLAIN), backend="onnxruntime") as gen:
        backend: Any = gen.opened().backend
        options = backend._session.get_session_options()
    for kind in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{kind}.allow_spinning") == "0"


@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_training_scales_a_large_gradient_down_to_its_limit(limit: float, npz: Path, tmp_path: Path) -> None:
    from helpers.small_runs import fresh
    from scm_sdk.train.loop import Feed, _step

    run = fresh(npz, tmp_path, grad_clip=limit)
    with Feed(run.config, run.data, run.rows) as feed:
        step = _step(run, feed(0), stop=0)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None]))
    assert step.norm > 0.01, "what is reported is the norm before"
    assert float(norm) == pytest.approx(limit or step.norm, rel=1e-3)
