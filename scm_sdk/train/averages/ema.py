"""Exponential moving averages of weights: for sampling, and power-function profiles for post-hoc reconstruction.

A power-function average (EDM2) has a width relative to the length of the run, ``sigma_rel``. From two of them, stored
at intervals, ``posthoc`` reconstructs any other average of the run.

Source: EDM2, arXiv 2312.02696, section 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..._util.files import atomic_write_bytes
from ...errors import TrainError
from ..config import TrainConfig
from ..parallel.distributed import World
from ..parallel.sharding import gathered_state, local
from .schedules import power_decay

SNAPSHOT_FOLDER = "ema"
SNAPSHOT_METADATA = "scm_ema"


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move every parameter of ``average`` towards ``module``: ``a <- decay a + (1 - decay) w``."""
    torch._foreach_lerp_(list(local(average.parameters())), list(local(module.parameters())), 1.0 - decay)


class Profiles:
    """Power-function averages of one run, and their snapshots.

    Args:
        config: The run; ``averages.profiles`` are the averages' widths.
        network: Its weights at the start; what it becomes is seen in ``update``.
        out: The run's folder; snapshots go to ``ema/`` in it.
        world: The processes of the run.
    """

    def __init__(self, config: TrainConfig, network: nn.Module, out: Path, world: World | None = None) -> None:
        self._config, self._network, self._out, self._world = config, network, out, world or World()
        self._averages = {s: deepcopy(network).eval().requires_grad_(False) for s in config.averages.profiles}

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the modules of a checkpoint by name."""
        return {f"ema_{sigma_rel:g}": module for sigma_rel, module in self._averages.items()}

    def update(self, iteration: int) -> None:
        """Update the averages after an iteration, also after a skipped step, because the profile counts iterations.

        Raises:
            TrainError: If a snapshot is due and cannot be written.
        """
        done, every = iteration + 1, self._config.averages.snapshot_every
        for sigma_rel, average in self._averages.items():
            update_ema(average, self._network, power_decay(sigma_rel, iteration))
            if done % every == 0 or done == self._config.num_iterations:
                self._snapshot(average, sigma_rel, done)

    def _snapshot(self, average: nn.Module, sigma_rel: float, iteration: int) -> None:
        weights = gathered_state(average, self._world)
        self._world.run_on_main(
            lambda: write_snapshot(self._out, weights or {}, sigma_rel=sigma_rel, iteration=iteration)
        )


def write_snapshot(out: Path, weights: Mapping[str, Tensor], *, sigma_rel: float, iteration: int) -> None:
    """Write ``ema/ITERATION-SIGMA_REL.safetensors`` in a run's folder, atomically.

    Raises:
        TrainError: If it cannot be written.
    """
    about = json.dumps({"sigma_rel": sigma_rel, "iteration": iteration})
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    path = out / SNAPSHOT_FOLDER / f"{iteration:08d}-{sigma_rel:g}.safetensors"
    atomic_write_bytes(path, save(plain, metadata={SNAPSHOT_METADATA: about}), error=TrainError)
