"""Budgets in a bundle, and comparisons of bundles."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.commands import run
from helpers.recorded_events import Recorded
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import ConfigError, LatencyError
from scm_sdk.evaluate.stored_budgets import check_budgets, keep_budgets
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.variants import add_precision


def test_a_kept_budget_is_enforced_by_validate(unet_copy: Path) -> None:
    generous = "onnxruntime:p95=60s@b1,median=60s@b2"
    arguments = ["bench", unet_copy, "--budget", generous, "--batch", 1, "--batch", 2, "--rounds", 10, "--keep-budget"]
    assert f"validate enforces {generous} from now on" in run(*arguments).stderr
    assert Bundle.open(unet_copy).manifest.budgets == ("onnxruntime:p95=60s@b1", "median=60s@b2")
    out = run("validate", unet_copy).stderr
    assert "pass  latency of onnxruntime, batch 1" in out and "pass  latency of auto, batch 2" in out
    keep_budgets(unet_copy, "onnxruntime:p95=0.001us@b1")
    assert "FAIL  latency of onnxruntime, batch 1" in run("validate", unet_copy, code=4).stderr
    assert "latency" not in run("validate", unet_copy, "--precision", "fp32").stderr
    add_precision(unet_copy, default_plan("fp16"), steps=[1], num_samples=1)
    assert Bundle.open(unet_copy).manifest.budgets == ("onnxruntime:p95=0.001us@b1",), "extending keeps it"
    with pytest.raises(LatencyError, match="onnxruntime has p95"):
        check_budgets(unet_copy)[0].raise_if_over()
    assert keep_budgets(unet_copy, "").manifest.budgets == () and check_budgets(unet_copy) == []


def test_a_lower_arithmetic_that_is_not_taken_leaves_the_budgets_in_force(unet_copy: Path) -> None:
    """Where this CPU offers bf16, its images miss the gate here, which is no failure of the bundle."""
    keep_budgets(unet_copy, "onnxruntime:p95=60s@b1")
    gate = ("--min-psnr", 200, "--num-seeds", 4, "--batch", 1, "--no-record")
    assert "pass  latency of onnxruntime, batch 1" in run("validate", unet_copy, *gate).stderr


def test_budgets_that_cannot_be_kept(unet_copy: Path) -> None:
    with pytest.raises(ConfigError, match="budget is 'fast'"):
        keep_budgets(unet_copy, "fast")
    with pytest.raises(ConfigError, match=r"for 'onnxruntime of earlier', expected one of auto"):
        keep_budgets(unet_copy, "onnxruntime of earlier:p95=1s@b1")
    keep_budgets(unet_copy, "tensorrt:p95=1ms@b1")
    events = Recorded()
    assert check_budgets(unet_copy, events=events) == []
    assert "the budget of tensorrt is not measured here" in events.skipped[0]


def test_bundles_are_timed_beside_each_other(unet_bundle: Path, tmp_path: Path) -> None:
    earlier = Path(shutil.copytree(unet_bundle, tmp_path / "earlier"))
    arguments = ["bench", unet_bundle, "--backend", "onnxruntime", "--against", earlier, "--batch", 1, "--rounds", 10]
    (latency,) = json.loads(run(*arguments, "--json").stdout)
    assert [timing["name"] for timing in latency["timings"]] == ["onnxruntime", "onnxruntime of earlier"]


def test_a_stored_budget_is_neither_lost_nor_replaced_by_one_that_is_not_kept(unet_copy: Path) -> None:
    keep_budgets(unet_copy, "p95=60s@b1")
    bench = ["bench", unet_copy, "--backend", "onnxruntime", "--batch", 1, "--rounds", 10, "--keep-budget"]
    assert "needs --budget" in run(*bench, code=2).stderr
    assert "has p95" in run(*bench, "--budget", "p95=0.001us@b1", code=4).stderr
    assert Bundle.open(unet_copy).manifest.budgets == ("p95=60s@b1",)
    assert "the stored budget was removed" in run(*bench, "--budget", "").stderr
    assert Bundle.open(unet_copy).manifest.budgets == ()


def test_bundles_of_one_name_are_told_apart(unet_bundle: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copytree(unet_bundle, tmp_path / name / "bundle")) for name in ("old", "older")]
    arguments = ["bench", unet_bundle, "--backend", "onnxruntime", "--batch", 1, "--rounds", 10, "--json"]
    (latency,) = json.loads(run(*arguments, "--against", paths[0], "--against", paths[1]).stdout)
    assert [timing["name"] for timing in latency["timings"]] == ["onnxruntime", *(f"onnxruntime of {p}" for p in paths)]
    assert "given twice" in run(*arguments, "--against", unet_bundle, code=2).stderr


def test_a_verdict_belongs_to_its_own_candidate(unet_copy: Path) -> None:
    """One name begins like another: only the one that is over its budget fails."""
    keep_budgets(unet_copy, "onnxruntime:p95=60s@b1,onnxruntime:fp32:p95=0.001us@b1")
    done = run("validate", unet_copy, "--json", code=4)
    assert "pass  latency of onnxruntime, batch 1" in done.stderr
    assert "FAIL  latency of onnxruntime:fp32, batch 1" in done.stderr
    (latency,) = json.loads(done.stdout)["latency"]
    assert latency["exceeded"] == ["onnxruntime:fp32"] and not latency["passed"]
