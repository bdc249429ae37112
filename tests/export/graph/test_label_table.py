"""The label's branch becomes a table where that pays, holds what the branch computes, and stays where it does not."""

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from scm_sdk.errors import UnsupportedGraphError
from scm_sdk.export.graph.cleanup import MOST_PARTS
from scm_sdk.export.graph.label_table import MAX_CLASSES, label_branch
from scm_sdk.export.graph.network import NetworkGraph, compose_sampler
from scm_sdk.export.graph.partial_eval import classify
from scm_sdk.spec import SamplerSpec

WIDTH = 64
DRAW = np.random.default_rng(0)
WEIGHTS = {"square": DRAW.standard_normal((WIDTH, WIDTH)) / 8, "out": DRAW.standard_normal((WIDTH, 6)) / 8}
BRANCH = [("Gather", ["embedding", "class_labels"], "row"), ("MatMul", ["row", "square"], "wide")]
BRANCH += [("Mul", ["wide", "t"], "timed"), ("Tanh", ["timed"], "bent"), ("MatMul", ["bent", "out"], "gain")]


def network(nodes, num_classes=5, scales=1.0) -> NetworkGraph:
    """F(x, t, class_labels) of the nodes (operator, inputs, output), the last of which is F.

    The rows of the embedding are multiplied by the scales.
    """
    draw = np.random.default_rng(1)
    weights = WEIGHTS | {
        "embedding": draw.standard_normal((num_classes, WIDTH)) * np.reshape(scales, (-1, 1)),
        "small": draw.standard_normal((num_classes, 6)),
        "one": np.ones(1, np.int64),
        **{f"shift_{i}": np.full(6, 0.01 * i) for i in range(50)},
    }
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], name=output) for op, inputs, output in nodes],
        "network",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6]),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("F", TensorProto.FLOAT, ["batch", 6])],
        [
            numpy_helper.from_array(array if array.dtype == np.int64 else array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), strict_mode=True
    )
    spec = SamplerSpec(sample_shape=(6,), times=(1.5,), num_classes=num_classes)
    return NetworkGraph(model=ir.from_proto(model), spec=spec, versions={}, num_nodes_exported=len(nodes))


def run(model: ir.Model, labels: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    noise = {i.name: np.ones((len(labels), 6), np.float32) for i in session.get_inputs() if "noise" in i.name}
    return session.run(None, noise | {"class_labels": labels})[0]  # pyright: ignore[reportReturnType]


def both(made: NetworkGraph, monkeypatch, steps: int = 2) -> tuple[ir.Model, ir.Model]:
    """The sampler as it is, and with every branch kept."""
    spec = msgspec.structs.replace(made.spec, times=(1.5, 1.1, 0.7, 0.4)[:steps])
    found = compose_sampler(made, spec)
    with monkeypatch.context() as patch:
        patch.setattr("scm_sdk.export.graph.compose.label_branch", lambda *_, **__: None)
        return found, compose_sampler(made, spec)


def test_a_table_takes_the_branchs_place_and_gives_what_it_gave(monkeypatch):
    found, kept = both(network([*BRANCH, ("Mul", ["x", "gain"], "F")]), monkeypatch)
    stored = found.graph.initializers
    assert {"step0/labels/table", "step1/labels/table"} <= stored.keys()
    assert not stored.keys() & {"embedding", "square", "out"}, "its weights are gone"
    assert "MatMul" not in {node.op_type for node in found.graph}
    labels = np.array([3, 0, 4, 4, 1, 2])
    np.testing.assert_allclose(run(found, labels), run(kept, labels), rtol=0, atol=1e-6)
    assert not np.allclose(run(found, labels)[0], run(found, labels)[1]), "labels matter"


@pytest.mark.parametrize(("layout", "axis", "reshaped"), [("rows", 0, True), ("alike", 1, False), ("mixed", 1, True)])
def test_rows_lie_together_and_values_of_other_shapes_are_shaped_again(monkeypatch, layout, axis, reshaped):
    if layout == "alike":
        nodes = [*BRANCH, ("Tanh", ["gain"], "bent_2"), ("Mul", ["x", "gain"], "y"), ("Add", ["y", "bent_2"], "F")]
    else:
        nodes = [*BRANCH, ("Unsqueeze", ["gain", "one"], "gain_3"), ("Unsqueeze", ["x", "one"], "x_3")]
        nodes += [("Mul", ["x_3", "gain_3"], "y_3"), ("Tanh", ["gain_3"], "bent_3"), ("Add", ["y_3", "bent_3"], "z_3")]
        nodes += [("Squeeze", ["z_3", "one"], "z"), ("Mul", ["x" if layout == "rows" else "gain", "z"], "F")]
    found, kept = both(network(nodes), monkeypatch)
    (split, *_) = [node for node in found.graph if node.op_type == "Split"]
    assert split.attributes.get_int("axis") == axis
    assert any("/labels/" in (n.name or "") and n.op_type == "Reshape" for n in found.graph) == reshaped
    labels = np.array([3, 0, 4, 4, 1, 2])
    np.testing.assert_allclose(run(found, labels), run(kept, labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["gain", "first"])
def test_a_number_for_each_label_lies_beside_rows(monkeypatch, first):
    """Values (batch,) and (batch, 6) or (batch, 1), whichever the network reads first."""
    nodes = [*BRANCH, ("ReduceSum", ["gain", "one"], "first"), ("Squeeze", ["first", "one"], "number")]
    nodes += [("ReduceSum", ["x", "one"], "x_1"), ("Squeeze", ["x_1", "one"], "x_0")]
    rows = [("Mul", ["x", first], "y")]
    numbers = [("Mul", ["x_0", "number"], "scaled"), ("Unsqueeze", ["scaled", "one"], "scaled_1")]
    for consumers in ([*rows, *numbers], [*numbers, *rows]):
        found, kept = both(network([*nodes, *consumers, ("Add", ["y", "scaled_1"], "F")]), monkeypatch)
        assert "step0/labels/table" in found.graph.initializers
        labels = np.array([3, 0, 4, 4, 1, 2])
        np.testing.assert_allclose(run(found, labels), run(kept, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 7, 8, 32, 50])
def test_a_row_is_cut_by_splits_of_few_outputs(monkeypatch, count):
    """WebGPU guarantees 8 storage buffers: onnxruntime-web 1.30 refuses a Split of more than 7 outputs."""
    nodes = list(BRANCH)
    nodes += [("Add", ["gain", f"shift_{i}"], f"border_{i}") for i in range(count)]
    nodes += [("Sub" if i % 3 else "Mul", [f"y_{i - 1}" if i else "x", f"border_{i}"], f"y_{i}") for i in range(count)]
    made = network([*nodes, ("Identity", [f"y_{count - 1}"], "F")])
    found, kept = both(made, monkeypatch)
    splits = [node for node in found.graph if node.op_type == "Split"]
    assert splits and max(len(node.outputs) for node in splits) <= MOST_PARTS == 7
    labels = np.array([3, 0, 4, 4, 1, 2])
    np.testing.assert_allclose(run(found, labels), run(kept, labels), rtol=1e-4, atol=1e-4)


def test_what_meets_no_sample_is_a_table_too(monkeypatch):
    found, kept = both(network([*BRANCH, ("Identity", ["gain"], "F")]), monkeypatch, steps=1)
    assert "step0/labels/table" in found.graph.initializers
    np.testing.assert_allclose(run(found, np.arange(5)), run(kept, np.arange(5)), rtol=0, atol=1e-6)


def test_many_classes_keep_their_branch(monkeypatch):
    made = network([*BRANCH, ("Mul", ["x", "gain"], "F")], MAX_CLASSES + 1)
    assert "embedding" in both(made, monkeypatch)[0].graph.initializers


def test_tables_take_no_more_room_than_the_weights(monkeypatch):
    nodes = [("Gather", ["small", "class_labels"], "gain"), ("Mul", ["x", "gain"], "F")]
    found, _ = both(network(nodes), monkeypatch, steps=1)
    assert "step0/labels/table" in found.graph.initializers
    found, _ = both(network(nodes), monkeypatch, steps=2)
    assert "small" in found.graph.initializers and "step0/labels/table" not in found.graph.initializers


@pytest.mark.parametrize("largest_of", range(5))
def test_labels_that_are_mixed_are_refused(largest_of: int):
    """Whichever label has the value that all are divided by."""
    mixed = [*BRANCH[:2], ("ReduceMax", ["wide"], "largest"), ("Div", ["wide", "largest"], "timed"), *BRANCH[3:]]
    made = network([*mixed, ("Mul", ["x", "gain"], "F")], scales=[1 + 9 * (label == largest_of) for label in range(5)])
    with pytest.raises(UnsupportedGraphError, match=r"'gain' is another for the labels \d to \d.*must not mix"):
        compose_sampler(made, made.spec)


def test_without_labels_there_is_nothing_to_do():
    graph = network([("Mul", ["x", "t"], "F")]).model.graph
    assert label_branch(graph, classify(graph), num_classes=5, num_steps=1) is None
