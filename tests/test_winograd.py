"""3x3 convolutions as Winograd's products: the same numbers but for rounding, from graph to ``Generator``."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from scm_sdk.bundle import Bundle
from scm_sdk.errors import ConfigError, UnsupportedGraphError
from scm_sdk.evaluate.gate import validate_bundle
from scm_sdk.export import winograd
from scm_sdk.export.cli import main
from scm_sdk.export.diagnose import diagnose
from scm_sdk.export.engines import add_engines
from scm_sdk.export.variants import add_winograd
from scm_sdk.export.winograd import apply_winograd, filter_transform, input_transform, output_transform
from scm_sdk.export.write import read_model
from scm_sdk.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.targets import resolve_target

GRAPH = "onnx/fp32-cpu/2step/model.onnx"


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers count as large ones."""
    for name in ("LEAST_CHANNELS", "LEAST_TILES", "LEAST_PRODUCT", "CHANNELS_PER_SIDE"):
        monkeypatch.setattr(winograd, name, 0)


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
    rewritten, counts = apply_winograd(model)
    assert counts == (1, 1) and "Conv" not in {node.op_type for node in rewritten.graph}
    x = rng.standard_normal((batch, channels[1], *size)).astype(np.float32)
    want = run(model, x)
    np.testing.assert_allclose(run(rewritten, x), want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.usefixtures("any_size")
def test_steps_share_their_filters_and_values_keep_their_names() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
    model = conv_graph(weight, (8, 12), twice=True)
    rewritten, counts = apply_winograd(model)
    assert counts == (2, 2) and [node.op_type for node in model.graph] == ["Conv", "Conv"], "the graph given is left"
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
    with pytest.raises(UnsupportedGraphError, match="none of the 1 convolutions gains"):
        apply_winograd(model)


@pytest.mark.usefixtures("any_size")
def test_half_precision_stays() -> None:
    model = conv_graph(np.ones((4, 4, 3, 3), np.float32), (8, 8))
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(UnsupportedGraphError, match="none of the 1 convolutions gains"):
        apply_winograd(model)


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
    if gains:
        assert apply_winograd(model)[1] == (1, 1)
    else:
        with pytest.raises(UnsupportedGraphError, match="expected wide 3x3 ones"):
            apply_winograd(model)


@pytest.mark.usefixtures("any_size")
def test_a_bundle_gains_it_and_every_cpu_backend_passes(unet_copy: Path) -> None:
    variants = add_winograd(unet_copy, num_samples=4)
    assert [v.path for v in variants] == ["onnx/fp32-cpu/1step/model.onnx", GRAPH]
    assert all(v.psnr_db is not None and 100 < v.psnr_db < 200 for v in variants), "rounding, and no more than that"
    assert "convolutions as Winograd's products" in variants[0].notes[0]
    assert all(v.unchanged for v in add_winograd(unet_copy, num_samples=4))

    results = validate_bundle(unet_copy, precisions=["fp32-cpu"], num_seeds=4, batches=[1, 3])
    assert {r.candidate_backend for r in results} == {"onnxruntime", "openvino"} and all(results)
    assert {(r.gate, r.threshold) for r in results} == {("psnr_db", 100.0)}
    with Generator.from_pretrained(unet_copy, precision="fp32-cpu", num_inference_steps=2) as gen:
        out = gen(2, class_labels=[0, 1], seed=5, output_type="raw")
        assert out.info.artifact == GRAPH and out.info.precision == "fp32-cpu"
        assert "parity passed" in gen.plan().chosen.reason
    with Generator.from_pretrained(unet_copy, backend="torch", num_inference_steps=2) as gen:
        np.testing.assert_allclose(out.images, gen(2, class_labels=[0, 1], seed=5, output_type="raw").images, atol=1e-4)
    with Generator.from_pretrained(unet_copy, num_inference_steps=2) as gen:
        assert gen.plan().chosen.precision == "fp32", "what is faster is measured, not supposed"


@pytest.mark.usefixtures("any_size")
def test_a_changed_filter_is_found_in_it(unet_bundle: Path) -> None:
    bundle = Bundle.open(unet_bundle)
    (checkpoint,) = bundle.artifacts(format="safetensors")
    trained = ConsistencyModel.from_pretrained(bundle.file(checkpoint.path)).eval()
    exact = read_model(unet_bundle / "onnx/fp32/2step/model.onnx")
    model, _ = apply_winograd(exact)
    sound = diagnose(model, trained, bundle.spec(2), exact=exact)
    assert not sound.findings and sound.psnr_by_step[-1] > 100
    weight = next(v for v in model.graph.initializers.values() if v.shape is not None and list(v.shape)[2:] == [3, 3])
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[0, 0, 1, 1] += 0.05
    weight.const_value = ir.tensor(array, name=weight.name)
    (finding, *_) = diagnose(model, trained, bundle.spec(2), exact=exact).findings
    assert finding.fault == "weights" and finding.value == weight.name


@pytest.mark.usefixtures("any_size")
def test_no_engine_is_built_from_it(unet_copy: Path) -> None:
    add_winograd(unet_copy, steps=[1], num_samples=0)
    with pytest.raises(ConfigError, match="expected fp32-cpu"):
        add_engines(unet_copy, [resolve_target("a100")], precisions=["fp32-cpu"])


def test_the_command(unet_copy: Path, any_size: None) -> None:
    made = CliRunner().invoke(
        main, ["precision", str(unet_copy), "--to", "fp32-cpu", "--steps", "1", "--num-samples", "2"]
    )
    assert made.exit_code == 0 and "onnx/fp32-cpu/1step/model.onnx" in made.stderr + made.stdout
    bench = ["bench", str(unet_copy), "--steps", "1", "--batch", "1", "--rounds", "10", "--json"]
    (latency,) = json.loads(CliRunner().invoke(main, bench).stdout)
    names = ["torch", *(f"{name}{kind}" for name in ("onnxruntime", "openvino") for kind in ("", ":fp32-cpu"))]
    assert [timing["name"] for timing in latency["timings"]] == names
    wrong = CliRunner().invoke(main, ["precision", str(unet_copy), "--to", "fp32-cpu", "--target-psnr", "80"])
    assert wrong.exit_code == 2 and "--target-psnr are for fp16 and bf16" in wrong.output


def test_a_network_without_wide_convolutions_is_refused_whole(unet_copy: Path) -> None:
    before = (unet_copy / "scm_manifest.json").read_bytes()
    refused = CliRunner().invoke(main, ["precision", str(unet_copy), "--to", "fp32-cpu"])
    assert refused.exit_code == 5 and "gains as Winograd's products" in refused.stderr
    assert (unet_copy / "scm_manifest.json").read_bytes() == before and not (unet_copy / "onnx/fp32-cpu").exists()
