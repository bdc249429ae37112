"""Several processes, or a batch in parts, give the weights of one process that sees the whole batch at once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scm_sdk.errors import ConfigError
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.edm2 import EDM2Config
from scm_sdk.model.presets import tiny
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.distributed import Scale, World
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.sharding import blocks_of, check_scale

WORKER = Path(__file__).with_name("distributed_worker.py")
TOLERANCE = 2e-4
"""Largest difference of the weights, relative to how far they moved; float32 gradients differ by some 1e-6."""


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with images, and a model whose every parameter is random, so that no gradient is zero."""
    folder = tmp_path_factory.mktemp("room")
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, kind=np.arange(24) % 3, kind_names=np.array(["a", "b", "c"]))
    model = ConsistencyModel(ModelConfig(network=tiny(num_classes=3), class_names=("a", "b", "c")))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    model.save_pretrained(folder / "first")
    return folder


def config(room: Path, objective: str, **changes) -> TrainConfig:
    first = str(room / "first")
    base = {
        "objective": objective,
        "data": DataConfig(source=str(room / "data.npz"), label="kind"),
        "batch_size": 8,
        "num_iterations": 3,
        "warmup_iterations": 0,
        "tangent_warmup": 0,
        "label_dropout": 0.2,
        "epsilon": 0.01,  # the step is a smooth function of the gradient, where Adam's would be its sign
        "init_from": first,
        "teacher": "" if objective in ("diffusion", "sct") else first,
    }
    return TrainConfig(**{**base, **changes})


def job(run: TrainConfig, out: Path, scale: Scale, **more) -> dict:
    return {"config": run.to_json(), "out": str(out), "scale": asdict(scale), **more}


def start(jobs: list[dict], folder: Path, size: int = 2) -> list[subprocess.Popen]:
    """Start processes as torchrun would; without its agent a test is faster by one import of torch."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(listed)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    for process, (out, err) in zip(processes, ends_of(processes), strict=True):
        assert process.returncode == 0, out + err


def ends_of(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """Wait for processes; none outlives the test, whatever happens."""
    try:
        return [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in ConsistencyModel.from_pretrained(folder).state_dict().values()])


def assert_same(found: Path, expected: Path, room: Path) -> None:
    moved = (weights(expected) - weights(room / "first")).norm()
    assert moved > 0.01
    error = float((weights(found) - weights(expected)).norm() / moved)
    assert error < TOLERANCE, f"{found.name}: {error:.1e}"
    for here, there in zip(log(found), log(expected), strict=True):
        for name in ("loss", "residual", "grad_norm"):
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), (found.name, name)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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
    if objective == "diffusion":  # cut short after a checkpoint of two processes; one goes on
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
        "unweighted": config(room, "sct", adaptive_weighting=False, optimizer="radam"),
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
            else:
                assert_same(out, tmp_path / name, room)
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
def test_a_run_goes_on_with_another_number_of_processes(room, tmp_path):
    run = config(room, "scd", num_iterations=6, optimizer="radam")
    train(run, tmp_path / "whole", Hooks(log_every=1))
    fsdp, out = Scale(parallel="fsdp"), tmp_path / "run"
    train_until(run, out, 3)
    finish(start([job(run, out, fsdp, stop_at=5), job(run, tmp_path / "other", fsdp, stop_at=3)], tmp_path))
    assert (out / "state-00000004").is_dir() and not (out / "state.safetensors").exists()
    finish(start([job(run, out, fsdp), job(run, tmp_path / "other", Scale())], tmp_path, size=4))
    assert_same(out, tmp_path / "whole", room)
    assert_same(tmp_path / "other", tmp_path / "whole", room)


def train_until(run: TrainConfig, out: Path, stop: int) -> None:
    class Stop(Exception):
        pass

    def on_step(done: int) -> None:
        if done == stop:
            raise Stop

    with pytest.raises(Stop):
        train(run, out, Hooks(on_step=on_step, log_every=1, checkpoint_every=2))


@pytest.mark.slow
def test_a_killed_process_is_started_again_by_torchrun(room, tmp_path):
    run = config(room, "scd", num_iterations=6)
    train(run, tmp_path / "whole", Hooks(log_every=1))
    more = {"kill_at": 5, "killed": str(tmp_path / "killed")}
    (tmp_path / "jobs.json").write_text(json.dumps([job(run, tmp_path / "run", Scale(parallel="fsdp"), **more)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(WORKER), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists() and "Signal 9" in done.stderr
    assert_same(tmp_path / "run", tmp_path / "whole", room)


@pytest.mark.slow
def test_a_process_that_hangs_is_told(room, tmp_path):
    run = config(room, "diffusion", num_iterations=6)
    waiting, hanging = start([job(run, tmp_path / "run", Scale(timeout=20), hang_at=3)], tmp_path)
    out, err = waiting.communicate(timeout=1800)
    hanging.kill()
    hanging.communicate()
    assert waiting.returncode == 1
    assert "process 0 of 2 lost the others: one of them ended, or did not answer within 20 s (--timeout)" in err, (
        out + err
    )
    assert (tmp_path / "run" / "state.safetensors").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_costs_no_checkpoint(room, tmp_path):
    run = config(room, "diffusion", num_iterations=6)
    processes = start([job(run, tmp_path / "run", Scale(parallel="fsdp"), full_at=3)], tmp_path)
    ends = [err for _, err in ends_of(processes)]
    assert [process.returncode for process in processes] == [1, 1]
    for err in ends:
        assert "state-00000004 cannot be written: [Errno 27] File too large" in err
    assert [path.name for path in (tmp_path / "run").iterdir() if "state" in path.name] == ["state-00000002"]


@pytest.mark.slow
def test_sigterm_saves_after_one_and_the_same_iteration(room, tmp_path):
    run, out = config(room, "diffusion", num_iterations=100_000), tmp_path / "run"
    processes = start([job(run, out, Scale(parallel="fsdp"), checkpoint_every=100_000)], tmp_path)
    deadline = time.monotonic() + 500
    while not (out / "log.jsonl").exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    ends = [err for _, err in ends_of(processes)]
    assert all("KeyboardInterrupt" in err for err in ends), ends
    (state,) = out.glob("state-*")
    assert json.loads((state / "counters.json").read_text())["iteration"] == len(log(out))


@pytest.mark.slow
def test_the_command_under_torchrun_prints_once(room, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "scm_sdk.export.cli", "distill", "-o", str(tmp_path / "run"), "--teacher", str(room / "first")]
    command += ["--data", str(room / "data.npz"), "--label", "kind", "--iterations", "2", "--batch-size", "8", "--json"]
    done = subprocess.run([*command, "--parallel", "fsdp"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["last"]["iteration"] == 2
    assert done.stderr.count("2 iterations to") == 1
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1
    wrong = subprocess.run([*command, "--accumulate", "3"], capture_output=True, text=True, timeout=1800)
    assert wrong.returncode == 1
    assert wrong.stderr.count("batch_size is 8, which 2 processes of 3 parts") == 1
