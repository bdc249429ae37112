"""Precision and recall, and how much worse one way of making the same seeds is than another."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from scm_sdk.errors import ConfigError, ParityError, ShapeError
from scm_sdk.evaluate.quality.distances import kernel_distance, kernel_distance_delta, precision_recall
from scm_sdk.evaluate.quality.quality import Quality
from scm_sdk.evaluate.quality.scoring import Score
from scm_sdk.export.cli import main


@pytest.fixture
def draw() -> np.random.Generator:
    """Return draws that are the same whichever tests ran before."""
    return np.random.default_rng(0)


def test_precision_and_recall_of_known_sets(draw: np.random.Generator) -> None:
    real = draw.standard_normal((400, 8))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    one_mode = np.concatenate([real[:200], draw.standard_normal((200, 8)) + 50])
    precision, recall = precision_recall(real[:200], one_mode)
    assert precision == 1.0 and recall == pytest.approx(0.5, abs=0.01), "a dropped mode costs recall only"
    precision, recall = precision_recall(one_mode, real[:200])
    assert precision == pytest.approx(0.5, abs=0.01) and recall == 1.0, "a false mode costs precision only"


def test_precision_and_recall_against_a_direct_transcription(draw: np.random.Generator) -> None:
    a, b = draw.standard_normal((70, 4)), draw.standard_normal((90, 4)) * 0.8 + 0.3

    def share(samples: np.ndarray, centers: np.ndarray, k: int = 3) -> float:
        inside = 0
        for x in samples:
            for c in centers:
                others = sorted(np.linalg.norm(centers - c, axis=1))
                if np.linalg.norm(x - c) <= others[k]:
                    inside += 1
                    break
        return inside / len(samples)

    assert precision_recall(a, b) == pytest.approx((share(a, b), share(b, a)))


def test_the_delta_of_the_same_seeds_is_sharp(draw: np.random.Generator) -> None:
    """Two noisy sets whose own intervals overlap differ surely once their shared part cancels."""
    real, base = draw.standard_normal((800, 16)), draw.standard_normal((800, 16)) + 0.1
    worse = base + 0.02
    assert kernel_distance_delta(base, base, real) == (0.0, (0.0, 0.0))
    delta, (low, high) = kernel_distance_delta(worse, base, real)
    assert 0 < low < delta < high
    one, two = (kernel_distance(x, real)[1] for x in (worse, base))
    assert one[0] < two[1], "unpaired, nothing could be said"
    assert delta == pytest.approx(kernel_distance(worse, real)[0] - kernel_distance(base, real)[0])


def test_wrong_features() -> None:
    x = np.zeros((10, 4))
    with pytest.raises(ConfigError, match="3 samples, expected more than 3"):
        precision_recall(x[:3], x)
    with pytest.raises(ShapeError, match="same feature network"):
        precision_recall(x, np.zeros((10, 5)))
    with pytest.raises(ShapeError, match="one row per seed"):
        kernel_distance_delta(x, x[:9], x)


def test_precisions_are_compared_seed_by_seed_and_gated(newcomer: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(newcomer / "scm-demo/avatars", tmp_path / "avatars")
    arguments = ["evaluate", str(bundle), "--steps", "1", "--num-images", "128", "--rows", "10000", "10300"]
    arguments += ["--real-rows", "0", "300", "--backend", "onnxruntime", "--cache", str(tmp_path / "cache")]
    arguments += ["--precision", "fp32", "--precision", "fp16"]
    run = CliRunner().invoke(main, [*arguments, "--max-kid-delta", "0.05", "--json"])
    assert run.exit_code == 0, run.output
    assert "data: avatars, label hairColor: real rows 0..299, held-out rows 10000..10299" in run.stderr
    full, half = (score["quality"] for score in json.loads(run.stdout))
    assert full["kid_delta"] is None and 0 <= full["recall"] <= full["precision"] + 1 <= 2
    low, high = half["kid_delta_interval"]
    assert low <= half["kid_delta"] <= high and high - low < 0.2 * (full["kid_interval"][1] - full["kid_interval"][0])
    undecided = CliRunner().invoke(main, [*arguments, "--max-kid-delta", str(half["kid_delta"])])
    assert undecided.exit_code == 3 and "undecided, not passed" in undecided.stderr, undecided.output
    failed = CliRunner().invoke(main, [*arguments, "--max-kid-delta", "-1"])
    assert failed.exit_code == 3 and "above the first precision" in failed.stderr
    assert "Keep more of it in a higher precision" in failed.stderr


def test_a_gate_that_would_compare_nothing_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["evaluate", str(tmp_path), "--precision", "int8", "--max-kid-delta", "0.01"])
    assert run.exit_code == 2 and "expected two or more" in run.stderr


def test_the_gate_passes_only_what_is_surely_good() -> None:
    def score(delta: float, low: float, high: float) -> Score:
        quality = Quality(
            metric="FD", weights_sha256="", num_generated=64, num_reference=64, fd=1, kid_delta=delta,
            kid_delta_interval=(low, high),
        )  # fmt: skip
        return Score(sampler="int8", network_calls=1, quality=quality)

    score(0.001, -0.001, 0.003).raise_if_worse(0.003)
    with pytest.raises(ParityError, match="undecided, not passed"):
        score(0.001, -0.001, 0.003).raise_if_worse(0.002)
    with pytest.raises(ParityError, match="Keep more of it"):
        score(0.004, 0.003, 0.005).raise_if_worse(0.002)
