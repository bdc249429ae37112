"""Inserted faults are found and named in every precision; correct graphs pass."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from PIL import Image

from helpers.recorded_events import Recorded
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import ConfigError, ExportError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.diagnose.bisect import bisect
from scm_sdk.export.diagnose.diagnose import diagnose
from scm_sdk.export.diagnose.intermediate import inner_values, read_values
from scm_sdk.export.diagnose.localize import localize
from scm_sdk.export.diagnose.validate import validate
from scm_sdk.export.graph.io import read_model, write_model
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.parity.compare import Parity
from scm_sdk.model.consistency import ConsistencyModel

ROOT = Path(__file__).resolve().parents[3]


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks/fidelity/mutations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ladder(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("ladder") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[2], num_samples=1)
    add_int8(path, QuantizeOptions(num_samples=4), steps=[2])
    return path


@pytest.fixture(scope="module")
def model(ladder: Path) -> ConsistencyModel:
    return ConsistencyModel.from_pretrained(ladder / "denoiser").eval()


def graph(bundle: Path, precision: str = "fp32") -> ir.Model:
    return read_model(bundle / f"onnx/{precision}/2step/model.onnx")


# What each precision stores in its own way, and what its numbers may hide; fp32 gets every fault.
OWN = {"fp16": {"none", "float16 time"}, "int8": {"none", "perturbed weight", "wrong channel scale"}}


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(lambda rung, fault: rung == "fp32" or fault in OWN[rung], id="each-once"),
        pytest.param(lambda rung, fault: True, id="all", marks=pytest.mark.slow),
    ],
)
def test_every_fault_is_caught_and_named_at_every_rung(ladder: Path, exported_once: None, wanted: Any) -> None:
    outcomes = load_benchmark().run(ladder, options=["--num-seeds", "5", "--batch", "5"], wanted=wanted)
    assert {o.rung for o in outcomes} == {"fp32", "fp16", "int8"} and len({o.fault for o in outcomes}) == 9
    for o in outcomes:
        assert o.named, f"{o.fault} in {o.rung} was called {o.diagnosis!r}"
        if o.fault != "none" or o.numbers_pass:  # int8 of an untrained network is below its gate without a fault
            assert o.caught == (o.fault != "none"), o
    exact = [o for o in outcomes if o.rung == "fp32"]
    assert all(o.numbers_pass == (o.fault == "none") for o in exact), "the numbers of fp32 alone notice each"
    assert any(o.numbers_pass and o.caught for o in outcomes), "some are noticed by the structure alone"
    assert {o.fault: o.first_node for o in exact}["transposed labels"] == "step0/labels/Gather"


def replace_graph(path: Path, model: ir.Model, precision: str = "fp16") -> None:
    """Put a graph into a bundle as if scm-export had made it so."""
    name = f"onnx/{precision}/2step/model.onnx"
    with extend_bundle(path) as draft:
        write_model(model, draft.path(name))
        draft.add(Artifact(path=name, format="onnx", precision=precision, num_inference_steps=2), [])


@pytest.fixture
def broken(ladder: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(ladder, tmp_path / "bundle"))
    bad = graph(path, "fp16")
    weight = bad.graph.initializers["conv_in.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float16(1.5), name="conv_in.weight")
    replace_graph(path, bad)
    return path


def test_a_failed_validation_says_what_where_and_shows_it(broken: Path, tmp_path: Path) -> None:
    arguments = ["validate", str(broken), "--precision", "fp16", "--bisect", str(tmp_path / "look")]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 3, run.output
    assert "step 0, conv_in.weight: differs from the checkpoint by 5.0e-01 of its norm" in run.stderr
    assert "first differs at node step0/conv_in/Conv (Conv)" in run.stderr
    (picture,) = (tmp_path / "look").iterdir()
    with Image.open(picture) as image:
        assert image.size == (3 * 256 + 2 * 8, 256)
        left, right = (np.asarray(image.crop((x, 0, x + 256, 256))).astype(int) for x in (0, 264))
        assert np.abs(left - right).max() > 3, "the candidate is not the reference"


def test_an_engine_cannot_be_looked_into(broken: Path, tmp_path: Path) -> None:
    (parity, *_) = validate_bundle(broken, precisions=["fp16"], num_seeds=5)
    other = Parity(**{**vars(parity), "candidate": "engines/model.engine"})
    with pytest.raises(ConfigError, match=r"is no graph of .*engines cannot be inspected"):
        localize(broken, other, tmp_path)


def test_values_that_are_not_finite_are_named(ladder: Path, model: ConsistencyModel) -> None:
    bad = graph(ladder)
    weight = bad.graph.initializers["conv_out.weight"]
    weight.const_value = ir.tensor(np.full_like(weight.const_value.numpy(), np.nan), name="conv_out.weight")
    (finding,) = diagnose(bad, model, Bundle.open(ladder).spec(2)).findings
    assert (finding.fault, finding.step, finding.value) == ("not finite", 0, "F")
    where = bisect(bad, graph(ladder), Bundle.open(ladder).spec(2))
    assert where.first is not None and where.first.node == "step0/conv_out/Conv" and np.isinf(where.first.error)


def test_a_node_that_computes_something_else_is_found(ladder: Path, model: ConsistencyModel) -> None:
    """Neither time nor labels nor weights: an operator was exchanged in the second step."""
    bad, spec = graph(ladder), Bundle.open(ladder).spec(2)
    node = next(n for n in bad.graph if n.op_type == "Sigmoid" and (n.name or "").startswith("step1/"))
    node.op_type = "Tanh"
    (finding,) = diagnose(bad, model, spec).findings
    assert (finding.fault, finding.step) == ("network", 1) and "neither time, labels nor weights" in finding.text
    where = bisect(bad, graph(ladder), spec)
    assert where.first is not None and where.first.node == node.name and where.first.op == "Tanh"
    assert where.first.growth > 1e3 and where.first in where.around()
    assert "first differs at node" in str(where)


def test_equal_graphs_do_not_part(ladder: Path) -> None:
    where = bisect(graph(ladder), graph(ladder), Bundle.open(ladder).spec(2))
    assert where.first is None and "no value differs" in str(where)
    assert len(where.steps) == len(inner_values(graph(ladder))) and where.to_dict()["first"] is None


def test_values_of_another_tools_graph(ladder: Path, model: ConsistencyModel) -> None:
    bundle, feeds = Bundle.open(ladder), {}
    with pytest.raises(ExportError, match="has no value 'step7/F'"):
        read_values(graph(ladder), ["step7/F"], feeds)
    renamed: Any = graph(ladder)
    for node in renamed.graph:
        for value in node.outputs:
            value.name = f"other_{value.name}"
    with pytest.raises(ExportError, match="share no value's name"):
        bisect(renamed, graph(ladder), bundle.spec(2))


def test_one_code_of_an_int8_weight_is_noticed(ladder: Path, model: ConsistencyModel) -> None:
    """No picture shows it, and its tolerance is half a step of its own channel's scale."""
    bad, spec = graph(ladder, "int8"), Bundle.open(ladder).spec(2)
    sound = diagnose(bad, model, spec, exact=graph(ladder))
    assert not sound.findings and sound.fault == "" and len(sound.psnr_by_step) == 2
    name = next(name for name in bad.graph.initializers if name.endswith(".int8"))
    value = bad.graph.initializers[name]
    codes = value.const_value.numpy().copy()
    codes.flat[0] += -2 if codes.flat[0] > 0 else 2
    value.const_value = ir.tensor(codes, name=name)
    (finding,) = diagnose(bad, model, spec, exact=graph(ladder)).findings
    assert (finding.fault, finding.value) == ("weights", name.removesuffix(".int8").removesuffix(".equalized"))


def test_a_constant_of_the_time_is_compared_with_the_exact_graph(ladder: Path, model: ConsistencyModel) -> None:
    bad, spec = graph(ladder, "fp16"), Bundle.open(ladder).spec(2)
    name = next(n for n in bad.graph.initializers if n.startswith("step1/") and "sampler/" not in n)
    value = bad.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=name)
    finding = diagnose(bad, model, spec, exact=graph(ladder)).findings[0]
    assert (finding.fault, finding.step, finding.value) == ("time", 1, name)


def test_what_was_not_checked_is_not_claimed(ladder: Path, model: ConsistencyModel) -> None:
    found = diagnose(graph(ladder, "int8"), model, Bundle.open(ladder).spec(2), exact=graph(ladder))
    unchecked = found.stored.unchecked
    assert unchecked and all(name.endswith("quantize.scale") for name in unchecked), "ranges have no original"
    total = found.stored.compared + len(unchecked)
    assert f"{found.stored.compared} of {total} stored tensors; not {unchecked[0]}" in str(found)


def test_a_graph_with_other_names_is_said_not_to_be_looked_into(ladder: Path, tmp_path: Path) -> None:
    """An adopted graph of another tool keeps its own names: its numbers are judged, its structure is not."""
    path = Path(shutil.copytree(ladder, tmp_path / "bundle"))
    other = graph(path, "fp16")
    for node in other.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"other_{value.name}"
    replace_graph(path, other)
    events = Recorded()
    (parity,) = validate(path, precisions=["fp16"], num_seeds=5, batches=[None], events=events)
    assert parity.fault == "" and parity.psnr_by_step == () and "was not inspected" in events.notes[0]
