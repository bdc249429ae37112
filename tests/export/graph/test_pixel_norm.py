"""Pixel norms in graphs: the same in every batch, zero where everything is zero, and PyTorch's numbers elsewhere."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from scm_sdk.export.graph.cleanup import drop_unused
from scm_sdk.export.graph.network import export_network
from scm_sdk.export.graph.pixel_norm import lengths_for_pixel_norms
from scm_sdk.export.precision.cpu import norms_that_fuse
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.transformer import TransformerConfig

EPS = 1e-8
NORMS = 9
"""Of the small transformer: two of the trunk, four of the conditioning, and three at the end."""


def session(model: ir.Model, folder: Path) -> onnxruntime.InferenceSession:
    ir.save(model, folder / "graph.onnx")
    return onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])


def norm_graph(eps: float | None, *, axis: int = 1, power: float = 2.0, shared: bool = False) -> ir.Model:
    """Write x * rsqrt(mean(x^2) + eps) over ``axis`` as the exporter does."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    narrow = [1 if i == axis else d for i, d in enumerate(["batch", 6, 4])]

    def value(name: str, shape: list[str | int]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=kind)

    constants = {"two": np.float32(power), "axes": np.array([axis], np.int64), "eps": np.float32(eps or 0)}
    weights = {k: ir.val(k, const_value=ir.tensor(np.asarray(v), name=k)) for k, v in constants.items()}
    x, out = value("x", ["batch", 6, 4]), value("y", ["batch", 6, 4])
    nodes, last = [], x
    steps = [("Pow", [weights["two"]]), ("ReduceMean", [weights["axes"]])]
    steps += [("Add", [weights["eps"]])] if eps is not None else []
    for op_type, more in [*steps, ("Sqrt", []), ("Reciprocal", [])]:
        made = value(f"{op_type}.out", ["batch", 6, 4] if op_type == "Pow" else narrow)
        nodes.append(ir.Node("", op_type, [last, *more], outputs=[made], name=f"norm/{op_type}"))
        last = made
    nodes.append(ir.Node("", "Mul", [x, last], outputs=[out], name="norm/Mul"))
    outputs = [out, last] if shared else [out]
    used = [weights[k] for k in ("two", "axes", *(["eps"] if eps is not None else []))]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=used, opset_imports={"": 20}, name="norm")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("eps", [None, EPS])
def test_equals_the_formula_and_is_safe_at_zero(tmp_path: Path, eps: float | None, axis: int) -> None:
    model = drop_unused(lengths_for_pixel_norms(norm_graph(eps, axis=axis)))
    assert [node.op_type for node in model.graph] == ["ReduceL2", "Max", "Div", "Mul"]
    x = np.random.default_rng(0).standard_normal((5, 6, 4)).astype(np.float32)
    places = np.moveaxis(x, axis, -1)  # a view: (5, places, channels)
    places[:, 0] = 0
    places[:, 1] *= 1e-2
    (y,) = session(model, tmp_path).run(None, {"x": x})
    want = places / np.sqrt((places.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS)
    y = np.moveaxis(y, axis, -1)
    np.testing.assert_array_equal(y[:, 0], 0)
    np.testing.assert_allclose(y[:, 1], want[:, 1], rtol=2e-3)  # where eps begins to be seen
    np.testing.assert_allclose(y[:, 2:], want[:, 2:], rtol=1e-6)


@pytest.mark.parametrize(
    "graph", [norm_graph(1e-3), norm_graph(1e-3, axis=2), norm_graph(None, power=3), norm_graph(None, shared=True)]
)
def test_leaves_what_is_no_pixel_norm(graph: ir.Model) -> None:
    before = [node.op_type for node in graph.graph]
    assert [node.op_type for node in lengths_for_pixel_norms(graph).graph] == before


@pytest.fixture(scope="module")
def transformer() -> tuple[ConsistencyModel, ir.Model]:
    """Return a small one and its network's graph."""
    torch.manual_seed(0)
    shape = TransformerConfig(image_size=8, channels=32, depth=1, head_channels=16, num_classes=3)
    model = ConsistencyModel(ModelConfig(network=shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, export_network(model.eval()).model


def inputs_of(graph: ir.Model, x: np.ndarray, label: int = 0) -> dict[str, np.ndarray]:
    """Return samples with labels in turn, by the graph's names."""
    given = (x, np.full(1, 1.1, np.float32), (label + np.arange(len(x))) % 3)
    return {value.name or "": array for value, array in zip(graph.graph.inputs, given, strict=True)}


def samples() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)


def test_a_transformers_images_do_not_depend_on_the_batch(
    transformer: tuple[ConsistencyModel, ir.Model], tmp_path: Path
) -> None:
    model, graph = transformer
    ops = [node.op_type for node in graph.graph]
    assert ops.count("ReduceL2") == NORMS
    assert "ReduceMean" not in ops
    run, x = session(graph, tmp_path).run, samples()
    (together,) = run(None, inputs_of(graph, x))
    for i in range(7):
        (alone,) = run(None, inputs_of(graph, x[i : i + 1], i))
        np.testing.assert_array_equal(alone[0], together[i])
    with torch.no_grad():
        want = model.network(torch.from_numpy(x), torch.tensor([1.1]), torch.arange(7) % 3)
    np.testing.assert_allclose(together, want.numpy(), rtol=0, atol=2e-5)


def test_in_the_form_for_cpus_they_are_the_same_and_safe_at_zero(
    transformer: tuple[ConsistencyModel, ir.Model], tmp_path: Path
) -> None:
    graph = transformer[1].clone()
    assert norms_that_fuse(graph) == NORMS
    ops = [node.op_type for node in graph.graph]
    assert ops.count("ReduceMean") == NORMS and not {"ReduceL2", "Max"} & set(ops), "nothing is left of the old ones"
    x = samples()
    x[3] = 0
    (before,) = session(transformer[1], tmp_path).run(None, inputs_of(graph, x))
    run = session(graph, tmp_path).run
    (together,) = run(None, inputs_of(graph, x))
    np.testing.assert_allclose(together, before, rtol=0, atol=2e-5)
    for i in range(7):
        np.testing.assert_array_equal(run(None, inputs_of(graph, x[i : i + 1], i))[0][0], together[i])


def test_another_factor_is_no_pixel_norm(transformer: tuple[ConsistencyModel, ir.Model]) -> None:
    graph = transformer[1].clone()
    name = "pixel_norm_32.scale"
    graph.graph.initializers[name].const_value = ir.tensor(np.array(2 * 32**0.5, np.float32), name=name)
    assert norms_that_fuse(graph) == 0


def test_both_cpu_libraries_make_one_kernel_of_each(
    transformer: tuple[ConsistencyModel, ir.Model], tmp_path: Path
) -> None:
    import openvino

    graph = transformer[1].clone()
    norms_that_fuse(graph)
    ir.save(graph, tmp_path / "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    float32 = {"INFERENCE_PRECISION_HINT": "f32"}  # its own choice may be bf16, which it cannot run below AVX-512
    compiled = openvino.Core().compile_model(tmp_path / "graph.onnx", "CPU", float32)
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()]
    assert (fused.count("SimplifiedLayerNormalization"), kinds.count("RMS")) == (NORMS, NORMS)
