"""Runs of several processes as torchrun would start them, and what their results are compared with."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:  # other tests start without torch
    from torch import Tensor

    from scm_sdk.train.config import TrainConfig
    from scm_sdk.train.parallel.distributed import Scale

WORKER = Path(__file__).with_name("distributed_worker.py")
TOLERANCE = 2e-4
"""Largest difference of the weights, relative to how far they moved; float32 gradients differ by some 1e-6."""


@pytest.fixture(scope="session")
def room(tmp_path_factory) -> Path:
    """A folder with images, and a model whose every parameter is random, so that no gradient is zero."""
    import torch

    from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
    from scm_sdk.model.networks.presets import tiny

    folder = tmp_path_factory.mktemp("room")
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, kind=np.arange(24) % 3, kind_names=np.array(["a", "b", "c"]))
    with torch.random.fork_rng(devices=[]):  # the same weights whatever ran before
        torch.manual_seed(0)
        model = ConsistencyModel(ModelConfig(network=tiny(num_classes=3), class_names=("a", "b", "c")))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    model.save_pretrained(folder / "first")
    return folder


def config(room: Path, objective: str, **changes) -> "TrainConfig":
    from scm_sdk.train.config import DataConfig, TrainConfig

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
    return TrainConfig.from_settings({**base, **changes})


def job(run: "TrainConfig", out: Path, scale: "Scale", **more) -> dict:
    return {"config": run.to_json(), "out": str(out), "scale": asdict(scale), **more}


def start(jobs: list[dict], folder: Path, size: int = 2) -> list[subprocess.Popen]:
    """Start processes as torchrun would; without its agent a test is faster by one import of torch."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs), encoding="utf-8")
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
            encoding="utf-8",
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


def weights(folder: Path) -> "Tensor":
    import torch

    from scm_sdk.model.consistency import ConsistencyModel

    return torch.cat([p.flatten() for p in ConsistencyModel.from_pretrained(folder).state_dict().values()])


def assert_same(found: Path, expected: Path, room: Path, tolerance: float = TOLERANCE) -> None:
    moved = (weights(expected) - weights(room / "first")).norm()
    assert moved > 0.01
    error = float((weights(found) - weights(expected)).norm() / moved)
    assert error < tolerance, f"{found.name}: {error:.1e}"
    for here, there in zip(log(found), log(expected), strict=True):
        for name in ("loss", "residual", "grad_norm"):
            assert here[name] == pytest.approx(there[name], rel=tolerance / 2, abs=1e-6), (found.name, name)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
