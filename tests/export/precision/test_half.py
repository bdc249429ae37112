"""Precision plans: what stays float32 is what the plan says, and the graph says the same."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.bf16 import COMPUTES_BF16
from helpers.recorded_events import Recorded
from scm_sdk.errors import ConfigError, ExportError, ParityError, UnsupportedGraphError
from scm_sdk.export.graph.io import read_model, write_model
from scm_sdk.export.precision.half import (
    CONDITIONING,
    Island,
    PrecisionPlan,
    apply_precision,
    conditioning_nodes,
    count_precisions,
    default_plan,
    island_nodes,
)
from scm_sdk.export.precision.island_search import find_islands, smallest_set
from scm_sdk.export.precision.probe import Probe
from scm_sdk.spec import SamplerSpec


@pytest.fixture(scope="module")
def probe(fp32: ir.Model, spec: SamplerSpec) -> Probe:
    return Probe(fp32, spec, num_samples=8, batch_size=3)


def dtypes(model: ir.Model) -> dict[str, str]:
    return {node.name or "": node.outputs[0].dtype.name for node in model.graph if node.op_type != "Cast"}  # type: ignore[union-attr]


def test_plans_survive_json() -> None:
    plan = default_plan("fp16").with_islands(Island(pattern="step1/*", reason="the last step is seen"))
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    assert plan.to_json().count(b"\n") > 8, "one line for each fact, so that a diff shows one"
    with pytest.raises(ConfigError, match="precision plan cannot be read"):
        PrecisionPlan.from_json(b'{"precision": "fp12"}')


def test_fp16_computes_in_fp16_and_keeps_the_islands(fp32: ir.Model) -> None:
    low = apply_precision(fp32, default_plan("fp16"))
    kept = {node.name for node in island_nodes(fp32.graph, default_plan("fp16"))}
    for node in low.graph:
        if node.op_type in ("Conv", "InstanceNormalization", "Softmax"):
            assert {v.dtype.name for v in node.inputs if v is not None} == {"FLOAT16"}, node.name
        if node.name in kept:
            assert node.outputs[0].dtype.name in ("FLOAT", "INT64"), node.name
    assert any("/sampler/" in (name or "") for name in kept) and any("/labels/" in (name or "") for name in kept)
    assert [(v.name, v.dtype) for v in (*low.graph.inputs, *low.graph.outputs)] == [
        (v.name, v.dtype) for v in (*fp32.graph.inputs, *fp32.graph.outputs)
    ]
    assert count_precisions(low)["float16"] > count_precisions(low)["float"]
    assert count_precisions(fp32)["float16"] == 0, "the graph that was given is not changed"


def test_node_names_stay_and_casts_stand_only_at_borders(fp32: ir.Model) -> None:
    low = apply_precision(fp32, default_plan("fp16"))
    casts = [node for node in low.graph if node.op_type == "Cast"]
    assert set(dtypes(fp32)) == set(dtypes(low))
    assert len({cast.inputs[0] for cast in casts}) == len(casts), "one cast for each value, shared by its readers"
    for cast in casts:
        assert cast.inputs[0].dtype != cast.outputs[0].dtype
        assert not any(n.op_type == "Cast" for n in cast.outputs[0].consumers()), f"{cast.name} is undone at once"


def test_weights_are_stored_once_and_small(fp32: ir.Model, tmp_path: Path) -> None:
    full = write_model(fp32, tmp_path / "full.onnx")
    low = apply_precision(fp32, default_plan("fp16"))
    half = write_model(low, tmp_path / "half.onnx")
    assert half.num_parameters == full.num_parameters and half.bytes < full.bytes
    assert low.graph.initializers["conv_in.weight"].dtype.name == "FLOAT16"
    assert "conv_in.weight.fp16" not in low.graph.initializers


def test_bf16_takes_the_opset_that_knows_it(
    fp32: ir.Model, tmp_path: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = apply_precision(fp32, default_plan("bf16"))
    write_model(low, tmp_path / "model.onnx")  # onnx.checker, types included
    assert low.opset_imports[""] == 22 and fp32.opset_imports[""] == 20
    assert {dtypes(low)[n] for n, d in dtypes(low).items() if n.endswith("/Conv")} == {"BFLOAT16"}
    if COMPUTES_BF16:
        kept = default_plan("bf16").with_islands(Island(pattern="step*/mid*", reason="a test"))
        reached, more = probe.gate_db(low), probe.gate_db(apply_precision(fp32, kept))
        assert 40 < reached < 70 and reached != more, "OpenVINO computes the graph as it is written"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(UnsupportedGraphError, match="cannot run this bf16 graph on a CPU"):
        probe.gate_db(low)


def test_fp16_pictures_are_near(fp32: ir.Model, probe: Probe) -> None:
    assert 60 < probe.gate_db(apply_precision(fp32, default_plan("fp16"))) < 200
    assert probe.gate_db(fp32) == float("inf")


def test_everything_an_island_is_fp32_again(fp32: ir.Model, probe: Probe) -> None:
    plan = default_plan("fp16").with_islands(Island(pattern="*", reason="all of it"))
    assert probe.gate_db(apply_precision(fp32, plan)) == float("inf")


def test_an_output_that_is_computed_low_is_given_out_as_float32(fp32: ir.Model, spec: SamplerSpec) -> None:
    low = apply_precision(fp32, PrecisionPlan(precision="fp16"))
    (out,) = low.graph.outputs
    assert (out.name, out.dtype.name) == ("images", "FLOAT")
    session = onnxruntime.InferenceSession(ir.to_proto(low).SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].type == "tensor(float)"


def test_conditioning_is_what_does_not_depend_on_noise(fp32: ir.Model) -> None:
    free = {node.name or "" for node in conditioning_nodes(fp32.graph)}
    assert any("/labels/" in name for name in free)
    assert not any(name.endswith("/Conv") or "/sampler/" in name for name in free)
    assert default_plan("fp16").islands[1].pattern == CONDITIONING


def test_a_pattern_that_matches_nothing_is_refused(fp32: ir.Model) -> None:
    plan = default_plan("fp16").with_islands(Island(pattern="step*/decoder.*", reason="a typing error"))
    with pytest.raises(ConfigError, match=r"'step\*/decoder\.\*' matches no node"):
        apply_precision(fp32, plan)


def test_a_low_graph_is_not_lowered_again(fp32: ir.Model) -> None:
    with pytest.raises(ConfigError, match="the graph is fp16 already"):
        apply_precision(apply_precision(fp32, default_plan("fp16")), default_plan("bf16"))


@pytest.mark.parametrize(("value", "word"), [(1e6, "infinite"), (1e-9, "becomes 0")])
def test_a_weight_that_fp16_cannot_hold_is_refused(fp32: ir.Model, value: float, word: str) -> None:
    changed = fp32.clone()
    weight = changed.graph.initializers["conv_in.bias"]
    array = np.full(weight.const_value.shape if word == "infinite" else (1,), value, np.float32)  # type: ignore[union-attr]
    weight.const_value = ir.tensor(array, name=weight.name)
    with pytest.raises(ExportError, match=f"'conv_in.bias' holds 1e.*{word}.*or use bf16"):
        apply_precision(changed, default_plan("fp16"))


def test_reading_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00\x01 this is no graph")
    with pytest.raises(ExportError, match="is no ONNX graph"):
        read_model(tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match=r"none\.onnx cannot be read"):
        read_model(tmp_path / "none.onnx")


def test_islands_reach_a_target(fp32: ir.Model, probe: Probe) -> None:
    plan, events = default_plan("fp16"), Recorded()
    start = probe.gate_db(apply_precision(fp32, plan))
    found = find_islands(fp32, plan, probe, start + 3, events=events)
    assert found.psnr_db >= start + 3 == pytest.approx(found.start_db + 3)
    assert probe.gate_db(apply_precision(fp32, found.plan)) == found.psnr_db
    new = found.plan.islands[len(plan.islands) :]
    assert 0 < len(new) < len(found.alone_db), "some blocks, not all"
    assert all("alone in fp16 it leaves" in island.reason for island in new)
    for island in new:  # none of them could be left out
        fewer = [other for other in found.plan.islands if other != island]
        smaller = PrecisionPlan(precision="fp16", islands=tuple(fewer))
        assert probe.gate_db(apply_precision(fp32, smaller)) < start + 3
    assert f"{start:.1f} dB by the plan as it is" in events.notes[0]
    counts = [(done, total) for _, done, total in events.steps]
    assert [done for done, _ in counts] == list(range(1, len(counts) + 1)), "every measurement is counted"
    assert all(done <= total for done, total in counts) and counts[-1][1] <= counts[0][1]
    assert counts[-1][0] == counts[-1][1]


def test_a_target_that_is_met_needs_no_islands(fp32: ir.Model, probe: Probe) -> None:
    assert find_islands(fp32, default_plan("fp16"), probe, 20).plan == default_plan("fp16")


def test_a_target_out_of_reach_is_an_error(fp32: ir.Model, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "gate_db", lambda model: 70.0)  # a network that rounds however it is cut
    with pytest.raises(ParityError, match=r"reaches 70\.0 dB .*expected 90\.0 dB"):
        find_islands(fp32, default_plan("fp16"), probe, 90)


@given(needed=st.sets(st.integers(0, 19)), order=st.permutations(range(20)))
def test_the_smallest_set_is_found_whatever_the_order(needed: set[int], order: list[int]) -> None:
    assert set(smallest_set(order, lambda chosen: needed <= set(chosen))) == needed


def test_a_probe_refuses_inputs_that_no_seed_gives(fp32: ir.Model, spec: SamplerSpec) -> None:
    with pytest.raises(ConfigError, match="num_samples is 0"):
        Probe(fp32, spec, num_samples=0)


@pytest.mark.parametrize("factor", [2.2e-8, 1e6])
def test_a_factor_that_fp16_cannot_hold_keeps_its_product_in_float32(factor: float) -> None:
    """As the coefficient cos(t) - sin(t) of a flow's step at pi/4, which float32 rounds to 2.2e-8 in place of 0."""
    noise, out = (ir.Value(name=name, shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
                  for name in ("noise_0", "images"))  # fmt: skip
    scale, bias = (ir.val(name, const_value=ir.tensor(np.array([value], np.float32), name=name))
                   for name, value in (("scale", factor), ("bias", 0.25)))  # fmt: skip
    product = ir.node("Mul", [noise, scale], name="step0/Mul")
    total = ir.node("Add", [product.outputs[0], bias], outputs=[out], name="step0/Add")
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([noise], [out], nodes=[product, total], initializers=[scale, bias], opset_imports={"": 20})
    low = apply_precision(ir.Model(graph, ir_version=10), PrecisionPlan(precision="fp16"))
    assert dtypes(low) == {"step0/Mul": "FLOAT", "step0/Add": "FLOAT16"}
    session = onnxruntime.InferenceSession(ir.to_proto(low).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.float32([[1e-3, -2e-3, 4e-3, 0]])
    np.testing.assert_allclose(session.run(None, {"noise_0": x})[0], x * factor + 0.25, rtol=1e-3)
