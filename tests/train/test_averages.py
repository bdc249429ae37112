"""Power-function averages: their profile, what is stored of them, and any other that is made of it afterwards."""

import json
import math
import signal

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scm_sdk.errors import ConfigError, IntegrityError, TrainError
from scm_sdk.export.cli import main
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.averages.average import average_models
from scm_sdk.train.averages.posthoc import Snapshot, profile, reconstruct, solve_weights
from scm_sdk.train.averages.schedules import inverse_sqrt_decay, power_decay, power_exponent
from scm_sdk.train.config import AveragesConfig, OptimizerConfig, TrainConfig
from scm_sdk.train.data.images import ImageData
from scm_sdk.train.loop import Hooks, train

ITERATIONS, KEPT, LATER = 12, (0.05, 0.1), 0.2


@given(st.floats(0.005, 0.28))
def test_the_exponent_gives_the_width(sigma_rel):
    gamma = power_exponent(sigma_rel)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-9)


@given(sigma_rel=st.floats(0.02, 0.28), count=st.integers(1, 40))
@settings(deadline=None)
def test_the_profile_is_what_the_recursion_makes(sigma_rel, count):
    shares = np.zeros(count)
    for iteration in range(count):
        decay = power_decay(sigma_rel, iteration)
        shares *= decay
        shares[iteration] += 1 - decay
    found = profile(Snapshot(sigma_rel=sigma_rel, iteration=count), np.arange(count + 1))
    np.testing.assert_allclose(found, shares, atol=1e-14)
    assert found.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.25])
def test_two_stored_averages_make_the_others_of_a_long_run(sigma_rel):
    """A million iterations and 100 snapshots of each: from the profiles alone, in a second."""
    stored = [Snapshot(sigma_rel=s, iteration=i) for s in KEPT for i in range(10_000, 1_000_001, 10_000)]
    factors, error = solve_weights(stored, Snapshot(sigma_rel=sigma_rel, iteration=1_000_000))
    assert error < 0.01 and factors.sum() == pytest.approx(1.0)
    exact, none = solve_weights(stored, stored[57])
    assert none < 1e-9 and np.argmax(exact) == 57


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a learning rate at which its weights move far, and what it tracked itself as the truth."""
    out = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    data = ImageData(images=rng.integers(0, 256, (32, 8, 8, 1), np.uint8))
    config = TrainConfig(
        objective="diffusion", network=tiny(), batch_size=4, num_iterations=ITERATIONS,
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_iterations=0),
        averages=AveragesConfig(profiles=(*KEPT, LATER), snapshot_every=1, sigma_rel=0.1),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(config, out, Hooks(on_step=_stop_at(5)), data)
    train(config, out, Hooks(), data)  # goes on after an interruption, averages and all
    tracked = {path.stem: load_file(path) for path in sorted((out / "ema").glob("*-0.2.safetensors"))}
    for name in tracked:
        (out / "ema" / f"{name}.safetensors").unlink()
    return out, tracked


def _stop_at(iteration):
    def stop(done):
        if done == iteration:
            signal.raise_signal(signal.SIGINT)

    return stop


@pytest.mark.parametrize("iteration", [7, ITERATIONS])
def test_an_average_made_afterwards_is_the_one_that_was_tracked(run, iteration):
    out, tracked = run
    made = reconstruct(out, LATER, iteration=iteration)
    expected = tracked[f"{iteration:08d}-0.2"]
    last = load_file(out / "ema" / f"{iteration:08d}-0.05.safetensors")
    distance = moved = 0.0
    for name, tensor in made.model.network.state_dict().items():
        distance += float((tensor - expected[name]).square().sum())
        moved += float((last[name] - expected[name]).square().sum())
    assert made.error < 1e-9 and made.num_snapshots == 2 * iteration
    assert math.sqrt(distance) < 1e-4 * math.sqrt(moved)


def test_the_runs_own_average_can_be_of_that_kind(run):
    out, _ = run
    stored = load_file(out / "ema" / f"{ITERATIONS:08d}-0.1.safetensors")
    for name, tensor in ConsistencyModel.from_pretrained(out).network.state_dict().items():
        torch.testing.assert_close(tensor, stored[name])


def test_the_command_writes_a_checkpoint(run, tmp_path):
    out, _ = run
    result = CliRunner().invoke(main, ["ema", str(out), "--sigma-rel", "0.15", "-o", str(tmp_path / "made"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["profile_error"] < 1e-6
    model = ConsistencyModel.from_pretrained(tmp_path / "made")
    assert model.config.provenance["ema"] == "power function, sigma_rel 0.15, iteration 12"
    result = CliRunner().invoke(main, ["ema", str(out), "--sigma-rel", "0.15", "-o", str(out)])
    assert result.exit_code != 0 and "holds a training run" in result.output


@pytest.mark.parametrize(
    ("sigma_rel", "iteration", "error", "message"),
    [
        (0.4, None, ConfigError, r"sigma_rel is 0.4, expected 0 < sigma_rel < 0.2887"),
        (0.1, 13, TrainError, "expected 1 to 12: there is no later snapshot"),
    ],
)
def test_what_cannot_be_made_is_refused(run, sigma_rel, iteration, error, message):
    with pytest.raises(error, match=message):
        reconstruct(run[0], sigma_rel, iteration=iteration)


def test_snapshots_that_do_not_reach_damaged_ones_and_none(run, tmp_path):
    source, _ = run
    folder = tmp_path / "ema"
    folder.mkdir()
    with pytest.raises(TrainError, match=r"holds no snapshots.*--ema-profile"):
        reconstruct(tmp_path, 0.1)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    name = f"{ITERATIONS:08d}-0.05.safetensors"
    whole = (source / "ema" / name).read_bytes()
    (folder / name).write_bytes(whole)
    with pytest.raises(TrainError, match=r"off by \d+%, .*nearer to 0\.05"):
        reconstruct(tmp_path, 0.2)
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match="is no snapshot of an average"):
        reconstruct(tmp_path, 0.05)
    about = {"scm_ema": json.dumps({"sigma_rel": 0.05, "iteration": 12})}
    save_file({"other": torch.zeros(2)}, folder / name, metadata=about)
    with pytest.raises(IntegrityError, match="does not belong to the run's network"):
        reconstruct(tmp_path, 0.05)
    weights = load_file(source / "ema" / name)
    first = min(weights)
    for change in (lambda t: t[:1], lambda t: t.int(), lambda t: t * float("nan")):
        save_file(weights | {first: change(weights[first]).contiguous()}, folder / name, metadata=about)
        with pytest.raises(IntegrityError, match=rf"does not belong to the run's network: .*{first}"):
            reconstruct(tmp_path, 0.05)
    save_file(weights, folder / name, metadata={"scm_ema": json.dumps({"sigma_rel": 0.05, "iteration": 10**30})})
    with pytest.raises(IntegrityError, match=r"is no snapshot of an average .*iteration"):
        reconstruct(tmp_path, 0.05)


def test_edm2s_learning_rate():
    rate = [inverse_sqrt_decay(n - 1, warmup=100, reference=1000) for n in (1, 50, 100, 1000, 4000)]
    assert rate == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5])
    config = TrainConfig(
        objective="diffusion", network=tiny(),
        optimizer=OptimizerConfig(
            learning_rate=0.1, schedule="inverse_sqrt", warmup_iterations=0, decay_reference=25
        ),
    )  # fmt: skip
    assert config.learning_rate_at(99) == pytest.approx(0.05)


def test_the_mean_of_runs_that_share_their_start(run, tmp_path):
    out, _ = run
    other = reconstruct(out, 0.15, iteration=10).model
    assert other.config.provenance["iteration"] == "10"
    other.save_pretrained(tmp_path / "other")
    command = ["average", str(out), str(tmp_path / "other"), "-o", str(tmp_path / "mean")]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"out": command[-1], "models": command[1:3]}
    mine, its, mean = (ConsistencyModel.from_pretrained(p) for p in (out, tmp_path / "other", tmp_path / "mean"))
    about = mean.config.provenance
    assert about["averaged"] == "the weights of 2 runs"
    assert (about["iteration"], about["num_iterations"]) == ("10", "12"), "of the run furthest from its end"
    for (name, a), b, c in zip(
        mine.network.state_dict().items(), its.network.state_dict().values(), mean.network.state_dict().values(),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(c, (a + b) / 2, msg=name)
    assert any(not torch.equal(a, c) for a, c in zip(mine.parameters(), mean.parameters(), strict=True))
    result = CliRunner().invoke(main, [*command[:3], "-o", str(out)])
    assert result.exit_code != 0 and "holds a training run" in result.output


def test_only_models_of_one_shape_are_averaged(run, tmp_path):
    out, _ = run
    with pytest.raises(ConfigError, match="1 model is given, expected two or more"):
        average_models([out])
    model = ConsistencyModel.from_pretrained(out)
    config = msgspec.structs.replace(model.config, mid_time=0.7)
    ConsistencyModel(config, model.network).save_pretrained(tmp_path / "later")
    with pytest.raises(ConfigError, match=r"mid_time = 0\.7, .* has 1\.1"):
        average_models([out, tmp_path / "later"])
