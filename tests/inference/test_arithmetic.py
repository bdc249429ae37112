"""The arithmetic of a plan's rows: which precisions a CPU computes an artifact in, and what must be proved first."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import msgspec
import numpy as np
import pytest

from scm_sdk import Generator
from scm_sdk._util.processor import BF16_CLASSES, cpu_class
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import Artifact, ParityRecord
from scm_sdk.errors import BackendUnavailable, ConfigError, ParityError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.inference import selection
from scm_sdk.inference.backends import BACKENDS, BackendInfo, open_backend
from scm_sdk.inference.selection import Measured, Plan, PlanRow
from scm_sdk.report.render import verdict

HERE = "avx512_bf16"
GRAPH = Artifact(path="graph", format="onnx", num_inference_steps=2)
CHECKPOINT = Artifact(path="denoiser", format="safetensors")
WAY = ("openvino", "graph", "bf16")
computes_bf16 = pytest.mark.skipif(cpu_class() not in BF16_CLASSES, reason="this CPU has no bf16 instructions")
libraries = [pytest.param(name, marks=pytest.mark.skipif(f"not __import__('importlib').util.find_spec('{name}')"))
             for name in ("openvino", "torch")]  # fmt: skip


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with bf16, whatever this one is."""
    monkeypatch.setattr(selection, "cpu_class", lambda: HERE)
    monkeypatch.setattr(selection, "is_installed", lambda name: True)
    monkeypatch.setattr(BackendInfo, "cannot_compute", lambda self, precision: "")


def record(*, cpu: str = "", precision: Any = "", passed: bool = True, backend: str = "openvino") -> ParityRecord:
    return ParityRecord(
        artifact="graph", reference="denoiser", backend=backend, threshold=40.0, noise_floor=0.0, max_abs=1e-3,
        num_samples=32, passed=passed, precision=precision, cpu_class=cpu, gate="psnr_p05_db", psnr_p05_db=45.0,
    )  # fmt: skip


def make(*records: ParityRecord, artifacts: tuple[Artifact, ...] = (GRAPH,), **options: Any) -> Plan:
    return selection.make_plan(artifacts, num_inference_steps=2, parity=(record(), *records), **options)


def row_of(plan: Plan, key: tuple[str, str, str] = WAY) -> PlanRow:
    (found,) = (row for row in plan if row.key == key)
    return found


@pytest.mark.usefixtures("able")
def test_auto_takes_bf16_only_where_it_passed_on_this_class_and_was_measured_faster() -> None:
    mine = record(cpu=HERE, precision="bf16")
    for records in ((), (record(cpu="amx_bf16", precision="bf16"),)):
        row = row_of(make(*records))
        assert not row.accepted and f"no recorded parity in bf16 on this class of CPU ({HERE})" in row.reason
    failed = row_of(make(record(cpu=HERE, precision="bf16", passed=False)))
    assert not failed.accepted and failed.reason.startswith("recorded parity failed")
    plan = make(mine, record(cpu="amx_bf16", precision="bf16", passed=False))
    assert [row.key for row in plan.accepted] == [("openvino", "graph", "fp32"), WAY], "unmeasured it comes last"
    times: Mapping[tuple[str, str, str], Measured] = {
        ("openvino", "graph", "fp32"): Measured(2.0, 1), WAY: Measured(3.0, 1),
    }  # fmt: skip
    assert make(mine, measured=times).accepted[0].precision == "fp32", "measured slower"
    chosen = make(mine, measured={**times, WAY: Measured(1.0, 1)}).chosen
    assert chosen is not None and chosen.key == WAY and chosen.lowered
    assert chosen.name == "openvino:graph in bf16" and "measured here: 1.00 ms" in chosen.reason


@pytest.mark.usefixtures("able")
def test_a_name_takes_the_artifacts_own_precision_unless_bf16_is_named_too() -> None:
    mine = record(cpu=HERE, precision="bf16")
    assert [row.precision for row in make(mine, backend="openvino").accepted] == ["fp32"]
    (row,) = make(backend="openvino", precision="bf16").accepted
    assert row.key == WAY and row.reason == "asked for by name; no recorded parity"
    assert [row.key for row in make(mine, precision="bf16").accepted] == [WAY]
    assert not make(precision="bf16").accepted, "auto takes only what passed"


@pytest.mark.usefixtures("able")
def test_a_graph_made_in_bf16_takes_the_place_of_the_lowered_one() -> None:
    low = Artifact(path="low", format="onnx", precision="bf16", num_inference_steps=2)
    plan = make(artifacts=(GRAPH, low, CHECKPOINT), backend="openvino", precision="bf16")
    assert [row.key for row in plan.accepted] == [("openvino", "low", "bf16")] and not plan.accepted[0].lowered
    assert ("torch", "denoiser", "bf16") in {row.key for row in plan}


def test_a_cpu_without_the_instructions_computes_none(able: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(record(cpu=HERE, precision="bf16"), device="cuda", artifacts=(CHECKPOINT,))
    assert "is computed on CPUs" in row_of(plan, ("torch", "denoiser", "bf16")).reason
    monkeypatch.setattr(BackendInfo, "cannot_compute", lambda self, precision: f"the library has no {precision}")
    assert row_of(make(record(cpu=HERE, precision="bf16"))).reason == "the library has no bf16"
    monkeypatch.setattr(selection, "cpu_class", lambda: "avx512_vnni")
    for wanted in ("auto", "openvino"):
        row = row_of(make(record(cpu="avx512_vnni", precision="bf16"), backend=wanted, precision="bf16"))
        assert not row.accepted and "this CPU (avx512_vnni) has no bf16 instructions" in row.reason


def test_asking_for_bf16_where_it_is_not_computed_says_which_class_this_is(
    unet_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    for backend in ("openvino", "torch"):
        with pytest.raises(BackendUnavailable, match=f"this CPU \\({cpu_class()}\\) has no bf16 instructions"):
            Generator.from_pretrained(unet_bundle, backend=backend, precision="bf16")
    with pytest.raises(ConfigError, match=r"'bf16' for backend 'onnxruntime'.*openvino, torch"):
        open_backend("onnxruntime", unet_bundle, None, precision="bf16")  # type: ignore[arg-type]


RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def test_fp32_cpu_goes_first_unmeasured_on_the_classes_whose_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    winograd = pytest.importorskip("scm_sdk.export.precision.winograd")
    faster = set()
    for path in RESULTS.glob("winograd-*.json"):
        table = json.loads(path.read_bytes())
        gains: dict[str, list[float]] = {}
        for row in table["results"]:
            if winograd._Sizes(row["channels"], row["channels"], row["side"], row["side"]).worth_it:
                gains.setdefault(row["library"], []).append(row["gain"])
        if all(geometric_mean(each) > 1.1 for each in gains.values()):
            faster.add(table["machine"]["cpu_class"])
    assert faster == selection.FP32_CPU_IS_FASTER
    wide = Artifact(path="wide", format="onnx", precision="fp32-cpu", num_inference_steps=2)
    passed = [record(), msgspec.structs.replace(record(), artifact="wide")]
    monkeypatch.setattr(selection, "is_installed", lambda name: True)
    for here, first in ((HERE, "wide"), ("sse4_1", "graph")):
        monkeypatch.setattr(selection, "cpu_class", lambda here=here: here)
        plan = selection.make_plan((GRAPH, wide), num_inference_steps=2, parity=passed)
        assert plan.accepted[0].artifact == first


@computes_bf16
@pytest.mark.parametrize("backend", libraries)
def test_bf16_is_what_runs_and_what_the_output_says(unet_bundle: Path, backend: str) -> None:
    with (
        Generator.from_pretrained(unet_bundle, backend=backend) as exact,
        Generator.from_pretrained(unet_bundle, backend=backend, precision="bf16") as low,
    ):
        want, got = (gen(4, seed=1, output_type="raw") for gen in (exact, low))
        assert (want.info.precision, got.info.precision) == ("fp32", "bf16") and got.info.artifact == want.info.artifact
        off = float(np.abs(got.images - want.images).max())
        assert 1e-4 < off < 0.5, "other arithmetic, the same picture"
        if backend == "openvino":
            running: Any = low.opened().backend
            hint = running._compiled[1]._compiled.get_property("INFERENCE_PRECISION_HINT")
            assert hint.to_string() == "bf16"
        else:
            model: Any = low.opened().backend.model  # type: ignore[attr-defined]
            kinds = {str(p.dtype) for p in model.parameters() if p.ndim > 1}
            assert kinds == {"torch.bfloat16", "torch.float32"}, "the time's layers stay float32"


@computes_bf16
@pytest.mark.parametrize("backend", libraries)
def test_validate_records_bf16_with_its_class_and_a_failure_is_none_of_the_bundles(
    unet_copy: Path, backend: str
) -> None:
    options: Any = {"backends": [backend], "steps": [2], "num_seeds": 4, "batches": [1, 4]}
    offered = [each for each in validate_bundle(unet_copy, min_psnr_db=200.0, **options) if each.precision == "bf16"]
    assert [(each.required, bool(each)) for each in offered] == [(False, False)]
    assert str(offered[0]).startswith("not taken")
    offered[0].raise_if_failed()
    (mine,) = (r for r in Bundle.open(unet_copy).manifest.parity if r.precision == "bf16")
    assert (mine.cpu_class, mine.verdict, mine.passed) == (cpu_class(), "not taken", False)
    assert verdict(Bundle.open(unet_copy).manifest)["kind"] != "fail"
    with Generator.from_pretrained(unet_copy) as gen:
        assert any(row.precision == "bf16" and row.reason.startswith("recorded parity failed") for row in gen.plan())
    (asked,) = validate_bundle(unet_copy, precisions=["bf16"], min_psnr_db=200.0, record=False, **options)
    with pytest.raises(ParityError, match=f"on {backend} in bf16 .*at least 200.0 dB"):
        asked.raise_if_failed()


@computes_bf16
@pytest.mark.parametrize("backend", libraries)
def test_each_library_is_asked_what_it_computes(backend: str) -> None:
    assert BACKENDS[backend].cannot_compute("bf16") == ""
    assert "f8e4m3" in BACKENDS[backend].cannot_compute("f8e4m3")
