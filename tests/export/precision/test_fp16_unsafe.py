"""Numerically sensitive nodes: what half precision would divide by 0 or overflow is found in any of its forms."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from scm_sdk.export.precision.fp16_unsafe import delicate_nodes  # noqa: E402


def kept(bound: float) -> set[str]:
    """What is kept of ``functional.normalize`` as torch exports it: the bounded length is expanded, then divides."""
    values = {"axes": np.array([1]), "least": np.float32(bound), "shape": np.array([2, 8, 5])}
    nodes = [
        helper.make_node("ReduceL2", ["x", "axes"], ["length"]),
        helper.make_node("Clip", ["length", "least"], ["bounded"]),
        helper.make_node("Expand", ["bounded", "shape"], ["wide"]),
        helper.make_node("Div", ["x", "wide"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8, 5]) for name in ("x", "y"))
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    model = ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored)))
    return {node.op_type for node in delicate_nodes(model.graph)}


@pytest.mark.parametrize("bound", [1e-12, 1e-15])
def test_a_normalization_to_length_1_stays_in_float32(bound: float) -> None:
    assert kept(bound) == {"ReduceL2", "Clip", "Div"}


def test_a_bound_that_half_precision_holds_is_no_reason() -> None:
    assert not kept(1e-3)
