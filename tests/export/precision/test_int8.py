"""INT8: the arithmetic, the ranges, what is left out and why, and graphs of other tools."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scm_sdk import Generator
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import ConfigError, ExportError, ParityError, SchemaError, ShapeError, UnsupportedGraphError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.graph.io import read_model, write_model
from scm_sdk.export.precision.calibration import Calibration, calibrate
from scm_sdk.export.precision.external_qdq import adopt_quantized
from scm_sdk.export.precision.half import apply_precision, default_plan
from scm_sdk.export.precision.int8 import (
    Exclusion,
    QuantizePlan,
    choose_layers,
    default_quantize_plan,
    quantize,
    quantize_array,
    scale_for,
)
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_foreign_int8, add_int8
from scm_sdk.export.precision.layer_search import exclude_to_target, open_candidates, sensitivity
from scm_sdk.export.precision.probe import Probe
from scm_sdk.inference import request
from scm_sdk.inference.parity import compare
from scm_sdk.inference.parity.reference import CALIBRATION, JUDGMENT, SELECTION
from scm_sdk.spec import SamplerSpec

GRAPH = "onnx/fp32/2step/model.onnx"


@pytest.fixture(scope="module")
def fp16(fp32: ir.Model) -> ir.Model:
    return apply_precision(fp32, default_plan("fp16"))


@pytest.fixture(scope="module")
def probe(unet_bundle: Path, spec: SamplerSpec) -> Probe:
    return Probe(unet_bundle / GRAPH, spec, num_samples=8)


@pytest.fixture(scope="module")
def calibration(fp32: ir.Model, spec: SamplerSpec) -> Calibration:
    nodes = [node.name or "" for node in fp32.graph if node.op_type == "Conv"]
    return calibrate(fp32, nodes, spec, graph_sha256="abc", num_samples=16)


finite = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2), elements=st.floats(-1e4, 1e4, width=32))


@given(x=finite, dtype=st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]))
@example(x=np.array([1e-4], np.float32), dtype=np.float16)  # a subnormal scale: the nearest half clips by two steps
@example(x=np.array([1e-7], np.float32), dtype=np.float16)  # rounds to nothing
def test_rounding_is_off_by_half_a_step_at_most(x: np.ndarray, dtype: type) -> None:
    scale = scale_for(float(np.abs(x).max()), dtype).astype(np.float64)
    error = np.abs(quantize_array(x, scale) * scale - x)
    assert np.all(error <= scale / 2 * (1 + 1e-6))


@given(x=finite)
def test_codes_are_symmetric(x: np.ndarray) -> None:
    scale = scale_for(float(np.abs(x).max()), np.float32)
    assert np.array_equal(quantize_array(-x, scale), -quantize_array(x, scale))
    assert quantize_array(x, scale).min() >= -127


def test_ranges_are_those_of_a_run_in_one_piece(fp32: ir.Model, spec: SamplerSpec) -> None:
    name = "step1/conv_in/Conv"
    whole = calibrate(fp32, [name], spec, graph_sha256="", num_samples=5, batch_size=5)
    streamed = calibrate(fp32, [name], spec, graph_sha256="", num_samples=5, batch_size=2)
    assert streamed.ranges[name] == pytest.approx(whole.ranges[name], rel=1e-5)


def test_each_step_has_ranges_of_its_own(calibration: Calibration) -> None:
    steps = [{k: v for k, v in calibration.ranges.items() if k.startswith(f"step{i}/")} for i in (0, 1)]
    assert len(steps[0]) == len(steps[1]) > 3
    assert any(steps[0][k] != steps[1]["step1/" + k.partition("/")[2]] for k in steps[0])


def test_calibration_is_seeded_and_survives_json(fp32: ir.Model, spec: SamplerSpec, calibration: Calibration) -> None:
    names = list(calibration.ranges)
    again = calibrate(fp32, names, spec, graph_sha256="abc", num_samples=16)
    assert again.to_json() == calibration.to_json() == Calibration.from_json(again.to_json()).to_json()
    assert calibrate(fp32, names, spec, graph_sha256="abc", num_samples=16, seed=1).ranges != calibration.ranges
    with pytest.raises(SchemaError, match="calibration cannot be read"):
        Calibration.from_json(b"{}")


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_a_cut_lies_inside_the_extremes(fp32: ir.Model, spec: SamplerSpec, calibration: Calibration, method) -> None:
    names = list(calibration.ranges)[:3]
    cut = calibrate(fp32, names, spec, graph_sha256="", num_samples=16, method=method, percentile=99)
    assert all(0 < cut.ranges[n] <= calibration.ranges[n] * (1 + 1e-6) for n in names)
    assert any(cut.ranges[n] < 0.9 * calibration.ranges[n] for n in names)


def test_a_percentile_holds_its_share(fp32: ir.Model, spec: SamplerSpec, unet_bundle: Path) -> None:
    name = "step0/conv_in/Conv"  # it reads standard normal noise, whose percentiles are known
    cut = calibrate(fp32, [name], spec, graph_sha256="", num_samples=200, method="percentile", percentile=95.45)
    assert cut.ranges[name] == pytest.approx(2.0, rel=0.02)


def test_bad_calibration_is_refused(fp32: ir.Model, spec: SamplerSpec) -> None:
    with pytest.raises(ConfigError, match="no node 'nowhere'"):
        calibrate(fp32, ["nowhere"], spec, graph_sha256="")
    with pytest.raises(ConfigError, match="num_samples is 0"):
        calibrate(fp32, [], spec, graph_sha256="", num_samples=0)
    broken = fp32.clone()
    weight = broken.graph.initializers["conv_in.bias"]
    weight.const_value = ir.tensor(np.full(weight.const_value.shape, np.inf, np.float32), name=weight.name)  # type: ignore[union-attr]
    later = next(n.name for n in broken.graph if n.op_type == "Conv" and n.name != "step0/conv_in/Conv")
    with pytest.raises(ExportError, match="expected finite numbers"):
        calibrate(broken, [later or ""], spec, graph_sha256="", num_samples=2)


def test_every_layer_but_the_excluded_reads_and_holds_int8(fp16: ir.Model, calibration: Calibration) -> None:
    plan = default_quantize_plan(fp16)
    q = quantize(fp16, calibration, plan)
    layers = choose_layers(fp16, plan)
    assert {name for name in layers.left if name.endswith("/Conv")} == {
        f"step{i}/{name}/Conv" for i in (0, 1) for name in ("conv_in", "conv_out")
    }
    for node in q.graph:
        if node.op_type == "Conv":
            producers = [v.producer() for v in node.inputs[:2] if v is not None]
            kinds = [p.op_type if p is not None else None for p in producers]
            assert (kinds == ["DequantizeLinear"] * 2) == (node.name in layers.quantized), node.name
            assert node.outputs[0].dtype.name == "FLOAT16"  # type: ignore[union-attr]
    names = {node.name for node in fp16.graph}
    assert names <= {node.name for node in q.graph}
    assert q.metadata_props["scm_precision"] == "int8" and "scm_spec" in q.metadata_props


def test_weights_are_int8_once_for_all_steps_with_a_scale_for_each_channel(
    fp16: ir.Model, calibration: Calibration
) -> None:
    q = quantize(fp16, calibration, default_quantize_plan(fp16))
    name = next(n for n in q.graph.initializers if n.endswith("conv0.weight.int8"))
    codes, scale = (q.graph.initializers[n].const_value for n in (name, name.replace(".int8", ".scale")))
    assert codes is not None and scale is not None
    assert len(q.graph.initializers[name].uses()) == 2, "both steps read the one weight"
    assert codes.shape[0] == scale.shape[0] and len(scale.shape) == 1
    old = fp16.graph.initializers[name.removesuffix(".int8")].const_value
    assert old is not None and name.removesuffix(".int8") not in q.graph.initializers
    back = codes.numpy().astype(np.float32) * scale.numpy().astype(np.float32)[:, None, None, None]
    assert np.abs(back - old.numpy()).max() <= scale.numpy().max() * 0.51
    assert np.abs(codes.numpy()).max(axis=(1, 2, 3)).min() == 127, "each channel uses the whole range"


def test_pictures_stay_near_and_the_file_shrinks(fp16, calibration, probe: Probe, tmp_path: Path) -> None:
    q = quantize(fp16, calibration, default_quantize_plan(fp16))
    report = write_model(q, tmp_path / "model.onnx")  # onnx.checker
    assert 25 < probe.gate_db(report.path) == probe.gate_db(q) < probe.gate_db(fp16)


def test_plans_survive_json_and_name_real_layers(fp16: ir.Model) -> None:
    plan = default_quantize_plan(fp16).excluding(Exclusion(pattern="step1/*", reason="the last step is seen"))
    assert QuantizePlan.from_json(plan.to_json()) == plan
    assert {n.partition("/")[0] for n in choose_layers(fp16, plan).quantized} == {"step0"}
    one_for_all = plan.excluding(Exclusion(pattern="step2/conv_in/Conv", reason="of a graph with more steps"))
    assert choose_layers(fp16, one_for_all) == choose_layers(fp16, plan)
    with pytest.raises(ConfigError, match="quantization plan cannot be read"):
        QuantizePlan.from_json(b"[]")
    with pytest.raises(ConfigError, match=r"'decoder/\*' matches no layer with weights"):
        choose_layers(fp16, QuantizePlan(exclusions=(Exclusion(pattern="decoder/*", reason=""),)))


def test_what_cannot_be_quantized_is_refused(fp16: ir.Model, calibration: Calibration) -> None:
    plan = default_quantize_plan(fp16)
    few = Calibration(method="minmax", num_samples=1, seed=0, percentile=100, graph_sha256="", ranges={})
    with pytest.raises(ConfigError, match="the calibration has no range for"):
        quantize(fp16, few, plan)
    with pytest.raises(ConfigError, match="is quantized already"):
        quantize(quantize(fp16, calibration, plan), calibration, plan)


def test_sensitivity_ranks_layers_and_exclusions_reach_a_target(fp16, calibration, probe: Probe) -> None:
    plan = default_quantize_plan(fp16)
    table = sensitivity(fp16, partial(quantize, fp16, calibration), plan, probe)
    assert set(table) == set(choose_layers(fp16, plan).quantized), "each step by itself"
    assert list(table.values()) == sorted(table.values())
    target = probe.gate_db(quantize(fp16, calibration, plan)) + 1.5
    better = exclude_to_target(fp16, partial(quantize, fp16, calibration), plan, probe, target)
    assert probe.gate_db(quantize(fp16, calibration, better)) >= target
    new = better.exclusions[len(plan.exclusions) :]
    assert 0 < len(new) < len(table) and all("alone in int8 it leaves" in e.reason for e in new)
    base = re.escape(f"{probe.gate_db(fp16):.1f} dB with no layer in int8, expected 500")
    with pytest.raises(ParityError, match=base):
        exclude_to_target(fp16, partial(quantize, fp16, calibration), plan, probe, 500)


def test_one_session_gives_the_images_of_every_plan(fp16, calibration, probe: Probe) -> None:
    plan, quantized = default_quantize_plan(fp16), partial(quantize, fp16, calibration)
    names = choose_layers(fp16, plan).quantized
    with open_candidates(fp16, quantized, plan, num_threads=probe.num_threads) as candidate:
        for chosen in ([], names[:1], names[1::2], names):
            fewer = plan.excluding(*(Exclusion(pattern=n, reason="") for n in names if n not in chosen))
            np.testing.assert_array_equal(probe.run(candidate(fewer)), probe.run(quantized(fewer)))


def test_the_bundle_gains_int8_and_the_gate_takes_it(unet_copy: Path) -> None:
    (variant,) = add_int8(unet_copy, QuantizeOptions(num_samples=32), steps=[1])
    assert variant.notes[0].endswith("Conv in int8") and variant.nodes["int8"] > 3
    bundle = Bundle.open(unet_copy)
    roles = {entry.path: entry.role for entry in bundle.manifest.files}
    assert roles["calibration/int8-1step.json"] == "calibration" and roles["precision/int8.json"] == "plan"
    assert Calibration.from_json(bundle.file("calibration/int8-1step.json").read_bytes()).num_samples == 32
    (again,) = add_int8(unet_copy, QuantizeOptions(num_samples=32), steps=[1])
    assert again.unchanged
    judged = {"precisions": ["int8"], "min_psnr_db": 25.0, "reason": "an untrained net", "batches": [1]}
    (judgment,) = validate_bundle(unet_copy, **judged)
    assert judgment
    low, full = (
        Generator.from_pretrained(unet_copy, backend="onnxruntime", precision=name, num_inference_steps=1)
        for name in ("int8", "fp32")
    )
    with low, full:
        again = low.compare(full, seeds=SELECTION[:32], batches=[1])
    assert again.overall.psnr_p05_db == pytest.approx(variant.psnr_db or 0, abs=0.01), "one number everywhere"


def test_a_precision_is_made_chosen_and_judged_on_seeds_that_share_none(
    unet_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tuned on the seeds that judge it passes by its tuning."""
    drawn: dict[str, set[int]] = {"quantize": set(), "validate": set()}
    real = request.draw_noise

    def draw_noise(spec: SamplerSpec, seeds: Sequence[int]) -> Any:
        drawn[verb].update(seeds)
        return real(spec, seeds)

    monkeypatch.setattr(request, "draw_noise", draw_noise)
    verb = "quantize"
    add_int8(unet_copy, QuantizeOptions(num_samples=8, target_db=20), steps=[1])
    verb = "validate"
    validate_bundle(unet_copy, precisions=["int8"], min_psnr_db=5, reason="an untrained net", num_seeds=5)
    assert drawn["validate"] == set(range(5)) and all(seed in JUDGMENT for seed in drawn["validate"])
    assert {seed in CALIBRATION for seed in drawn["quantize"]} == {True, False}
    assert all(seed in CALIBRATION or seed in SELECTION for seed in drawn["quantize"])
    assert not drawn["quantize"] & drawn["validate"]
    for first in (CALIBRATION.start, JUDGMENT.stop - 4):
        with pytest.raises(ConfigError, match=r"expected seeds below 1099511627776"):
            validate_bundle(unet_copy, precisions=["int8"], first_seed=first, num_seeds=5)


def test_the_cpu_form_is_another_file_and_runs_fused(unet_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (variant,) = add_int8(unet_copy, QuantizeOptions(precision="int8-cpu", base="fp32", num_samples=8), steps=[1])
    assert variant.path == "onnx/int8-cpu/1step/model.onnx"
    model = read_model(unet_copy / variant.path)
    zeros = [n.inputs[2].const_value for n in model.graph if n.op_type == "QuantizeLinear"]  # type: ignore[union-attr]
    assert zeros and {tensor.dtype.name for tensor in zeros if tensor is not None} == {"UINT8"}
    assert not caplog.records, "what its quantizer advises is not the user's to do"
    assert variant.psnr_db is not None and variant.psnr_db > 20
    far = QuantizePlan(exclusions=(Exclusion(pattern="step2/*", reason="asked for"),))
    with pytest.raises(ConfigError, match=r"'step2/\*' .*expected step0/ to step1/"):
        add_int8(unet_copy, QuantizeOptions(plan=far), steps=[1])
    with pytest.raises(ConfigError, match="int8-cpu was asked for with method entropy"):
        QuantizeOptions(precision="int8-cpu", method="entropy")


def test_another_tools_graph_is_adopted_or_refused(unet_copy: Path, fp16, calibration, spec, tmp_path: Path) -> None:
    q = quantize(fp16, calibration, default_quantize_plan(fp16))
    q.metadata_props.clear()  # as another tool would leave it
    good = write_model(q, tmp_path / "good.onnx").path
    variant = add_foreign_int8(unet_copy, good, steps=2)
    assert variant.psnr_db is not None and variant.psnr_db > 20 and not variant.unchanged
    assert add_foreign_int8(unet_copy, good, steps=2).unchanged

    with pytest.raises(UnsupportedGraphError, match="no QuantizeLinear or DequantizeLinear"):
        adopt_quantized(unet_copy / GRAPH, spec)
    with pytest.raises(ShapeError, match=r"expected .*noise_0"):
        adopt_quantized(unet_copy / "onnx/fp32/1step/model.onnx", spec)
    shifted = q.clone()
    zero = next(v for n, v in shifted.graph.initializers.items() if n == "int8_zero")
    zero.const_value = ir.tensor(np.array(3, np.int8), name="int8_zero")
    with pytest.raises(UnsupportedGraphError, match="zero point that is not zero, expected symmetric"):
        adopt_quantized(write_model(shifted, tmp_path / "shifted.onnx").path, spec)
    unsigned = q.clone()
    for node in unsigned.graph:
        if node.op_type == "QuantizeLinear":
            node.resize_inputs(2)
            node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
            for reader in list(node.outputs[0].consumers()):
                reader.resize_inputs(2)
    with pytest.raises(UnsupportedGraphError, match="makes uint8, expected int8"):
        adopt_quantized(write_model(unsigned, tmp_path / "unsigned.onnx").path, spec)


def test_the_verb(unet_copy: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(unet_copy), "--steps", "1", "--num-samples", "4"]
    run = CliRunner().invoke(main, [*arguments, "--exclude", "step*/middle*", "--json"])
    assert run.exit_code == 0, run.output
    (variant,) = json.loads(run.stdout)
    assert any("middle" in note and "asked for" in note for note in variant["notes"])
    plan = json.loads((unet_copy / "precision/int8.json").read_text("utf-8"))
    assert plan["exclusions"][-1] == {"pattern": "step*/middle*", "reason": "asked for"}
    bad = CliRunner().invoke(main, ["quantize", str(unet_copy), "--from", str(unet_copy / GRAPH)])
    assert bad.exit_code == 2 and "--steps N" in bad.stderr


def test_the_verb_states_what_the_gate_will_say(unet_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["quantize", str(unet_copy), "--steps", "1", "--num-samples", "4"]
    monkeypatch.setattr(compare, "MIN_PSNR_DB", {**compare.MIN_PSNR_DB, "int8": 10.0})
    above = CliRunner().invoke(main, arguments)
    assert above.exit_code == 0 and "Next: scm-export validate" in above.stderr
    monkeypatch.setattr(compare, "MIN_PSNR_DB", {**compare.MIN_PSNR_DB, "int8": 90.0})
    below = CliRunner().invoke(main, [*arguments, "--seed", "1"])
    assert below.exit_code == 0 and "Next:" not in below.stderr
    assert "is below the gate of int8, 90 dB" in below.stderr
    assert f"scm-export quantize {unet_copy} --to int8 --target-psnr 92" in below.stderr
