"""The plan: what runs, what does not, why, and what happens when it cannot."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest

from scm_sdk import Generator
from scm_sdk._util.lazy import is_installed
from scm_sdk.bundle.bundle import Bundle, write_bundle
from scm_sdk.bundle.goldens import Golden, write_goldens
from scm_sdk.bundle.manifest import Artifact, Manifest, ParityRecord
from scm_sdk.errors import BackendFailure, BackendUnavailable, BundleError, ConfigError, IntegrityError
from scm_sdk.inference import backends, selection
from scm_sdk.inference.generator import Verify
from scm_sdk.inference.latency_cache import cache_path, recall
from scm_sdk.inference.selection import Measured, Plan, PlanRow, nothing_accepted
from scm_sdk.inference.sources import open_source
from scm_sdk.spec import SamplerSpec

GRAPH = "onnx/fp32/2step/model.onnx"
PLAIN = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), max_batch=4)
LABELED = msgspec.structs.replace(PLAIN, num_classes=3)


def record(backend: str = "onnxruntime", *, passed: bool = True, artifact: str = GRAPH) -> ParityRecord:
    return ParityRecord(
        artifact=artifact,
        reference="denoiser",
        backend=backend,
        threshold=1e-5,
        noise_floor=2e-6,
        max_abs=3e-6 if passed else 4e-2,
        num_samples=32,
        passed=passed,
    )


def test_auto_takes_onnxruntime_only_with_a_passed_parity(unet_copy: Path) -> None:
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "torch"
        row = next(row for row in gen.plan() if (row.backend, row.artifact) == ("onnxruntime", GRAPH))
        assert row.reason == "no recorded parity; compare it (scm-export validate) or ask for the backend by name"
    Bundle.open(unet_copy).with_parity(record())
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "onnxruntime"
        chosen = gen.plan().chosen
        assert chosen is not None
        assert chosen.reason == "parity passed: 3.0e-06 of 1.0e-05 allowed"
    Bundle.open(unet_copy).with_parity(record(passed=False))
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "torch"
        assert any(row.reason == "recorded parity failed: 4.0e-02 of 1.0e-05 allowed" for row in gen.plan().rejected)
    # A name opens it, or it could never be compared again; with a warning.
    with pytest.warns(RuntimeWarning, match=rf"onnxruntime runs {GRAPH}.* failed: 4.0e-02"):
        Generator.from_pretrained(unet_copy, backend="onnxruntime").close()


def test_auto_follows_what_was_measured_here(unet_copy: Path) -> None:
    Bundle.open(unet_copy).with_parity(record())
    build_id = Bundle.open(unet_copy).manifest.build_id
    with Generator.from_pretrained(unet_copy) as gen:
        latency = gen.benchmark(rounds=3, warmup=1)
        assert [timing.name for timing in latency] == [f"onnxruntime:{GRAPH}", "torch:denoiser"]
        assert gen(1, seed=0).images, "benchmark closes only what it opened"
    times = recall(build_id, num_inference_steps=2, device=None, num_threads=None)
    assert times == {
        ("onnxruntime", GRAPH, "fp32"): (latency.timings[0].median_ms, 1),
        ("torch", "denoiser", "fp32"): (latency.timings[1].median_ms, 1),
    }
    # Written as if torch had won: the file decides, not the order of BACKENDS.
    path = cache_path()
    assert path is not None
    data = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: [1e-3 if key.startswith("torch") else 9.0, 8] for key in data}), encoding="utf-8")
    with Generator.from_pretrained(unet_copy) as gen:
        assert [row.backend for row in gen.plan().accepted] == ["torch", "onnxruntime"]
        assert "measured here: 9.00 ms at batch 8" in str(gen.plan())
        assert gen.plan().to_dict()[1]["measured"] == {"ms": 9.0, "batch": 8}
        gen.benchmark(rounds=3, warmup=1, batch=3)
    times = recall(build_id, num_inference_steps=2, device=None, num_threads=None)
    assert [median.batch for median in times.values()] == [3, 3], "the last measurement counts"
    assert recall(build_id, num_inference_steps=1, device=None, num_threads=None) == {}
    assert recall(build_id, num_inference_steps=2, device="cuda", num_threads=None) == {}
    assert recall("another build", num_inference_steps=2, device=None, num_threads=None) == {}
    path.write_text(json.dumps(dict.fromkeys(data, 1e-3)), encoding="utf-8")
    assert recall(build_id, num_inference_steps=2, device=None, num_threads=None) == {}, "of another version"
    path.write_text("not json", encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="is ignored"), Generator.from_pretrained(unet_copy) as gen:
        assert gen.plan().accepted[0].backend == "onnxruntime"


def test_the_plan_holds_every_pair_that_could_be_and_prints_as_a_table(ort: Generator) -> None:
    plan = ort.plan()
    assert {(row.backend, row.artifact.partition("/")[0]) for row in plan} == {
        ("onnxruntime", "onnx"),
        ("openvino", "onnx"),
        ("torch", "denoiser"),
    }
    assert len({row.key for row in plan}) == len(plan) == 5 + 3, "three that a CPU may also compute in bf16"
    lines = str(plan).splitlines()
    assert lines[0].split() == ["backend", "artifact", "precision", "steps", "verdict", "reason"]
    assert lines[1].startswith("*  onnxruntime") and "accepted" in lines[1]
    assert all("rejected" in line for line in lines[2:-1])
    assert lines[-1] == "not shown: 3 with artifacts of other numbers of steps" and len(lines) == 1 + 5 + 1
    assert json.loads(json.dumps(plan.to_dict()))[0]["chosen"] is True
    assert plan[0] is plan.chosen and plan[1:] == plan.rejected
    assert all(row.reason for row in plan)


def test_an_artifact_that_no_precision_of_a_backend_takes_is_named_once(unet_bundle: Path) -> None:
    common = {"backend": "torch", "artifact": "denoiser", "num_inference_steps": 0, "accepted": False, "reason": "late"}
    plan = Plan([PlanRow(precision=each, **common) for each in ("fp32", "bf16")])  # type: ignore[arg-type]
    said = str(nothing_accepted(open_source(unet_bundle), plan, 2, "torch", "auto"))
    assert said.count("torch on denoiser: late") == said.count("denoiser") == 1


def test_a_plan_counts_the_rows_of_other_numbers_of_steps_also_where_no_graph_may_run() -> None:
    common = {"backend": "onnxruntime", "precision": "fp32", "accepted": False, "reason": "no recorded parity"}
    rows = [PlanRow(artifact=f"{n}step", num_inference_steps=n, **common) for n in (0, 1, 2, 4)]  # type: ignore[arg-type]
    shown = str(Plan(rows, num_inference_steps=2)).splitlines()
    assert len(shown) == 1 + 2 + 1 and shown[-1] == "not shown: 2 with artifacts of other numbers of steps"
    assert len(str(Plan(rows)).splitlines()) == 1 + 4


def test_openvino_leaves_what_is_for_engines_alone() -> None:
    artifacts = [
        Artifact(path=p, format="onnx", precision=p, num_inference_steps=2)
        for p in ("fp32", "fp16", "int8", "int8-cpu")
    ]
    parity = [record(artifact=a.path, backend=b) for a in artifacts for b in ("onnxruntime", "openvino")]
    takes = backends.BACKENDS["openvino"].takes
    assert [takes(artifact) for artifact in artifacts] == [True, False, False, True]
    for wanted in ("auto", "openvino"):
        plan = selection.make_plan(artifacts, num_inference_steps=2, parity=parity, backend=wanted)
        (against,) = [row.reason for row in plan.rejected if (row.backend, row.artifact) == ("openvino", "int8")]
        assert against == "int8 graphs are for engines; for a CPU: scm-export quantize --to int8-cpu"
        assert {row.artifact for row in plan.accepted if row.backend == "openvino"} == {"fp32", "int8-cpu"}


def test_fp32_goes_before_other_precisions_until_measured() -> None:
    artifacts = [
        Artifact(path="a", format="onnx", precision="int8", num_inference_steps=2),
        Artifact(path="b", format="onnx", num_inference_steps=2),
        Artifact(path="c", format="tensorrt", num_inference_steps=2),
    ]
    parity = [record(artifact=path) for path in "ab"]
    plan = selection.make_plan(artifacts, num_inference_steps=2, parity=parity)
    assert [row.artifact for row in plan.accepted] == ["b", "a"]
    half = {("onnxruntime", "a", "int8"): Measured(1.0, 1)}
    plan = selection.make_plan(artifacts, num_inference_steps=2, parity=parity, measured=half)
    assert [row.artifact for row in plan.accepted] == ["b", "a"]
    apart = half | {("onnxruntime", "b", "fp32"): Measured(2.0, 8)}
    plan = selection.make_plan(artifacts, num_inference_steps=2, parity=parity, measured=apart)
    assert [row.artifact for row in plan.accepted] == ["b", "a"], "times of two batches cannot be compared"
    both = half | {("onnxruntime", "b", "fp32"): Measured(2.0, 1)}
    plan = selection.make_plan(artifacts, num_inference_steps=2, parity=parity, measured=both)
    assert [row.artifact for row in plan.accepted] == ["a", "b"]
    plan = selection.make_plan(artifacts, num_inference_steps=2, parity=parity, precision="int8", measured=both)
    assert [row.artifact for row in plan.accepted] == ["a"]
    assert [row.backend for row in plan if row.artifact == "c"] == ["tensorrt"]
    assert selection.make_plan(artifacts, num_inference_steps=3, parity=parity).chosen is None


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the machine as it is where onnxruntime is not installed."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


@pytest.mark.usefixtures("without_onnxruntime")
def test_a_missing_library_is_named_with_its_command(unet_copy: Path) -> None:
    command = re.escape("pip install 'onnxruntime>=")
    with pytest.raises(BackendUnavailable, match=f"needs onnxruntime, which is not installed. .*{command}"):
        Generator.from_pretrained(unet_copy, backend="onnxruntime")
    Bundle.open(unet_copy).with_parity(record())
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen.plan().chosen.backend == "torch"  # type: ignore[union-attr]
        assert any(re.search(f"onnxruntime is not installed: {command}", row.reason) for row in gen.plan())


@pytest.mark.usefixtures("without_onnxruntime")
def test_fallback_is_the_users_choice_and_recorded(unet_bundle: Path) -> None:
    with pytest.warns(RuntimeWarning, match="torch .fp32. runs instead: backend 'onnxruntime' needs") as seen:
        gen = Generator.from_pretrained(unet_bundle, backend="onnxruntime", fallback="warn")
    assert seen[0].filename == __file__
    info = gen(1, seed=0).info
    assert info.backend == "torch"
    assert info.fallback is not None and "not installed" in info.fallback
    gen.close()
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", fallback="allow") as gen:
        assert gen(1, seed=0).info.fallback == info.fallback
    with Generator.from_pretrained(unet_bundle, precision="int8", fallback="allow") as gen:
        assert "precision 'int8' is not in" in (gen(1, seed=0).info.fallback or "")


def test_a_library_that_does_not_import_is_no_crash(unet_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, by its metadata, and broken: found when it is opened."""
    broken = replace(backends.BACKENDS["onnxruntime"], module="scm_sdk.runtimes.torch_backend", opens=("onnx",))
    monkeypatch.setitem(backends.BACKENDS, "onnxruntime", broken)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailable, match="needs torch, which is not installed"):
        Generator.from_pretrained(unet_bundle, backend="onnxruntime")


def test_damage_never_falls_back(unet_copy: Path) -> None:
    with open(unet_copy / GRAPH, "r+b") as stream:
        stream.seek(100)
        stream.write(b"\0" * 50)
    with pytest.raises(IntegrityError, match="altered or damaged"):
        Generator.from_pretrained(unet_copy, backend="onnxruntime", fallback="allow")
    with pytest.raises(IntegrityError):
        Generator.from_pretrained(unet_copy, backend="onnxruntime", fallback="allow", verify="none")


def test_a_checkpoint_folder_runs_with_torch(unet_checkpoint: Path, reference: Generator) -> None:
    # One thread like the reference: another number orders the sums of a convolution differently.
    with Generator.from_pretrained(unet_checkpoint, num_threads=1) as gen:
        out = gen(3, seed=1, output_type="raw")
        np.testing.assert_array_equal(out.images, reference(3, seed=1, output_type="raw").images)
        assert (out.info.artifact, len(out.info.sha256)) == (".", 64)
    with Generator.from_pretrained(unet_checkpoint, backend="torch") as gen:
        assert gen(1, seed=1, num_inference_steps=5).info.num_inference_steps == 5
    with pytest.raises(ConfigError, match=r"onnxruntime opens onnx\. .*scm-export onnx"):
        Generator.from_pretrained(unet_checkpoint, backend="onnxruntime")


def test_recorded_samples_are_run_when_asked(unet_copy: Path, linear_bundle: Callable[..., Path]) -> None:
    for verify in get_args(Verify)[2:]:
        for backend in ("onnxruntime", "torch"):
            Generator.from_pretrained(unet_copy, backend=backend, verify=verify).close()
    with pytest.raises(BundleError, match=r"no sample of 2 steps.*verify='smoke'"):
        Generator.from_pretrained(linear_bundle(PLAIN), backend="onnxruntime", verify="smoke")
    bundle = Bundle.open(unet_copy)
    golden = bundle.goldens()[2]
    moved = Golden(images=golden.images + np.float32(0.01), seeds=golden.seeds, class_labels=golden.class_labels)
    write_goldens(unet_copy, {2: moved})
    with pytest.raises(BackendFailure, match=r"the recorded sample by 2\.0e-02 sigma_data"):
        _open_with_new_golden(unet_copy)


def _open_with_new_golden(path: Path) -> None:
    """Record the golden's new digest in the manifest, then open."""
    manifest = Manifest.from_json((path / "scm_manifest.json").read_bytes())
    write_bundle(path, name="moved", samplers=manifest.samplers, artifacts=manifest.artifacts)
    Generator.from_pretrained(path, backend="onnxruntime", verify="smoke")


def test_a_bare_folder_is_not_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()  # what stub packages leave behind
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert find_spec("tensorrt") is not None
    assert not is_installed("tensorrt") and not is_installed("no_such_package.part")
    assert is_installed("numpy") and is_installed("scm_sdk.noise")
