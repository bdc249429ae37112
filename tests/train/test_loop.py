"""Runs as people make them: they end where they should, resume exactly, and fail in one clear line."""

import json
import signal
from dataclasses import asdict

import msgspec
import numpy as np
import pytest
import torch

from scm_sdk.errors import BundleError, ConfigError, IntegrityError, TrainError
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train import build
from scm_sdk.train.averages.ema import update_ema
from scm_sdk.train.batches import draw_batch
from scm_sdk.train.config import DataConfig, OptimizerConfig, TrainConfig
from scm_sdk.train.data.images import ImageData, load_data
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.objectives import trajectory
from scm_sdk.train.objectives.base import diffusion_loss, sample_times
from scm_sdk.train.parallel.state import STATE_FILE


def config(npz, **changes) -> TrainConfig:
    base = {
        "objective": "diffusion",
        "data": DataConfig(source=str(npz), label="kind"),
        "network": tiny(num_classes=3),
        "batch_size": 4,
        "num_iterations": 6,
        "warmup_iterations": 2,
        "label_dropout": 0.2,
        "dropout": 0.1,
    }
    return TrainConfig.from_settings({**base, **changes})


def weights(folder):
    return ConsistencyModel.from_pretrained(folder).state_dict()


def assert_equal_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Stop(Exception):
    pass


def stop_at(iteration):
    def step(done):
        if done == iteration:
            raise Stop

    return step


@pytest.mark.parametrize("objective", ["diffusion", "scd", "sct"])
def test_interrupted_run_ends_like_an_uninterrupted_one(npz, tmp_path, objective):
    teacher = tmp_path / "teacher"
    train(config(npz, num_iterations=2), teacher)
    run = config(
        npz,
        objective=objective,
        init_from=str(teacher) if objective == "sct" else "",
        teacher=str(teacher) if objective == "scd" else "",
        optimizer="radam",
    )
    train(run, tmp_path / "whole")
    with pytest.raises(Stop):
        train(run, tmp_path / "parts", Hooks(checkpoint_every=2, log_every=1, on_step=stop_at(5)))
    train(run, tmp_path / "parts", Hooks(checkpoint_every=2, log_every=1))
    lines = (tmp_path / "parts" / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_student_may_start_from_another_student(npz, tmp_path):
    train(config(npz, num_iterations=2), tmp_path / "teacher")
    train(config(npz, num_iterations=2, seed=1), tmp_path / "other")
    run = config(
        npz, objective="scd", teacher=str(tmp_path / "teacher"), init_from=str(tmp_path / "other"),
        num_iterations=1, learning_rate=1e-12,
    )  # fmt: skip
    train(run, tmp_path / "run")
    mine, other, teacher = (weights(tmp_path / name) for name in ("run", "other", "teacher"))
    assert all(torch.allclose(mine[name], other[name], atol=1e-9) for name in mine)
    assert not all(torch.allclose(mine[name], teacher[name], atol=1e-4) for name in mine)


@pytest.mark.parametrize("objective", ["diffusion", "sct"])
def test_stable_targets_train_and_resume_exactly(npz, tmp_path, objective):
    train(config(npz, num_iterations=2), tmp_path / "first")
    run = config(npz, objective=objective, init_from=str(tmp_path / "first"), stable_targets=True)
    train(run, tmp_path / "whole")
    with pytest.raises(Stop):
        train(run, tmp_path / "parts", Hooks(checkpoint_every=2, on_step=stop_at(5)))
    train(run, tmp_path / "parts", Hooks(checkpoint_every=2))
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "cd", "anchor_weight": 1.0, "stable_targets": True},
        {"objective": "trajectory", "trajectory_steps": 3, "huber": 0.03},
    ],
)
def test_distillation_without_a_tangent_resumes_exactly_and_keeps_its_second_time(npz, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(trajectory, "BLOCK_ITERATIONS", 3)  # that a run crosses from block to block
    train(config(npz, num_iterations=2), tmp_path / "teacher")
    run = config(npz, network=None, teacher=str(tmp_path / "teacher"), mid_time=0.6, **changes)
    model = train(run, tmp_path / "whole")
    assert model.spec(2).times[1] == 0.6 and model.spec(3).times[1] != 0.6
    with pytest.raises(Stop):
        train(run, tmp_path / "parts", Hooks(checkpoint_every=2, on_step=stop_at(5)))
    train(run, tmp_path / "parts", Hooks(checkpoint_every=2))
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "vsd"},
        {"objective": "vsd", "vsd_weighting": "error", "vsd_warmup": 1},
        {"objective": "scd", "vsd_weight": 1.0},
        {"objective": "cd", "vsd_weight": 1.0},
        {"objective": "trajectory", "trajectory_steps": 2, "vsd_weight": 1.0, "vsd_weighting": "error"},
    ],
)
def test_vsd_runs_resume_exactly(npz, tmp_path, changes):
    train(config(npz, num_iterations=2), tmp_path / "teacher")
    run = config(npz, network=None, teacher=str(tmp_path / "teacher"), vsd_steps=2, **changes)
    model = train(run, tmp_path / "whole")
    assert model.config.provenance["objective"] == changes["objective"] + "+vsd" * ("vsd_weight" in changes)
    with pytest.raises(Stop):
        train(run, tmp_path / "parts", Hooks(checkpoint_every=2, on_step=stop_at(5)))
    train(run, tmp_path / "parts", Hooks(checkpoint_every=2))
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "whole", tmp_path / "teacher")


def test_ctrl_c_keeps_what_was_done(npz, tmp_path):
    def interrupt(done):
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config(npz), tmp_path / "run", Hooks(on_step=interrupt))
    done = []
    train(config(npz), tmp_path / "run", Hooks(on_step=done.append))
    assert done == [4, 5, 6]


def test_a_model_says_how_far_it_is_trained(npz, tmp_path):
    def seen(done):
        if done == 5:
            about = ConsistencyModel.from_pretrained(tmp_path / "run").config.provenance
            assert (about["objective"], about["iteration"], about["num_iterations"]) == ("diffusion", "4", "6")

    model = train(config(npz), tmp_path / "run", Hooks(on_step=seen, checkpoint_every=4))
    about = ConsistencyModel.from_pretrained(tmp_path / "run").config.provenance
    assert (about["iteration"], about["num_iterations"]) == ("6", "6") and model.config.provenance == about


def test_finished_run_is_not_run_again(npz, tmp_path):
    train(config(npz), tmp_path / "run")
    before = (tmp_path / "run" / STATE_FILE).read_bytes()
    train(config(npz), tmp_path / "run", Hooks(on_step=lambda _: pytest.fail("an iteration ran")))
    assert (tmp_path / "run" / STATE_FILE).read_bytes() == before


def test_another_run_is_refused(npz, tmp_path):
    train(config(npz), tmp_path / "run")
    with pytest.raises(TrainError, match=r"other settings \(seed: 0 there, 1 here\).*another folder"):
        train(config(npz, seed=1), tmp_path / "run")


def test_two_processes_never_train_in_one_folder(npz, tmp_path):
    def second(done):
        if done == 1:
            with pytest.raises(TrainError, match=r"another process is training in .*run, expected one at a time"):
                train(config(npz), tmp_path / "run")

    train(config(npz), tmp_path / "run", Hooks(on_step=second))
    train(config(npz, num_iterations=6), tmp_path / "run")  # the folder is free again


def test_truncated_state_is_named(npz, tmp_path):
    train(config(npz), tmp_path / "run")
    state = tmp_path / "run" / STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=r"state\.safetensors cannot be resumed from"):
        train(config(npz), tmp_path / "run")


def test_the_log_tells_what_the_hooks_are_told(npz, tmp_path):
    logs = []
    train(config(npz), tmp_path / "run", Hooks(on_log=logs.append, log_every=2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6] and lines == [asdict(log) for log in logs]


def test_a_run_learns(tmp_path):
    """Judged on one large batch that no run draws, and over several runs."""
    image = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8, 1)
    data = ImageData(images=np.stack([image, image.transpose(1, 0, 2)] * 4))
    residuals = {"before": 0.0, "after": 0.0}
    for seed in range(3):
        run = TrainConfig(
            objective="diffusion", network=tiny(), batch_size=8, num_iterations=60,
            optimizer=OptimizerConfig(warmup_iterations=2, learning_rate=3e-3), seed=seed,
        )  # fmt: skip
        judge = draw_batch(msgspec.structs.replace(run, batch_size=256), data, 999)
        after = train(run, tmp_path / str(seed), data=data)
        for name, model in (("before", ConsistencyModel(after.config).eval()), ("after", after)):
            with torch.no_grad():
                residuals[name] += float(diffusion_loss(model.network, None, judge, sigma_data=run.sigma_data)[1])
    assert residuals["after"] < 0.6 * residuals["before"], residuals


def test_nan_steps_are_skipped_then_stop_the_run(npz, tmp_path, monkeypatch):
    real, calls = build.loss_function, []

    def faulty(*arguments):
        compute = real(*arguments)

        def at(batch, iteration):
            calls.append(iteration)
            loss, residual = compute(batch, iteration)
            return loss * (float("nan") if iteration in bad else 1.0), residual

        return at

    monkeypatch.setattr(build, "loss_function", faulty)
    bad = {1, 3}
    logs = []
    train(config(npz, max_bad_steps=2), tmp_path / "some", Hooks(on_log=logs.append))
    assert logs[-1].skipped == 2
    assert all(torch.isfinite(p).all() for p in weights(tmp_path / "some").values())
    bad = {2, 3}
    with pytest.raises(TrainError, match=r"2 steps in a row .* at iteration 3"):
        train(config(npz, max_bad_steps=2), tmp_path / "many")


def test_batches_are_epochs_in_seeded_order(npz):
    run, data = config(npz), load_data(DataConfig(source=str(npz), label="kind"))
    seen = torch.cat([draw_batch(run, data, i).x_0 for i in range(3)])
    real = torch.from_numpy(data.normalized(np.arange(12)))
    assert sorted(map(tuple, seen.flatten(1).tolist())) == sorted(map(tuple, real.flatten(1).tolist()))
    again = draw_batch(run, data, 1)
    torch.testing.assert_close(again.z, draw_batch(run, data, 1).z, rtol=0, atol=0)
    other = draw_batch(msgspec.structs.replace(run, seed=1), data, 1)
    assert not torch.equal(again.z, other.z)


def test_times_follow_the_proposal(npz):
    run = config(npz, batch_size=4000, p_mean=-1.0, p_std=1.4)
    t = sample_times(4000, run.noise, torch.Generator().manual_seed(0), sigma_data=run.sigma_data).double()
    tau = (run.sigma_data * t.tan()).log()
    assert t.dtype == torch.float64 and float(tau.mean()) == pytest.approx(-1.0, abs=0.07)
    assert float(tau.std()) == pytest.approx(1.4, abs=0.05)


def test_ema_half_life():
    a, b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(a.weight), torch.nn.init.ones_(b.weight)
    for _ in range(10):
        update_ema(a, b, 0.5 ** (1 / 10))
    assert float(a.weight.detach()) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected more than 0"),
        ({"dropout": 2.0}, r"dropout is 2.0, expected a share in \[0, 1\]"),
        ({"objective": "scd"}, "scd, cd, trajectory distill a teacher"),
        ({"teacher": "x"}, "'diffusion' and 'sct' have none"),
        ({"network": None}, "needs a network or init_from"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_configs(npz, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(npz, **changes)


def test_config_round_trip_and_unknown_key(npz):
    run = config(npz)
    assert TrainConfig.from_json(run.to_json()) == run
    with pytest.raises(ConfigError, match="speed"):
        TrainConfig.from_json(run.to_json().replace('"seed"', '"speed"'))


def test_data_and_network_must_fit(npz, tmp_path):
    with pytest.raises(ConfigError, match=r"images are .* \(1, 8, 8\), .* \(1, 16, 16\)"):
        train(config(npz, network=tiny(num_classes=3, image_size=16)), tmp_path / "run")
    with pytest.raises(ConfigError, match="data has 3 classes, the network 4"):
        train(config(npz, network=tiny(num_classes=4)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoint_round_trip_and_damage(npz, tmp_path):
    train(config(npz, num_iterations=1), tmp_path / "run")
    model = ConsistencyModel.from_pretrained(tmp_path / "run")
    assert not model.training and model.config.class_names == ("a", "b", "c")
    model.save_pretrained(tmp_path / "copy")
    assert_equal_weights(tmp_path / "run", tmp_path / "copy")

    file = tmp_path / "copy" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match="truncated or no safetensors file"):
        ConsistencyModel.from_pretrained(tmp_path / "copy")
    file.unlink()
    with pytest.raises(BundleError, match="expected the weights there"):
        ConsistencyModel.from_pretrained(tmp_path / "copy")
    with pytest.raises(BundleError, match="does not exist"):
        ConsistencyModel.from_pretrained(tmp_path / "absent")


def test_weights_of_another_network_are_refused(npz, tmp_path):
    train(config(npz, num_iterations=1), tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text("utf-8").replace('"num_classes": 3', '"num_classes": 5'), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"1 tensors differ, first 'label_embedding\.weight'"):
        ConsistencyModel.from_pretrained(tmp_path / "run")
    file.write_text(file.read_text("utf-8").replace("ScmModel", "UNet2DModel"), encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a 'ScmModel'"):
        ConsistencyModel.from_pretrained(tmp_path / "run")
