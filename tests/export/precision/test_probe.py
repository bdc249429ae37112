"""The probe: its images are those of one thread whatever the batch, and a small graph is measured on all cores."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from scm_sdk.export.graph.io import write_beside, write_model
from scm_sdk.export.precision import probe as module
from scm_sdk.export.precision.half import apply_precision, default_plan
from scm_sdk.export.precision.probe import RANKED_SAMPLES, Probe
from scm_sdk.export.precision.session import open_session
from scm_sdk.spec import SamplerSpec


@pytest.fixture
def small(fp32: ir.Model, spec: SamplerSpec, monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    return Probe(fp32, spec, num_samples=12, batch_size=5)


@pytest.fixture
def large(fp32: ir.Model, spec: SamplerSpec, monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.setattr(module, "SMALL_GRAPH", 0)
    return Probe(fp32, spec, num_samples=12, batch_size=5)


def test_weights_in_the_file_of_another_graph_count(fp32: ir.Model, tmp_path: Path) -> None:
    """As those of a further image size of a bundle are stored."""
    first, path = tmp_path / "model.onnx", tmp_path / "model-16x32.onnx"
    write_model(fp32, first, external_data_above=0)
    write_beside(fp32, path, first)
    assert module._num_bytes(path) == module._num_bytes(first) == module._num_bytes(fp32) > 0


def test_the_decoder_counts(fp32: ir.Model, spec: SamplerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each concurrent measurement opens it."""
    latents, images = ir.val("latents", ir.DataType.FLOAT, ["batch", *spec.image_shape]), ir.Value(name="images")
    shift = ir.val("shift", const_value=ir.tensor(np.ones(spec.image_shape, np.float32), name="shift"))
    add = ir.Node("", "Add", [latents, shift], outputs=[images])
    images.shape, images.dtype = latents.shape, latents.dtype
    graph = ir.Graph([latents], [images], nodes=[add], initializers=[shift], opset_imports={"": 20}, name="decoder")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "decoder.onnx")
    monkeypatch.setattr(module, "SMALL_GRAPH", module._num_bytes(fp32))
    assert Probe(fp32, spec, num_samples=1).num_threads == 1
    assert Probe(fp32, spec, num_samples=1, decoder=tmp_path / "decoder.onnx").num_threads is None


def test_a_small_graph_is_measured_on_all_cores(small: Probe) -> None:
    together = threading.Barrier(2)  # it opens only to two calls at once

    def wait(item: int) -> int:
        together.wait(60)
        return item * item

    assert small.num_threads == 1
    assert list(small.map(wait, iter(range(6)))) == [0, 1, 4, 9, 16, 25]
    assert list(small.map(lambda item: threading.current_thread(), [0])) == [threading.current_thread()]


def test_a_large_graph_takes_one_item_at_a_time(large: Probe) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(3):
            made.append(i)
            yield i

    assert large.num_threads is None, "the library's threads"
    results = large.map(lambda item: threading.current_thread(), items())
    assert next(results) is threading.current_thread() and made == [0], "graphs are made when they are measured"


def test_a_small_graph_takes_few_items_ahead(small: Probe) -> None:
    """Each may be a graph, and int8-cpu calibrates to make one."""
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    for number, result in enumerate(small.map(lambda item: item, items())):
        assert result == number and len(made) - number <= 3
    assert len(made) == 100


def test_what_fails_stops_the_others(small: Probe) -> None:
    begun: list[int] = []

    def fail(item: int) -> None:
        begun.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(small.map(fail, range(1000)))
    assert len(begun) <= 3


@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit])
def test_what_stops_the_search_stops_the_others(small: Probe, raised: type[BaseException]) -> None:
    begun: list[int] = []
    results = small.map(begun.append, range(1000))
    next(results)
    with pytest.raises(raised):
        results.throw(raised)
    assert len(begun) <= 3
    assert not [each for each in threading.enumerate() if each.name.startswith("scm-probe")], "all have ended"


def test_a_model_is_the_same_while_it_is_written(
    fp32: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads may read or write it: onnx_ir lets the weights of what it writes refer to the new file."""
    before = {name: value.const_value for name, value in fp32.graph.initializers.items()}
    during: list[dict[str, ir.TensorProtocol | None]] = []
    write = onnx.save

    def save(*args: Any, **kwargs: Any) -> None:
        during.append({name: value.const_value for name, value in fp32.graph.initializers.items()})
        write(*args, **kwargs)

    monkeypatch.setattr(onnx, "save", save)
    open_session(fp32, tmp_path)
    assert [{name for name in each if each[name] is not before[name]} for each in during] == [set()]


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_images_depend_neither_on_the_batch_nor_on_the_cores(
    fp32: ir.Model, spec: SamplerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    low = apply_precision(fp32, default_plan("fp16"))
    monkeypatch.setattr(module, "usable_cores", lambda: 3)
    probe = Probe(fp32, spec, num_samples=12, batch_size=batch_size)
    session = open_session(low, tmp_path, num_threads=1)
    feeds = [module.feeds_of(spec, [seed]) for seed in module.SELECTION[:12]]
    one_by_one = np.concatenate([session.run(None, each)[0] for each in feeds])
    np.testing.assert_array_equal(probe.run(low), one_by_one)
    with ThreadPoolExecutor(2) as threads:
        ranks = list(threads.map(probe.rank_db, [low, low]))
    count = min(batch_size or RANKED_SAMPLES, spec.max_batch, RANKED_SAMPLES)
    mean = np.mean([probe._compare(one_by_one[i : i + 1], i).psnr_db for i in range(count)])
    assert ranks == [mean, mean]
