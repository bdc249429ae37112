"""One process of a run in a test: does the jobs that a JSON file lists, in one group of processes."""

import json
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from scm_sdk.train.config import TrainConfig
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.parallel.distributed import Scale


class Stop(Exception):
    pass


def run(job: dict) -> None:
    rank = int(os.environ["RANK"])

    def on_step(done: int) -> None:
        if done == job.get("stop_at"):
            raise Stop
        if done == job.get("kill_at") and rank == 1 and not os.path.exists(job["killed"]):
            Path(job["killed"]).touch()
            os.kill(os.getpid(), 9)
        if done == job.get("hang_at") and rank == 1:
            time.sleep(600)
        if done == job.get("full_at") and rank == 1:  # the disk takes no more than this of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    hooks = Hooks(on_step=on_step, log_every=1, checkpoint_every=job.get("checkpoint_every", 2))
    with suppress(Stop):
        train(TrainConfig.from_json(job["config"]), job["out"], hooks, scale=Scale(**job["scale"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if len(jobs) > 1:  # a group of its own, kept from job to job
        dist.init_process_group("gloo")
    for job in jobs:
        run(job)
    if dist.is_initialized():
        dist.barrier()
        # A job that was stopped leaves collectives of FSDP; with threads of these, PyTorch sometimes aborts at its end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
