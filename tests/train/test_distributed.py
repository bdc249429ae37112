"""Several processes, or a batch in parts, give the weights of one process that sees the whole batch at once."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.distributed_fixtures import TOLERANCE, assert_same, config, finish, job, start, weights
from scm_sdk.errors import ConfigError
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.edm2 import EDM2Config
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.parallel.distributed import Scale, World, joined
from scm_sdk.train.parallel.sharding import blocks_of, check_scale


@pytest.fixture(scope="module")
def two_processes(room) -> Path:
    """Teacher, sCD and sCT in two processes, by DDP and by FSDP2, as one start of them does all."""
    fsdp = Scale(parallel="fsdp", recompute=True)
    jobs = [
        job(config(room, "diffusion"), room / "diffusion-ddp", Scale()),
        job(config(room, "scd"), room / "scd-ddp", Scale(accumulate=2)),
        job(config(room, "sct"), room / "sct-ddp", Scale(recompute=True)),
        job(config(room, "diffusion"), room / "diffusion-fsdp", fsdp, stop_at=3),
        job(config(room, "scd"), room / "scd-fsdp", fsdp),
        job(config(room, "sct"), room / "sct-fsdp", Scale(parallel="fsdp", accumulate=2)),
    ]
    finish(start(jobs, room))
    return room


@pytest.mark.parametrize("objective", ["diffusion", "scd", "sct"])
def test_two_processes_give_the_weights_of_one(two_processes, objective):
    train(config(two_processes, objective), two_processes / objective, Hooks(log_every=1))
    if objective == "diffusion":  # cut short after a checkpoint of two processes; one resumes
        assert not (two_processes / "diffusion-fsdp" / "state.safetensors").exists()
        train(config(two_processes, objective), two_processes / "diffusion-fsdp", Hooks(log_every=1))
        assert not list((two_processes / "diffusion-fsdp").glob("state-*"))
    for parallel in ("ddp", "fsdp"):
        assert_same(two_processes / f"{objective}-{parallel}", two_processes / objective, two_processes)


@pytest.mark.parametrize("scale", [Scale(accumulate=4), Scale(accumulate=2, recompute=True)])
def test_a_batch_in_parts_is_the_batch(room, tmp_path, scale):
    train(config(room, "scd"), tmp_path / "whole", Hooks(log_every=1))
    train(config(room, "scd"), tmp_path / "parts", Hooks(log_every=1), scale=scale)
    assert_same(tmp_path / "parts", tmp_path / "whole", room)


def test_discrete_parts_draw_their_own_rows(room, tmp_path):
    run = config(room, "cd", anchor_weight=1.0, stable_targets=True)
    train(run, tmp_path / "whole", Hooks(log_every=1))
    train(run, tmp_path / "parts", Hooks(log_every=1), scale=Scale(accumulate=2))
    assert_same(tmp_path / "parts", tmp_path / "whole", room)


@pytest.mark.parametrize(
    "changes, scale, size, message",
    [
        ({}, Scale(), 3, r"batch_size is 8, which 3 processes of 1 parts .* a multiple of 3"),
        ({}, Scale(accumulate=3), 2, r"2 processes of 3 parts .* a multiple of 6"),
        ({"vsd_weight": 1.0}, Scale(), 2, "VSD takes a step of its own"),
        ({"vsd_weight": 1.0}, Scale(accumulate=2), 1, "VSD takes a step of its own"),
        ({"compile": True}, Scale(), 2, "--compile goes with one process only"),
        ({}, Scale(parallel="fsdp"), 1, "Start it with torchrun"),
    ],
)
def test_what_would_go_wrong_is_refused_by_name(room, changes, scale, size, message):
    with pytest.raises(ConfigError, match=message):
        check_scale(config(room, "scd", **changes), scale, World(size=size))


def test_trajectories_are_refused(room):
    with pytest.raises(ConfigError, match="--trajectory-steps solves a block"):
        check_scale(config(room, "trajectory", trajectory_steps=3), Scale(), World(size=2))


def test_restarts_that_would_not_find_each_other_are_refused(room, tmp_path, monkeypatch):
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (told | {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--max-restarts 3, .* Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        train(config(room, "diffusion"), tmp_path / "run")


@pytest.mark.parametrize("words", ["", "gloo: connection closed by NCCL"])
def test_a_failure_of_ones_own_is_not_about_the_others(monkeypatch, words):
    """Whatever it says: the place where it was raised decides."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RuntimeError) as caught, joined(Scale(device="cpu")):
        if words:
            raise RuntimeError(words)
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert type(caught.value) is RuntimeError


def test_impossible_scales():
    with pytest.raises(ConfigError, match="accumulate is 0, expected 1 or more"):
        Scale(accumulate=0)
    with pytest.raises(ConfigError, match="timeout is 0"):
        Scale(timeout=0)


def test_blocks_are_what_has_parts():
    network = ConsistencyModel(ModelConfig(network=tiny())).network
    names = {name for name, module in network.named_modules() if any(module is block for block in blocks_of(network))}
    assert names == {"down.0", "down.2", "middle", "up.0", "up.1", "up.3", "up.4"}
    inside = sum(p.numel() for block in blocks_of(network) for p in block.parameters())
    assert inside > 0.8 * sum(p.numel() for p in network.parameters())


EDM2 = EDM2Config(
    image_size=8, in_channels=1, channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,),
    head_channels=16, num_classes=3,
)  # fmt: skip


@pytest.mark.slow
def test_every_objective_and_network_in_shares(room, tmp_path):
    fsdp = Scale(parallel="fsdp")
    runs = {
        "cd": config(room, "cd", anchor_weight=1.0, stable_targets=True),
        "jvp": config(room, "scd", tangent_mode="jvp"),
        "fd": config(room, "scd", tangent_mode="fd"),
        "profiles": config(room, "diffusion", ema_profiles=(0.05, 0.1), ema_snapshot_every=2),
        "unweighted": config(room, "sct", adaptive_weighting=False, optimizer="radam", learning_rate=0.01),
        "edm2": config(room, "diffusion", network=EDM2, init_from="", learning_rate=0.01),
    }
    jobs = [job(run, tmp_path / f"{name}-fsdp", fsdp) for name, run in runs.items()]
    jobs += [job(runs["jvp"], tmp_path / "jvp-ddp", Scale()), job(runs["cd"], tmp_path / "cd-ddp", Scale())]
    jobs += [job(runs["edm2"], tmp_path / "edm2-ddp", Scale(recompute=True))]
    finish(start(jobs, tmp_path))
    for name, run in runs.items():
        train(run, tmp_path / name, Hooks(log_every=1))
        for out in tmp_path.glob(f"{name}-*"):
            if name == "edm2":
                assert float((weights(out) - weights(tmp_path / name)).abs().max()) < 1e-5
            else:  # finite differences magnify rounding: 4e-4 between halves of a batch in one process
                assert_same(out, tmp_path / name, room, 1e-3 if name == "fd" else TOLERANCE)
    snapshots = sorted(path.name for path in (tmp_path / "profiles-fsdp" / "ema").iterdir())
    assert snapshots == sorted(path.name for path in (tmp_path / "profiles" / "ema").iterdir())
    for name in snapshots:
        found, expected = (load_file(tmp_path / run / "ema" / name) for run in ("profiles-fsdp", "profiles"))
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_is_that_of_the_parts(room, tmp_path):
    run = config(room, "scd", dropout=0.3)
    finish(
        start([job(run, tmp_path / "two", Scale()), job(run, tmp_path / "shares", Scale(parallel="fsdp"))], tmp_path)
    )
    train(run, tmp_path / "parts", Hooks(log_every=1), scale=Scale(accumulate=2))
    assert_same(tmp_path / "two", tmp_path / "parts", room)
    assert_same(tmp_path / "shares", tmp_path / "parts", room)
    train(run, tmp_path / "whole", Hooks(log_every=1))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "whole", tmp_path / "parts", room)


@pytest.mark.slow
def test_the_command_under_torchrun_prints_once(room, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "scm_sdk.export.cli", "distill", "-o", str(tmp_path / "run"), "--teacher", str(room / "first")]
    command += ["--data", str(room / "data.npz"), "--label", "kind", "--iterations", "2", "--batch-size", "8", "--json"]
    done = subprocess.run([*command, "--parallel", "fsdp"], capture_output=True, encoding="utf-8", timeout=1800)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["last"]["iteration"] == 2
    assert done.stderr.count("2 iterations to") == 1
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1
    wrong = subprocess.run([*command, "--accumulate", "3"], capture_output=True, encoding="utf-8", timeout=1800)
    assert wrong.returncode == 1
    assert wrong.stderr.count("batch_size is 8, which 2 processes of 3 parts") == 1
