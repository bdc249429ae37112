"""Training of TrigFlow teachers and sCM students: runs, their configs, and the losses for a loop of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._util.public import lazy_names

if TYPE_CHECKING:
    from .config import (
        AnchorConfig,
        AveragesConfig,
        DataConfig,
        NoiseConfig,
        OptimizerConfig,
        TangentConfig,
        TrainConfig,
        TrajectoryConfig,
        VsdConfig,
    )
    from .loop import Hooks, StepLog, train
    from .objectives.base import Batch, consistency_loss, diffusion_loss, sample_times
    from .parallel.distributed import Scale
    from .recipes import RECIPES, recipe

__all__ = [
    "RECIPES",
    "AnchorConfig",
    "AveragesConfig",
    "Batch",
    "DataConfig",
    "Hooks",
    "NoiseConfig",
    "OptimizerConfig",
    "Scale",
    "StepLog",
    "TangentConfig",
    "TrainConfig",
    "TrajectoryConfig",
    "VsdConfig",
    "consistency_loss",
    "diffusion_loss",
    "recipe",
    "sample_times",
    "train",
]

_HOMES = {
    "AnchorConfig": ".config",
    "AveragesConfig": ".config",
    "Batch": ".objectives.base",
    "DataConfig": ".config",
    "Hooks": ".loop",
    "NoiseConfig": ".config",
    "OptimizerConfig": ".config",
    "RECIPES": ".recipes",
    "Scale": ".parallel.distributed",
    "StepLog": ".loop",
    "TangentConfig": ".config",
    "TrainConfig": ".config",
    "TrajectoryConfig": ".config",
    "VsdConfig": ".config",
    "consistency_loss": ".objectives.base",
    "diffusion_loss": ".objectives.base",
    "recipe": ".recipes",
    "sample_times": ".objectives.base",
    "train": ".loop",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
