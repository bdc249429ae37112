"""The ablation's runs are all valid, have equal processor time, and are done once."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scm_sdk.train.objectives.trajectory import BLOCK_ITERATIONS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks" / "study"))
    try:
        import ablation
    finally:
        sys.path.remove(str(ROOT / "benchmarks" / "study"))
    return ablation


def test_every_run_has_a_valid_config_a_folder_of_its_own_and_a_teacher_before_it(
    ablation: ModuleType, tmp_path: Path
) -> None:
    plan, seen = ablation.plan, []
    for run in plan.all_runs():
        data = plan.DataConfig(source="avatars" if run.data == "avatars" else "fashion-mnist")
        config = plan.train_config(run, plan.Budget(), 40, tmp_path, data)
        assert config.num_iterations == 40
        assert run.method == plan.TEACHER or run.teacher.key in seen
        assert config.with_settings(run.changes) == config, "it has them"
        for name, value in run.network.items():
            assert getattr(config.network, name) == value
        seen.append(run.key)
    assert len(set(seen)) == len(seen)
    assert {run.method for run in plan.all_runs()} == set(plan.METHODS)


@given(seconds=st.floats(1, 1e4), step=st.floats(1e-3, 1), block=st.floats(0, 100))
def test_iterations_cost_what_they_may_and_one_more_would_cost_more(
    ablation: ModuleType, seconds: float, step: float, block: float
) -> None:
    def cost(iterations: int) -> float:
        return iterations * step + -(-iterations // BLOCK_ITERATIONS) * block

    found = ablation.plan.iterations_for(seconds, step=step, block=block)
    assert found == 2 or cost(found) <= seconds * (1 + 1e-9)
    assert cost(found + 1) > seconds * (1 - 1e-9)


@pytest.mark.slow
def test_runs_are_measured_tabled_and_drawn_and_not_done_again(ablation: ModuleType, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "table"
    options = ["--data", "avatars", "--seed", "1", "--only", "sCT", "--teacher-seconds", "0.5"]
    options += ["--student-seconds", "0.5", "--num-images", "16", "--num-reference", "16", "--batch-size", "4"]
    command = ["--work", str(work), "--out", str(out), *options]
    first = CliRunner().invoke(ablation.main, command, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    table = json.loads(out.with_suffix(".json").read_bytes())
    (student,) = [run for run in table["runs"] if run["method"] == "sCT"]
    assert student["cpu_seconds"] > 0 and student["iterations"] >= 2
    assert set(student["figures"]) == {"1", "2", "4"}
    assert all(np.isfinite(found["fd"]) and found["fd"] > 0 for found in student["figures"].values())
    assert "| sCT | 1 |" in out.with_suffix(".md").read_text("utf-8")
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 400
    result = work / "avatars-S-sCT-1" / ablation.RESULT
    before = result.stat().st_mtime_ns
    again = CliRunner().invoke(ablation.main, command, catch_exceptions=False)
    assert again.exit_code == 0 and "sCT-1" not in again.output and result.stat().st_mtime_ns == before
