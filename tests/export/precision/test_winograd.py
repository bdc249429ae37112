"""3x3 convolutions as Winograd's products: the same numbers but for rounding, and only where it gains."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scm_sdk.export.precision import winograd
from scm_sdk.export.precision.winograd import (
    filter_transform,
    input_transform,
    output_transform,
    products_for_convolutions,
)


def conv_graph(
    weight: np.ndarray,
    size: tuple[int | str, int | str],
    *,
    bias: bool = True,
    twice: bool = False,
    **attributes: object,
) -> ir.Model:
    """Return a graph of one convolution, or of two that share its weight."""
    out_channels, in_channels = weight.shape[:2]
    kind = ir.TensorType(ir.DataType.FLOAT)
    given = {"weight": weight, "bias": np.linspace(-1, 1, out_channels, dtype=np.float32)}
    w, b = (ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in given.items())
    x = ir.Value(name="x", shape=ir.Shape(["batch", in_channels, *size]), type=kind)
    attrs = {"pads": [1, 1, 1, 1], "kernel_shape": list(weight.shape[2:]), **attributes}
    last, nodes = x, []
    for i in range(1 + twice):
        out = ir.Value(name=f"y{i}", shape=ir.Shape(["batch", out_channels, *size]), type=kind)
        kept = [ir.convenience.convert_attribute(k, v) for k, v in attrs.items()]  # type: ignore[arg-type]
        nodes.append(
            ir.Node("", "Conv", [last, w, b] if bias else [last, w], kept, outputs=[out], name=f"step{i}/conv")
        )
        last = out
    initializers = [w, b] if bias else [w]
    graph = ir.Graph([x], [last], nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="conv")
    return ir.Model(graph, ir_version=10)


def rewrite(model: ir.Model) -> tuple[ir.Model, tuple[int, int]]:
    copy = model.clone()
    return copy, products_for_convolutions(copy)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    text = ir.to_proto(model).SerializeToString()
    (y,) = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(y)


@given(size=st.integers(1, 21), seed=st.integers(0, 2**32 - 1))
def test_one_axis_is_a_correlation_with_zeros_beyond_its_ends(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal(size), rng.standard_normal(3)
    g = winograd._G @ w
    products = (input_transform(size) @ x).reshape(6, -1) * g[:, None]
    y = output_transform(size) @ products.reshape(-1)
    padded = np.concatenate([[0], x, [0]])
    np.testing.assert_allclose(y, [padded[i : i + 3] @ w for i in range(size)], atol=1e-5)


def test_the_filters_of_two_axes() -> None:
    w = np.random.default_rng(0).standard_normal((3, 3))
    want = winograd._G @ w @ winograd._G.T
    np.testing.assert_allclose((filter_transform() @ w.reshape(9)).reshape(6, 6), want, atol=1e-6)


@pytest.mark.usefixtures("any_size")
@settings(max_examples=30, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    batch=st.sampled_from([1, 3]),
    bias=st.booleans(),
)
def test_equals_the_convolution(channels: tuple[int, int], size: tuple[int, int], batch: int, bias: bool) -> None:
    rng = np.random.default_rng(0)
    model = conv_graph(rng.standard_normal((*channels, 3, 3)).astype(np.float32), size, bias=bias)
    rewritten, counts = rewrite(model)
    assert counts == (1, 1) and "Conv" not in {node.op_type for node in rewritten.graph}
    x = rng.standard_normal((batch, channels[1], *size)).astype(np.float32)
    want = run(model, x)
    np.testing.assert_allclose(run(rewritten, x), want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.usefixtures("any_size")
def test_steps_share_their_filters_and_values_keep_their_names() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
    model = conv_graph(weight, (8, 12), twice=True)
    rewritten, counts = rewrite(model)
    assert counts == (2, 2) and [node.op_type for node in model.graph] == ["Conv", "Conv"]
    read_weight = [node for node in rewritten.graph if any(v is not None and v.name == "weight" for v in node.inputs)]
    assert len(read_weight) == 1, "G w G^T is made once"
    assert rewritten.graph.initializers["weight"].const_value is not None, "and stored as it was"
    names = {value.name for node in rewritten.graph for value in node.outputs}
    assert {"y0", "y1"} <= names and rewritten.graph.outputs[0].name == "y1"
    x = np.random.default_rng(1).standard_normal((2, 4, 8, 12)).astype(np.float32)
    np.testing.assert_allclose(run(rewritten, x), run(model, x), atol=1e-3)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    ("shape", "size", "attributes"),
    [
        ((4, 4, 3, 3), (8, 8), {"strides": [2, 2]}),
        ((4, 4, 3, 3), (8, 8), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        ((4, 4, 3, 3), (8, 8), {"pads": [0, 0, 0, 0]}),
        ((4, 1, 3, 3), (8, 8), {"group": 4}),
        ((4, 4, 1, 1), (8, 8), {"pads": [0, 0, 0, 0]}),
        ((4, 4, 5, 5), (8, 8), {"pads": [2, 2, 2, 2]}),
        ((4, 4, 3, 3), ("height", "width"), {}),
    ],
)
def test_other_convolutions_stay(
    shape: tuple[int, ...], size: tuple[int | str, int | str], attributes: dict[str, object]
) -> None:
    model = conv_graph(np.ones(shape, np.float32), size, **attributes)
    assert rewrite(model)[1] == (0, 1)


@pytest.mark.usefixtures("any_size")
def test_half_precision_stays() -> None:
    model = conv_graph(np.ones((4, 4, 3, 3), np.float32), (8, 8))
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    assert rewrite(model)[1] == (0, 1)


@pytest.mark.parametrize(
    ("channels", "side", "gains"),
    [
        (256, 16, True),
        (255, 16, False),
        (128, 32, True),
        (127, 32, False),
        (768, 13, True),
        (768, 12, False),
        (192, 64, True),
        (192, 65, False),
    ],
)
def test_what_is_large_enough(channels: int, side: int, gains: bool) -> None:
    model = conv_graph(np.ones((768, channels, 3, 3), np.float32), (side, side))
    assert rewrite(model)[1] == (int(gains), 1)
