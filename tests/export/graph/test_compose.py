"""Passes, composition and writing, on small handwritten graphs: no torch, no exporter."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from scm_sdk.errors import ConfigError, ExportError, UnsupportedGraphError
from scm_sdk.export.graph import cleanup
from scm_sdk.export.graph.compose import compose_sampler
from scm_sdk.export.graph.io import write_model
from scm_sdk.export.graph.network import NetworkGraph
from scm_sdk.export.precision.session import open_session
from scm_sdk.spec import SamplerSpec

# F = tanh(x) @ w, modulated by cos(t): by broadcasting, and as a column next to the samples.
MODULATED = """
    batch = Shape <start = 0, end = 1> (x)
    times = Expand(t, batch)
    column = Unsqueeze(times, axis)
    wave = Cos(column)
    wide = Concat <axis = 1> (x, wave)
    bent = Tanh(wide)
    mixed = MatMul(bent, w)
    F = Mul(mixed, wave)
"""
WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def network(body: str, inputs: str = "float[N,3] x, float[1] t", **weights: np.ndarray) -> ir.Model:
    """Parse a network with output F and give it weights; ``axis`` is 1 and ``eight`` is 8."""
    header = '<ir_version: 10, opset_import: ["" : 20, "far" : 1]>'
    proto = onnx.parser.parse_model(f"{header} network ({inputs}) => (float[N,3] F) {{{body}}}")
    weights |= {"axis": np.array([1]), "eight": np.array(8.0, np.float32)}
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if name in used
    )
    return ir.from_proto(proto)


def graph_of(body: str, spec: SamplerSpec, **weights: np.ndarray) -> NetworkGraph:
    """Clean a hand-written network."""
    model = cleanup.clean(network(body, **weights))
    return NetworkGraph(model=model, spec=spec, versions={}, num_nodes_exported=0)


MODULATED_GRAPH = graph_of(MODULATED, SamplerSpec(times=(1.0,), sample_shape=(3,)), w=WEIGHT)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Run a model with numpy."""
    (out,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    return np.asarray(out)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


times = st.lists(st.floats(0.01, 1.57), min_size=1, max_size=4, unique=True).map(
    lambda ts: tuple(sorted(ts, reverse=True))
)


@given(times, st.floats(0.1, 4), st.sampled_from([1, 2, 5]), st.integers(0, 99))
def test_algebra_of_the_sampler(times, sigma_data, batch, seed):
    """Any times, scale and batch: the graph is the recursion of its definition, in float64."""
    spec = SamplerSpec(times=times, sample_shape=(3,), sigma_data=sigma_data)
    sampler = compose_sampler(dataclasses.replace(MODULATED_GRAPH, spec=spec), spec)
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal((batch, 3)).astype(np.float32) for _ in times]
    x_0 = np.zeros((batch, 3))
    for t, z in zip(times, noise, strict=True):
        x_t = math.cos(t) * x_0 + math.sin(t) * sigma_data * z
        wide = np.concatenate([x_t / sigma_data, np.full((batch, 1), math.cos(t))], axis=1)
        F = np.tanh(wide) @ WEIGHT * math.cos(t)
        x_0 = math.cos(t) * x_t - math.sin(t) * sigma_data * F
    images = run(sampler, {f"noise_{i}": z for i, z in enumerate(noise)})
    np.testing.assert_allclose(images, x_0, rtol=1e-5, atol=1e-5 * sigma_data)


def test_time_is_one_row_where_that_broadcasts_and_repeated_where_not():
    spec = SamplerSpec(times=(1.5, 1.1), sample_shape=(3,))
    sampler = compose_sampler(graph_of(MODULATED, spec, w=WEIGHT), spec)
    step = ["Shape", "Concat", "Expand", "Concat", "Tanh", "MatMul", "Mul"]
    found = [op for op in ops(sampler) if op not in ("Add", "Sub", "Div")]
    assert found == ["Mul", *step, "Mul", "Mul", "Mul", "Mul", *step, "Mul", "Mul"]
    wave = sampler.graph.initializers["step1/Cos.out"]
    assert wave.shape == (1, 1)
    assert wave.const_value.numpy() == pytest.approx(math.cos(1.1))


def test_network_that_ignores_its_samples():
    body = """
        shape = Shape(x)
        sine = Sin(t)
        F = Expand(sine, shape)
    """
    spec = SamplerSpec(times=(1.2,), sample_shape=(3,))
    sampler = compose_sampler(graph_of(body, spec), spec)
    noise = np.ones((4, 3), np.float32)
    expected = math.cos(1.2) * math.sin(1.2) * 0.5 * noise - math.sin(1.2) * 0.5 * math.sin(1.2)
    np.testing.assert_allclose(run(sampler, {"noise_0": noise}), expected, rtol=1e-6)


def test_network_that_mixes_the_times_of_samples():
    body = """
        batch = Shape <start = 0, end = 1> (x)
        times = Expand(t, batch)
        sums = CumSum(times, zero)
        column = Unsqueeze(sums, axis)
        F = Mul(x, column)
    """
    spec = SamplerSpec(times=(1.2,), sample_shape=(3,))
    with pytest.raises(UnsupportedGraphError, match=r"'Unsqueeze.out' depends on the time .* must not mix"):
        compose_sampler(graph_of(body, spec, zero=np.array(0)), spec)


def test_constants_are_folded_but_no_large_weight_is_stored_twice(monkeypatch):
    monkeypatch.setattr(cleanup, "SMALL_CONSTANT", 16)
    normalized = "scaled = Div(w, eight) F = MatMul(x, scaled)"
    both = "scaled = Div(w, eight) a = MatMul(x, scaled) F = MatMul(a, w)"
    square = WEIGHT[:3]
    folded = cleanup.clean(network(normalized, w=square))
    assert ops(folded) == ["MatMul"]
    (weight,) = folded.graph.initializers.values()
    np.testing.assert_array_equal(weight.const_value.numpy(), square / 8)
    kept = cleanup.clean(network(both, w=square))
    assert ops(kept) == ["Div", "MatMul", "MatMul"]
    monkeypatch.setattr(cleanup, "SMALL_CONSTANT", 1000)
    assert ops(cleanup.clean(network(both, w=square))) == ["MatMul", "MatMul"]


def test_shapes_know_the_batch_behind_a_reshape():
    body = """
        head = Shape(x)
        rows = Reshape(x, flat)
        same = Tanh(rows)
        F = Reshape(same, head)
    """
    model = cleanup.clean(network(body, flat=np.array([-1, 1])))
    rows, same, out = (node.outputs[0] for node in model.graph)
    assert [str(d) for d in rows.shape] == [str(d) for d in same.shape] == ["3*batch", "1"]
    assert [str(d) for d in out.shape] == ["batch", "3"]
    target = list(model.graph)[-1].inputs[1]
    assert target.const_value.numpy().tolist() == [-1, 3]


@pytest.mark.parametrize(
    ("body", "inputs", "message"),
    [
        ("F = far.Magic(x)", None, r"far::Magic, expected standard ONNX operators"),
        ("n = NonZero(x) F = Identity(x)", None, r"\(NonZero\) has an output whose size depends on values"),
        ("F = Magic(x)", None, r"'F' \(Magic\) could not be inferred"),
        ("F = MatMul(x, x)", None, "shape inference failed: .*Incompatible dimensions"),
        ("F = Concat <axis = 1> (x, y)", "float[N,3] x, float[M,3] y", r"2 symbolic dimensions \['M', 'N'\]"),
        ("F = Tanh(x)", "float[2,3] x", "fixes the batch size"),
        ("n = RandomNormalLike(x) F = Add(x, n)", None, "draws random numbers inside the network"),
        (
            "c = Greater(t, t) F = If (c) <then_branch = a () => (float[N,3] p) { p = Tanh(x) }, "
            "else_branch = b () => (float[N,3] q) { q = Identity(x) }>",
            None,
            r"\(If\) holds a subgraph.*torch\.where",
        ),
    ],
    ids=["domain", "nonzero", "operator", "mismatch", "dims", "fixed", "random", "if"],
)
def test_graphs_that_are_refused(body, inputs, message):
    with pytest.raises(UnsupportedGraphError, match=message):
        cleanup.clean(network(body, inputs or "float[N,3] x, float[1] t"))


@pytest.fixture
def sampler() -> ir.Model:
    """Two steps with a weight of 12 kB."""
    spec = SamplerSpec(times=(1.5, 1.1), sample_shape=(3,))
    up = np.random.default_rng(1).standard_normal((3, 1000)).astype(np.float32) / 30
    body = "a = MatMul(x, up) b = Tanh(a) F = MatMul(b, down)"
    return compose_sampler(graph_of(body, spec, up=up, down=up.T.copy()), spec)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_large_weights_get_a_file_of_their_own(sampler, tmp_path):
    path = tmp_path / "new" / "model.onnx"
    inside = write_model(sampler, tmp_path / "inside.onnx")
    outside = write_model(sampler, path, external_data_above=1000)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert outside.bytes < 6000 < 24_000 == outside.data_bytes < inside.bytes < 30_000
    assert outside.data_path == path.with_name("model.onnx_data")
    assert outside.data_bytes == outside.data_path.stat().st_size
    assert (inside.data_path, inside.data_bytes, inside.data_sha256) == (None, 0, "")
    assert outside.data_path.stat().st_mode == path.stat().st_mode
    noise = np.random.default_rng(2).standard_normal((2, 5, 3)).astype(np.float32)
    images = [
        ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(
            None, {"noise_0": noise[0], "noise_1": noise[1]}
        )[0]
        for p in (path, inside.path)
    ]
    np.testing.assert_array_equal(*images)
    assert write_model(sampler, path, external_data_above=1000) == outside
    # Back to one file: the earlier data file must not stay.
    write_model(sampler, path)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == inside.path.read_bytes()


def test_a_split_into_many_parts_runs_with_its_weights_apart(tmp_path):
    """ONNX Runtime reads a Split's sizes only where they are in the graph; a table of labels is split into hundreds."""
    parts = 600
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["batch", parts]), type=kind)
    sizes = ir.val("sizes", const_value=ir.tensor(np.ones(parts, np.int64), name="sizes"))
    outs = [ir.Value(name=f"y{i}", shape=ir.Shape(["batch", 1]), type=kind) for i in range(parts)]
    split = ir.Node("", "Split", [x, sizes], [ir.AttrInt64("axis", 1)], outputs=outs, name="split")
    graph = ir.Graph([x], outs[-1:], nodes=[split], initializers=[sizes], opset_imports={"": 20}, name="parts")
    model = ir.Model(graph, ir_version=10)
    feeds = {"x": np.arange(2 * parts, dtype=np.float32).reshape(2, parts)}
    report = write_model(model, tmp_path / "model.onnx", external_data_above=0)
    for session in (open_session(report.path, tmp_path), open_session(model, tmp_path)):
        np.testing.assert_array_equal(session.run(None, feeds)[0], feeds["x"][:, -1:])
        with pytest.raises(UnsupportedGraphError, match="cannot run this fp32 graph"):
            session.run(None, {"x": feeds["x"][:, 1:]})


@pytest.mark.parametrize("failing_rename", [1, 2, 3])
def test_a_failed_write_changes_nothing(sampler, tmp_path, monkeypatch, failing_rename):
    write_model(sampler, tmp_path / "model.onnx", external_data_above=0)
    before = _tree(tmp_path)
    calls, real = 0, os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        nonlocal calls
        calls += tmp_path in (Path(source).parent, Path(target).parent)
        if calls == failing_rename:
            calls += 1  # only this one: putting things back must work
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    sampler.graph.initializers["MatMul.in1"].const_value = ir.tensor(np.zeros((3, 1000), np.float32), name="MatMul.in1")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ExportError, match=r"model\.onnx cannot be written: Input/output error"):
        write_model(sampler, tmp_path / "model.onnx", external_data_above=0)
    assert calls > failing_rename
    assert _tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]


def test_a_disk_that_fills_up_leaves_nothing(sampler, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        assert any(tmp_path.iterdir())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="No space left on device"):
        write_model(sampler, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_graph_is_not_written(sampler, tmp_path):
    next(iter(sampler.graph)).op_type = "Multiply"
    with pytest.raises(UnsupportedGraphError, match=r"onnx\.checker refused the graph: .*Multiply"):
        write_model(sampler, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(sampler, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match=r"cannot be written: .*choose another place"):
        write_model(sampler, tmp_path / "file" / "model.onnx")
    with pytest.raises(ConfigError, match="external_data_above is 4294967296, expected at most"):
        write_model(sampler, tmp_path / "model.onnx", external_data_above=2**32)
