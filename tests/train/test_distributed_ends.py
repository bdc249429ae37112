"""Interrupted runs of several processes (signal, kill, hang, full disk) resume or report the reason."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.distributed_fixtures import WORKER, assert_same, config, ends_of, finish, job, log, start
from scm_sdk.train.config import TrainConfig
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.parallel.distributed import Scale

pytestmark = pytest.mark.slow


def test_a_run_goes_on_with_another_number_of_processes(room, tmp_path):
    run = config(room, "scd", num_iterations=6, optimizer="radam", learning_rate=0.01)  # whose first steps are small
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


def test_a_killed_process_is_started_again_by_torchrun(room, tmp_path):
    run = config(room, "scd", num_iterations=6)
    train(run, tmp_path / "whole", Hooks(log_every=1))
    more = {"kill_at": 5, "killed": str(tmp_path / "killed")}
    (tmp_path / "jobs.json").write_text(
        json.dumps([job(run, tmp_path / "run", Scale(parallel="fsdp"), **more)]), encoding="utf-8"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(WORKER), str(tmp_path / "jobs.json")]
    apart = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1800, env=apart)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert_same(tmp_path / "run", tmp_path / "whole", room)


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


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_process_is_told(room, tmp_path, parallel):
    run = config(room, "diffusion", num_iterations=6)
    kill = {"kill_at": 3, "killed": str(tmp_path / "killed")}
    waiting, killed = start([job(run, tmp_path / "run", Scale(parallel=parallel, timeout=60), **kill)], tmp_path)
    (out, err), _ = ends_of([waiting, killed])
    assert (waiting.returncode, killed.returncode) == (1, -9)
    assert "TrainError: process 0 of 2 lost the others" in err, out + err


def test_a_disk_that_is_full_for_one_process_costs_no_checkpoint(room, tmp_path):
    run = config(room, "diffusion", num_iterations=6)
    processes = start([job(run, tmp_path / "run", Scale(parallel="fsdp"), full_at=3)], tmp_path)
    ends = [err for _, err in ends_of(processes)]
    assert [process.returncode for process in processes] == [1, 1]
    for err in ends:
        assert "state-00000004 cannot be written: [Errno 27] File too large" in err
    assert [path.name for path in (tmp_path / "run").iterdir() if "state" in path.name] == ["state-00000002"]


def test_sigterm_saves_after_one_and_the_same_iteration(room, tmp_path):
    run, out = config(room, "diffusion", num_iterations=100_000), tmp_path / "run"
    processes = start([job(run, out, Scale(parallel="fsdp"), checkpoint_every=100_000)], tmp_path)
    deadline = time.monotonic() + 500
    while not (out / "log.jsonl").exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    ends = ends_of(processes)
    assert [process.returncode for process in processes] == [143, 143], ends
    (state,) = out.glob("state-*")
    assert json.loads((state / "counters.json").read_text("utf-8"))["counters"]["iteration"] == len(log(out))
