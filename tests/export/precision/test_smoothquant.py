"""Equal channels: the same network, less lost to int8, and still the checkpoint's weights."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk.export.diagnose.weights import compare_stored
from scm_sdk.export.precision.calibration import calibrate
from scm_sdk.export.precision.int8 import choose_layers, default_quantize_plan, quantize
from scm_sdk.export.precision.probe import Probe
from scm_sdk.export.precision.smoothquant import Channels, _best, _cost, choose_factors, equalize
from scm_sdk.spec import SamplerSpec


def spread(model: ir.Model, layers: tuple[str, ...]) -> ir.Model:
    """Return the same network with channels of very different size before each layer: what equalizing undoes."""
    rng, sizes = np.random.default_rng(0), {}
    for node in model.graph:
        if node.name in layers:
            weight = node.inputs[1]
            assert weight is not None and weight.shape is not None
            sizes[weight.name or ""] = np.exp(rng.normal(size=int(weight.shape[1])))
    uneven = equalize(model, layers, sizes)
    for node in uneven.graph:
        if (node.name or "").endswith("/equalize"):
            node.name = f"{node.name}_not"
            node.outputs[0].name = f"{node.name}.out"
    return uneven


def values(model: ir.Model) -> dict[str, np.ndarray]:
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: np.asarray(tensor.numpy()) for name, tensor in stored.items() if tensor is not None}


def test_the_network_stays_the_same_and_int8_loses_less(fp32: ir.Model, spec: SamplerSpec) -> None:
    plan = default_quantize_plan(fp32)
    layers = tuple(n for n in choose_layers(fp32, plan).quantized if n.endswith("Conv"))
    uneven = spread(fp32, layers)
    probe = Probe(fp32, spec, num_samples=8)
    assert probe.gate_db(uneven) > 100

    def in_int8(model: ir.Model) -> float:
        nodes = choose_layers(model, plan).quantized
        ranges = calibrate(model, nodes, spec, graph_sha256="", num_samples=16)
        return probe.gate_db(quantize(model, ranges, plan))

    factors = choose_factors(uneven, choose_layers(uneven, plan).quantized, spec, num_samples=16)
    even = equalize(uneven, choose_layers(uneven, plan).quantized, factors)
    assert probe.gate_db(even) > 100
    equalized = in_int8(even)
    assert equalized > in_int8(uneven) + 3
    assert equalized > in_int8(fp32) - 1.5


def test_equalized_codes_are_still_held_to_the_checkpoints_weights(fp32: ir.Model, spec: SamplerSpec) -> None:
    plan = default_quantize_plan(fp32)
    layers = choose_layers(fp32, plan).quantized
    factors = choose_factors(fp32, layers, spec, num_samples=8)
    assert factors
    even = equalize(fp32, layers, factors)
    low = quantize(even, calibrate(even, layers, spec, graph_sha256="", num_samples=8), plan)
    codes = [name for name in low.graph.initializers if name.endswith(".equalized.int8")]
    assert len(codes) == len(factors) < len(layers)  # both steps read the same codes
    found = compare_stored(low, values(fp32))
    assert not found.changed
    assert not any("equal" in name or "factor" in name for name in found.unchecked)

    stored = low.graph.initializers[codes[0]]
    assert stored.const_value is not None
    wrong = np.clip(stored.const_value.numpy().astype(np.int32) // 2, -127, 127).astype(np.int8)
    stored.const_value = ir.tensor(wrong, name=codes[0])
    (name, share), *rest = compare_stored(low, values(fp32)).changed
    assert name == codes[0].removesuffix(".equalized.int8") and share > 0.2 and not rest


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0, 3))
def test_factors_never_cost_more_than_none(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(12, 8, 1)) * np.exp(size * rng.normal(size=(12, 1, 1)))
    rms = np.exp(size * rng.normal(size=12))
    channels = [Channels(largest=rms * (4 + step), mean_square=rms**2) for step in range(2)]
    factors = _best([weight], channels)
    if factors is not None:
        assert _cost(weight, channels, factors) < _cost(weight, channels, np.ones(12))
        assert np.isfinite(factors).all() and (factors > 0).all()


def test_no_channel_is_scaled_by_more_than_64_times_the_mean() -> None:
    """A channel that is nearly always zero would be blown up by the little that it holds."""
    largest, weight = np.array([1e-3, *[1.0] * 6, 1e3]), np.ones((8, 4, 1))
    weight[0] = 100
    factors = _best([weight], [Channels(largest=largest, mean_square=largest**2 / 9)])
    assert factors is not None
    assert factors.max() == pytest.approx(64) and factors.min() == pytest.approx(1 / 64)


def test_dead_channels_do_no_harm() -> None:
    weight, largest = np.ones((3, 2, 1)), np.array([0.0, 1.0, 8.0])
    weight[1] = 0
    factors = _best([weight], [Channels(largest=largest, mean_square=largest**2 / 9)])
    assert factors is None or (np.isfinite(factors).all() and (factors > 0).all())
    assert _best([weight], [Channels(largest=np.zeros(3), mean_square=np.zeros(3))]) is None


def test_two_kinds_of_layers_that_read_one_value_are_divided_along_their_own_axes() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        mixed (float[1,4,4,4] x) => (float[1,3,4,4] y, float[1,4,4,5] z)
            <float[3,4,1,1] w, float[4,5] m> { y = Conv (x, w) z = MatMul (x, m) }""")
    draw = np.random.default_rng(0)
    for name, shape in (("w", (3, 4, 1, 1)), ("m", (4, 5))):
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(draw.standard_normal(shape).astype(np.float32), name=name)
        model.graph.initializers[name] = value
    for node in model.graph:
        node.name = f"step0/{node.op_type}"
    factors = np.array([0.5, 1.0, 2.0, 4.0])
    even = equalize(model, ["step0/Conv", "step0/MatMul"], {"w": factors, "m": factors})
    assert [node.op_type for node in even.graph].count("Mul") == 2
    x = draw.standard_normal((1, 4, 4, 4)).astype(np.float32)
    want, found = (
        ort.InferenceSession(ir.to_proto(each).SerializeToString()).run(None, {"x": x}) for each in (model, even)
    )
    for a, b in zip(want, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
