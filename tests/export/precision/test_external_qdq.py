"""Other tools' INT8 graphs: what TensorRT's own parser refuses is refused here, by name, and no more than that."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scm_sdk.errors import ScmError, ShapeError, UnsupportedGraphError
from scm_sdk.export.precision.external_qdq import adopt_quantized
from scm_sdk.spec import SamplerSpec, default_times

SPEC = SamplerSpec(times=default_times(1), sample_shape=(3, 8, 8))
SCALE, ZERO = np.array(0.03, np.float32), np.array(0, np.int8)
WEIGHT = np.random.default_rng(0).integers(-127, 128, (3, 3, 3, 3)).astype(np.int8)


def convolution(path: Path, *, change: str = "", **replaced: Any) -> Path:
    """Write a sampler of one quantized convolution, with one thing about it changed."""
    from onnx import TensorProto, helper, numpy_helper

    stored = {"s": SCALE, "z": ZERO, "w": WEIGHT, "ws": np.full(3, 0.03, np.float32), "wz": np.zeros(3, np.int8)}
    stored |= {name: array for name, array in replaced.items() if isinstance(array, np.ndarray)}
    batch = replaced.get("batch", "batch")
    node = helper.make_node
    body = [
        node("QuantizeLinear", ["noise_0", "s", "z"], ["xq"], name="q"),
        node("DequantizeLinear", ["xq", "s", "z"], ["x"], name="dq"),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], name="dw", axis=0),
    ]
    last, kind = node("Conv", ["x", "wf"], ["images"], name="conv", pads=[1] * 4), TensorProto.FLOAT
    if change == "constant node":
        del stored["z"]
        body.insert(0, node("Constant", [], ["z"], name="k", value=numpy_helper.from_array(ZERO)))
    elif change == "qoperator":
        body[1:] = [node("QLinearConv", ["xq", "s", "z", "w", "ws", "wz", "s", "z"], ["yq"], name="qc", pads=[1] * 4)]
        last = node("DequantizeLinear", ["yq", "s", "z"], ["images"], name="dq")
    elif change == "random":
        body[0].input[0] = "noisy"
        random = node("RandomNormalLike", ["noise_0"], ["r"], name="draw")
        body[:0] = [random, node("Add", ["noise_0", "r"], ["noisy"], name="add")]
    elif change == "half output":
        last.output[0], kind = "y", TensorProto.FLOAT16
    nodes = [*body, last]
    if change == "half output":
        nodes.append(node("Cast", ["y"], ["images"], name="cast", to=kind))
    graph = helper.make_graph(
        nodes,
        "sampler",
        [helper.make_tensor_value_info("noise_0", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("images", kind, [batch, 3, 8, 8])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opset = 21 if stored.get("z", ZERO).dtype == np.int16 else 20
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def engine_takes(path: Path) -> bool:
    """Ask TensorRT-RTX's parser."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    return bool(parser.parse_from_file(str(path))) and network.num_outputs > 0


@pytest.mark.parametrize("change", ["", "constant node"])
def test_what_engines_take_is_adopted(tmp_path: Path, change: str) -> None:
    """torch's exporters store a zero point as a Constant node, ONNX Runtime's as an initializer."""
    path = convolution(tmp_path / "model.onnx", change=change)
    model = adopt_quantized(path, SPEC)
    assert model.metadata_props["scm_precision"] == "int8" and model.metadata_props["scm_spec"] == SPEC.to_json()
    assert engine_takes(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"change": "qoperator"}, "node 'qc' is QLinearConv, expected QuantizeLinear and DequantizeLinear around"),
        ({"z": np.array(3, np.int8)}, "node 'q' has a zero point that is not zero, expected symmetric"),
        ({"z": np.array(0, np.int16)}, "node 'q' makes int16, expected int8"),
        ({"w": WEIGHT.astype(np.int32), "wz": np.zeros(3, np.int32)}, "node 'dw' dequantizes an int32 bias"),
    ],
)
def test_what_engines_refuse_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    path = convolution(tmp_path / "model.onnx", **changes)
    with pytest.raises(UnsupportedGraphError, match=text):
        adopt_quantized(path, SPEC)
    assert not engine_takes(path)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"change": "random"}, UnsupportedGraphError, r"node 'draw' \(RandomNormalLike\) draws random numbers"),
        ({"change": "half output"}, ShapeError, "'images': .'FLOAT16', 'batch', 3, 8, 8.*keep its inputs and outputs"),
        ({"batch": 4}, ShapeError, r"'noise_0': \('FLOAT', 4, 3, 8, 8\).*its batch size free"),
    ],
)
def test_what_is_no_sampler_of_ours_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[ScmError], text: str
) -> None:
    with pytest.raises(error, match=text):
        adopt_quantized(convolution(tmp_path / "model.onnx", **changes), SPEC)


def test_the_batch_may_have_any_name(tmp_path: Path) -> None:
    adopt_quantized(convolution(tmp_path / "model.onnx", batch="N"), SPEC)
