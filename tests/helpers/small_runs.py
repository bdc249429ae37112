"""Training runs of a few iterations on a tiny network."""

from pathlib import Path
from typing import Any

import torch

from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.build import Run, build
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.parallel.distributed import Scale, World
from scm_sdk.train.prepare import resolve


def config(npz: Path, **changes: Any) -> TrainConfig:
    base = {"data": DataConfig(source=str(npz), label="kind"), "network": tiny(num_classes=3), "batch_size": 4}
    return TrainConfig.from_settings(
        {"objective": "diffusion", **base, "num_iterations": 4, "warmup_iterations": 0, **changes}
    )


def fresh(npz: Path, out: Path, seed: int = 0, **changes: Any) -> Run:
    """A run whose optimizer has taken a step and whose weights are random."""
    run = build(resolve(config(npz, seed=seed, **changes)), out, Scale(), World())
    draw = torch.Generator().manual_seed(seed)
    for parameter in run.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    run.move()
    return run
