"""Each fault of a runtime in its smallest graph: shown where the runtime is installed, found by its rule, avoided."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner

from scm_sdk.bundle.bundle import publish_bundle, write_bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import UnsupportedGraphError
from scm_sdk.export.cli import main
from scm_sdk.export.edge.portability import RULES, find_faults, portable_form, require_portable
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.probe import feeds_of
from scm_sdk.spec import SamplerSpec

X = np.random.default_rng(0).uniform(0.5, 1.5, (2, 3, 16)).astype(np.float32)
INPUT_REDUCTIONS = ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"]


def value(name: str, shape: Sequence[int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def reduction(op_type: str, opset: int) -> ir.Model:
    """Reduce the last of three axes, which is an attribute before opset 18 and an input since."""
    x, y = value("x", X.shape), value("y", (2, 3, 1))
    axes = ir.val("axes", const_value=ir.tensor(np.array([2]), name="axes"))
    as_input = opset >= 18
    attributes = [ir.AttrInt64("keepdims", 1), *([] if as_input else [ir.AttrInt64s("axes", [2])])]
    node = ir.Node("", op_type, [x, axes] if as_input else [x], attributes, outputs=[y], name="reduce")
    stored = [axes] if as_input else []
    graph = ir.Graph([x], [y], nodes=[node], initializers=stored, opset_imports={"": opset}, name="reduction")
    return ir.Model(graph, ir_version=8)


def split(parts: int, axis: int = 2) -> ir.Model:
    """Split the last axis into parts of one and take the difference of the last two."""
    x, outs = value("x", (2, 3, parts)), [value(f"part_{i}", (2, 3, 1)) for i in range(parts)]
    sizes = ir.val("sizes", const_value=ir.tensor(np.ones(parts, np.int64), name="sizes"))
    y = value("y", (2, 3, 1))
    nodes = [
        ir.Node("", "Split", [x, sizes], [ir.AttrInt64("axis", axis)], outputs=outs, name="cut"),
        ir.Node("", "Sub", outs[-2:], outputs=[y], name="difference"),
    ]
    graph = ir.Graph([x], [y, outs[0]], nodes=nodes, initializers=[sizes], opset_imports={"": 20}, name="split")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray, folder: Path) -> list[np.ndarray]:
    ir.save(model, folder / "graph.onnx")
    session = onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))  # pyright: ignore[reportReturnType]


def names(model: ir.Model, **options: str) -> list[str]:
    return [finding.rule.name for finding in find_faults(model, **options)]


@pytest.mark.parametrize("op_type", ["ReduceL1", "ReduceLogSum", "ReduceLogSumExp"])
def test_openvino_reduces_over_all_axes_before_opset_18(op_type: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    faulty, right = reduction(op_type, 17), reduction(op_type, 18)
    shapes = []
    for model in (faulty, right):
        ir.save(model, tmp_path / "graph.onnx")
        shapes.append(openvino.compile_model(tmp_path / "graph.onnx", "CPU")(X)[0].shape)
    assert shapes[1] == (2, 3, 1), "since opset 18 it is right"
    assert shapes[0] == (1, 1, 1), "the fault is gone: name the version in the rule that it was last seen in"
    assert run(faulty, X, tmp_path)[0].shape == (2, 3, 1), "ONNX Runtime does what the standard says"
    assert names(faulty, runtime="openvino") == ["reduction-axes-attribute"] and not names(right, runtime="openvino")
    with pytest.raises(UnsupportedGraphError, match=r"openvino .*reduces over all axes.*: reduce\. Expected opset 18"):
        portable_form(faulty, "openvino")


@pytest.mark.parametrize("op_type", ["ReduceL2", "ReduceSumSquare", "ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("opset", [17, 18])
def test_openvino_is_right_about_the_others(op_type: str, opset: int, tmp_path: Path) -> None:
    if op_type == "ReduceSum" and opset < 18:
        return  # its axes are an input since opset 13
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model = reduction(op_type, opset)
    (want,) = run(model, X, tmp_path)
    np.testing.assert_allclose(openvino.compile_model(tmp_path / "graph.onnx", "CPU")(X)[0], want, rtol=1e-6)
    assert not names(model, runtime="openvino")


@pytest.mark.parametrize("op_type", INPUT_REDUCTIONS)
def test_a_reduction_whose_axes_are_an_input_is_rewritten_for_mnn(op_type: str, tmp_path: Path) -> None:
    model = reduction(op_type, 20)
    assert names(model, runtime="mnn") == ["reduction-axes-input"] and not names(reduction(op_type, 17), runtime="mnn")
    if op_type == "ReduceLogSumExp":
        with pytest.raises(UnsupportedGraphError, match=r"mnn .*reduces over all axes.*: reduce\. Expected"):
            portable_form(model, "mnn")
        return
    made = portable_form(model, "mnn")
    assert not names(made, runtime="mnn") and "ReduceSum" in {node.op_type for node in made.graph}
    np.testing.assert_allclose(run(made, X, tmp_path)[0], run(model, X, tmp_path)[0], rtol=1e-6)
    assert [node.op_type for node in model.graph] == [op_type], "the model itself is not changed"


_RUN_MNN = """
import sys
import numpy as np
import MNN.expr as F
import MNN.nn as nn
x = np.load(sys.argv[2])
net = nn.load_module_from_file(sys.argv[1], ["x"], ["y"])
y = F.convert(net.forward(F.const(x.flatten().tolist(), list(x.shape), F.NCHW)), F.NCHW)
np.save(sys.argv[3], np.array(y.read()).reshape(y.shape))
"""


@pytest.mark.slow
@pytest.mark.parametrize("op_type", ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"])
def test_mnn_reduces_over_all_axes_and_not_in_the_portable_form(op_type: str, tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="MNN is not installed: make test-edge installs it")
    np.save(tmp_path / "x.npy", X)
    model = reduction(op_type, 20)
    shapes, images = [], []
    for i, each in enumerate((model, portable_form(model, "mnn"))):
        ir.save(each, tmp_path / f"{i}.onnx")
        convert = [Path(sys.executable).with_name("mnnconvert"), "-f", "ONNX", "--bizCode", "x"]
        convert += ["--modelFile", tmp_path / f"{i}.onnx", "--MNNModel", tmp_path / f"{i}.mnn"]
        for command in (
            convert,
            [sys.executable, "-c", _RUN_MNN, tmp_path / f"{i}.mnn", tmp_path / "x.npy", tmp_path / f"{i}.npy"],
        ):
            done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1800)
            assert done.returncode == 0, done.stdout + done.stderr
        images.append(np.load(tmp_path / f"{i}.npy"))
        shapes.append(images[-1].shape)
    assert shapes == [(1, 1, 1), (2, 3, 1)]
    np.testing.assert_allclose(images[1], run(model, X, tmp_path)[0], rtol=1e-5)


@pytest.mark.parametrize("parts", [8, 10, 50])
def test_a_wide_split_becomes_a_tree(parts: int, tmp_path: Path) -> None:
    """onnxruntime-web binds each output to a storage buffer of its own; the tests of the browser show the fault."""
    model = split(parts)
    assert names(model) == ["wide-split"] and not names(split(7))
    made = portable_form(model, "onnxruntime-web")
    assert not names(made)
    x = np.random.default_rng(0).standard_normal((2, 3, parts)).astype(np.float32)
    for found, wanted in zip(run(made, x, tmp_path), run(model, x, tmp_path), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_fault_inside_a_branch_is_found() -> None:
    x, y = ir.val("x", const_value=ir.tensor(X, name="x")), value("y", (2, 3, 1))
    axes = ir.val("axes", const_value=ir.tensor(np.array([2]), name="axes"))
    body = ir.Graph([], [y], nodes=[ir.Node("", "ReduceL2", [x, axes], outputs=[y], name="reduce")], name="body")
    condition = ir.val("condition", const_value=ir.tensor(np.array(True), name="condition"))
    out = value("out", (2, 3, 1))
    branches = [ir.AttrGraph("then_branch", body)]
    graph = ir.Graph([], [out], nodes=[ir.Node("", "If", [condition], branches, outputs=[out], name="if")], name="g",
                     opset_imports={"": 20})  # fmt: skip
    with pytest.raises(UnsupportedGraphError, match=r"mnn .*: reduce\."):
        require_portable(ir.Model(graph, ir_version=10), "mnn")


def test_what_is_exported_here_needs_no_rewriting_for_browsers_and_openvino(graphs: Path, avatars_bundle: Path) -> None:
    found = [
        f
        for bundle in (graphs, avatars_bundle)
        for path in bundle.rglob("model.onnx")
        for f in find_faults(read_model(path))
    ]
    assert not [f for f in found if f.rule.runtime in ("onnxruntime-web", "openvino")]


def test_the_shipped_model_in_the_portable_form(avatars_bundle: Path, tmp_path: Path) -> None:
    model = read_model(avatars_bundle / "onnx/fp32/2step/model.onnx")
    made = portable_form(model, "mnn")
    assert len(names(model)) == 22 and not names(made)
    spec = SamplerSpec.from_json(model.metadata_props["scm_spec"])
    feeds = feeds_of(spec, range(2))
    images = []
    for each in (model, made):
        ir.save(each, tmp_path / "graph.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
        images.append(session.run(None, feeds)[0])
    np.testing.assert_allclose(*images, rtol=0, atol=2e-5)


def bundle_of(model: ir.Model, path: Path) -> Path:
    spec = SamplerSpec(times=(1.5,), sample_shape=(3, 4))
    with publish_bundle(path) as folder:
        (folder / "onnx/fp32/1step").mkdir(parents=True)
        ir.save(model, folder / "onnx/fp32/1step/model.onnx")
        artifact = Artifact(path="onnx/fp32/1step/model.onnx", format="onnx", num_inference_steps=1)
        write_bundle(folder, name="b", samplers=[spec], artifacts=[artifact])
    return path


def test_inspect_reports_each_fault(unet_bundle: Path, tmp_path: Path) -> None:
    clean = CliRunner().invoke(main, ["inspect", str(unet_bundle), "--portable"])
    assert clean.exit_code == 0 and f"2 graphs, {len(RULES)} rules" in clean.stderr, clean.output
    wide = bundle_of(split(9), tmp_path / "wide")
    found = CliRunner().invoke(main, ["inspect", str(wide), "--portable", "--json"])
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    assert (row["rule"], row["node"], row["rewritten"]) == ("wide-split", "cut", True)
    old = bundle_of(reduction("ReduceL1", 17), tmp_path / "old")
    refused = CliRunner().invoke(main, ["inspect", str(old), "--portable"])
    assert refused.exit_code == 5 and "reduction-axes-attribute: openvino (2026.4.1)" in refused.stderr, refused.output
