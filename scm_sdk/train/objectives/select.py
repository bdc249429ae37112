"""Select the loss of a run from its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import ConfigError
from ..batches import drawn_for, take
from ..config import TrainConfig
from ..parallel.mixed import in_precision
from .base import Batch, ConditionedNetwork, LogVariance, consistency_loss, diffusion_loss
from .discrete import Anchor, DiscreteDraw, discrete_loss
from .guidance import guided_teacher, start_from
from .stable_target import StableTarget
from .trajectory import Trajectories, trajectory_loss
from .vsd import Vsd, exact_score, teacher_score


def make_vsd(
    config: TrainConfig, network: nn.Module, teacher: nn.Module | None, stable_target: StableTarget | None
) -> Vsd | None:
    """Return the VSD loss of a run, or None."""
    if not config.uses_vsd:
        return None
    if teacher is not None:
        start = teacher
        if config.takes_guidance:  # if the student takes the scale as an input, so does the fake score
            start = deepcopy(network)
            start_from(start, teacher)
        followed = _followed(config, teacher)
        assert followed is not None
        return Vsd(config, start, teacher_score(followed, sigma_data=config.sigma_data))
    assert stable_target is not None  # TrainConfig refuses VSD without either
    return Vsd(config, network, exact_score(stable_target, sigma_data=config.sigma_data))


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What the loss of an objective is made from.

    Attributes:
        config: The run.
        network: The student in the run's precision.
        teacher: The teacher in the run's precision and with its guidance, or None.
        logvar: The head of the adaptive weight, or None.
        vsd: Variational score distillation, or None.
        anchor: The diffusion loss at small times, or None.
    """

    config: TrainConfig
    network: ConditionedNetwork
    teacher: ConditionedNetwork | None
    logvar: LogVariance | None
    vsd: Vsd | None
    anchor: Anchor | None


Loss = Callable[[Batch, int], tuple[torch.Tensor, torch.Tensor]]
"""``(batch, iteration) -> (loss, residual)``, scalars."""


def loss_function(
    config: TrainConfig,
    network: nn.Module,
    teacher: nn.Module | None,
    logvar: LogVariance | None,
    vsd: Vsd | None = None,
    anchor: Anchor | None = None,
) -> Loss:
    """Return ``(batch, iteration) -> (loss, residual)`` for a run, compiled if it asks for that.

    VSD is never compiled: it takes a step of its own. Where it is added to another loss, the residual is that of the
    other loss. Networks run in the run's precision and the teacher with its guidance. The anchor's and VSD's
    weightings are their own.

    Raises:
        ConfigError: If a tangent with dropout is compiled.
    """
    if config.compile and config.dropout and config.kind.tangent:
        raise ConfigError(
            f"dropout is {config.dropout} with --compile, expected 0: compiled, the passes of a tangent might not "
            "drop the same activations. Leave one of them out."
        )
    inputs = LossInputs(
        config=config,
        network=in_precision(network, config.precision),
        teacher=_followed(config, teacher),
        logvar=logvar,
        vsd=vsd,
        anchor=anchor,
    )
    compute = LOSSES[config.objective](inputs)
    if vsd is None or not config.vsd.weight or config.objective == "vsd":
        return compute
    network_called, added = inputs.network, vsd

    def with_vsd(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss, residual = compute(batch, iteration)
        return loss + config.vsd.weight * added(network_called, batch, iteration)[0], residual

    return with_vsd


def _followed(config: TrainConfig, teacher: nn.Module | None) -> ConditionedNetwork | None:
    """Return the teacher of a run."""
    if teacher is None:
        return None
    classes = config.network.num_classes if config.network is not None else 0
    return guided_teacher(in_precision(teacher, config.precision), config, classes)


def _diffusion(inputs: LossInputs) -> Loss:
    config = inputs.config
    compute = torch.compile(diffusion_loss) if config.compile else diffusion_loss

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        return compute(inputs.network, inputs.logvar, batch, sigma_data=config.sigma_data)

    return at


def _consistency(inputs: LossInputs) -> Loss:
    config = inputs.config
    compute = torch.compile(consistency_loss) if config.compile else consistency_loss
    fade_in = config.tangent.warmup_iterations

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        warmup = torch.tensor(min(1.0, iteration / fade_in) if fade_in else 1.0)
        return compute(inputs.network, inputs.teacher, inputs.logvar, batch, config, warmup)

    return at


def _discrete(inputs: LossInputs) -> Loss:
    config, network, teacher, anchor = inputs.config, inputs.network, inputs.teacher, inputs.anchor
    assert teacher is not None  # TrainConfig refuses cd without one
    compute = torch.compile(discrete_loss) if config.compile else discrete_loss

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = drawn_for(batch, config, lambda shape: DiscreteDraw.of(config, shape, iteration))
        loss, residual = compute(network, teacher, inputs.logvar, batch, draw.step, sigma_data=config.sigma_data)
        if anchor is not None:
            loss = loss + config.anchor.weight * anchor(network, batch, draw)
        return loss, residual

    return at


def _trajectory(inputs: LossInputs) -> Loss:
    config = inputs.config
    compute = torch.compile(trajectory_loss) if config.compile else trajectory_loss
    assert config.network is not None  # resolved
    assert inputs.teacher is not None  # TrainConfig refuses it without one
    trajectories = Trajectories(config, inputs.teacher, config.network.sample_shape, config.network.num_classes)

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        points = take(trajectories(iteration, batch.x_0.device), batch.rows or slice(None), batch.x_0.device)
        return compute(
            inputs.network, inputs.logvar, points, sigma_data=config.sigma_data, huber=config.trajectory.huber
        )

    return at


def _vsd(inputs: LossInputs) -> Loss:
    vsd = inputs.vsd
    assert vsd is not None  # build makes one for this objective
    return lambda batch, iteration: vsd(inputs.network, batch, iteration)


LOSSES: Mapping[str, Callable[[LossInputs], Loss]] = {
    "diffusion": _diffusion,
    "sct": _consistency,
    "scd": _consistency,
    "cd": _discrete,
    "trajectory": _trajectory,
    "vsd": _vsd,
}
"""Makes the loss of each objective of ``OBJECTIVES``."""
