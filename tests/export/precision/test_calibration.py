"""Calibration says no where it could not measure; it never writes a range that it did not see."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scm_sdk.errors import ConfigError, ExportError, SchemaError
from scm_sdk.export.cli import main
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.calibration import Calibration, _percentile_cut, calibrate
from scm_sdk.export.precision.int8 import Exclusion, QuantizePlan
from scm_sdk.export.precision.int8_ort import quantize_for_cpu

GRAPH = "onnx/fp32/1step/model.onnx"


@pytest.fixture(scope="module")
def fp32(unet_bundle: Path) -> ir.Model:
    return read_model(unet_bundle / GRAPH)


def with_one_channel_added(model: ir.Model, node_name: str, value: float) -> ir.Model:
    """Add ``value`` to channel 1 of what a convolution reads; the other channels stay numbers."""
    copy = model.clone()
    node = next(n for n in copy.graph if n.name == node_name)
    read = node.inputs[0]
    assert read is not None and read.shape is not None and isinstance(read.shape[1], int)
    array = np.zeros((1, read.shape[1], 1, 1), np.float32)
    array[0, 1] = value
    added = ir.val("added", const_value=ir.tensor(array, name="added"))
    copy.graph.register_initializer(added)
    out = ir.Value(name="changed", shape=read.shape, type=read.type)
    copy.graph.insert_before(node, ir.Node("", "Add", [read, added], outputs=[out], name="change"))
    node.replace_input_with(0, out)
    return copy


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_channel_that_is_not_finite_is_found_and_its_reader_named(fp32, spec, value: float) -> None:
    """ONNX Runtime's ReduceMax passes over a NaN that stands among numbers."""
    name = [node.name for node in fp32.graph if node.op_type == "Conv"][-1]
    assert name is not None
    calibrate(with_one_channel_added(fp32, name, 1.0), [name], spec, graph_sha256="", num_samples=2)
    with pytest.raises(ExportError, match=f"node '{name}' reads NaN or infinity, expected finite numbers"):
        calibrate(with_one_channel_added(fp32, name, value), [name], spec, graph_sha256="", num_samples=2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": -1}, "batch_size -1"),
        ({"method": "mse"}, "method is 'mse'.*minmax, percentile, entropy"),
    ],
)
def test_arguments_out_of_range_are_refused(fp32, spec, change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        calibrate(fp32, ["step0/conv_in/Conv"], spec, graph_sha256="", num_samples=2, **change)


def test_a_plan_that_leaves_nothing_is_refused(fp32, spec, unet_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no layer to calibrate"):
        calibrate(fp32, [], spec, graph_sha256="", num_samples=2)
    plan = QuantizePlan(exclusions=(Exclusion(pattern="*", reason="all of it"),))
    with pytest.raises(ConfigError, match="leaves no layer to quantize"):  # an empty list means every node to its tool
        quantize_for_cpu(read_model(unet_bundle / GRAPH), spec, plan, num_samples=2)


@pytest.mark.parametrize("precision", ["int8", "int8-cpu"])
def test_the_verb_says_so_too(unet_copy: Path, precision: str) -> None:
    arguments = ["quantize", str(unet_copy), "--to", precision, "--steps", "1", "--num-samples", "2", "--exclude", "*"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 2 and "no layer to" in run.stderr
    assert not (unet_copy / "onnx" / precision).exists()


def test_a_negative_range_is_no_range() -> None:
    text = b'{"method":"minmax","num_samples":1,"seed":0,"percentile":99,"graph_sha256":"","ranges":{"a":-3.0}}'
    with pytest.raises(SchemaError, match=r"calibration cannot be read.*>= 0"):
        Calibration.from_json(text)
    assert Calibration.from_json(text.replace(b"-3.0", b"0.0")).ranges == {"a": 0.0}


counts = hnp.arrays(np.int64, 64, elements=st.integers(0, 1000)).filter(lambda h: h.sum() > 0)


@given(histogram=counts, percentile=st.floats(50, 100))
def test_a_percentile_cut_is_the_first_edge_that_holds_its_share(histogram: np.ndarray, percentile: float) -> None:
    bins = round(_percentile_cut(percentile)(histogram, 1.0) * 64)
    need = percentile / 100 * histogram.sum()
    assert histogram[:bins].sum() >= need and (bins == 1 or histogram[: bins - 1].sum() < need)
