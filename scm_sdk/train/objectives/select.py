"""Select the loss of a run from its config."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from ...errors import ConfigError
from ..batches import drawn_for, take
from ..config import TrainConfig
from ..parallel.mixed import in_precision
from .base import Batch, ConditionedNetwork, LogVariance, consistency_loss, diffusion_loss
from .discrete import Anchor, Draw, discrete_loss
from .guidance import guided_teacher, start_from
from .stable_target import StableTarget
from .trajectory import Trajectories, trajectory_loss
from .vsd import Vsd, exact_score, teacher_score


def make_vsd(
    config: TrainConfig, network: nn.Module, teacher: nn.Module | None, stable_target: StableTarget | None
) -> Vsd | None:
    """Return a run's variational score distillation, or None if it has none."""
    if not config.uses_vsd:
        return None
    if teacher is not None:
        start = teacher
        if config.takes_guidance:  # a student that is told the scale has a fake score that is told it too
            start = deepcopy(network)
            start_from(start, teacher)
        followed = _followed(config, teacher)
        assert followed is not None
        return Vsd(config, start, teacher_score(followed, sigma_data=config.sigma_data))
    assert stable_target is not None  # TrainConfig refuses VSD without either
    return Vsd(config, network, exact_score(stable_target, sigma_data=config.sigma_data))


def loss_function(
    config: TrainConfig,
    network: nn.Module,
    teacher: nn.Module | None,
    logvar: LogVariance | None,
    vsd: Vsd | None = None,
    anchor: Anchor | None = None,
) -> Callable[[Batch, int], tuple[torch.Tensor, torch.Tensor]]:
    """Return ``(batch, iteration) -> (loss, residual)`` for a run, compiled if it asks for that.

    VSD is never compiled: it takes a step of its own. Beside another loss the residual is that one's. Networks run in
    the run's precision and the teacher with its guidance. The anchor's and VSD's weightings are their own.

    Raises:
        ConfigError: If a tangent with dropout is to be compiled.
    """
    if config.compile and config.dropout and config.objective in ("sct", "scd"):
        raise ConfigError(
            f"dropout is {config.dropout} with --compile, expected 0: compiled, the passes of a tangent might not "
            "drop the same activations. Leave one of them out."
        )
    called = in_precision(network, config.precision)
    if config.objective == "vsd":
        assert vsd is not None
        return lambda batch, iteration: vsd(called, batch, iteration)
    compute = _loss_function(config, called, _followed(config, teacher), logvar, anchor)
    if vsd is None:
        return compute

    def with_vsd(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss, residual = compute(batch, iteration)
        return loss + config.vsd_weight * vsd(called, batch, iteration)[0], residual

    return with_vsd


def _followed(config: TrainConfig, teacher: nn.Module | None) -> ConditionedNetwork | None:
    """Return the teacher as a run follows it."""
    if teacher is None:
        return None
    classes = config.network.num_classes if config.network is not None else 0
    return guided_teacher(in_precision(teacher, config.precision), config, classes)


def _loss_function(
    config: TrainConfig,
    network: ConditionedNetwork,
    teacher: ConditionedNetwork | None,
    logvar: LogVariance | None,
    anchor: Anchor | None,
) -> Callable[[Batch, int], tuple[torch.Tensor, torch.Tensor]]:
    if config.objective == "cd":
        assert teacher is not None  # TrainConfig refuses cd without one
        return _discrete(config, network, teacher, logvar, anchor)
    if config.objective == "trajectory":
        assert teacher is not None  # TrainConfig refuses it without one
        return _trajectory(config, network, teacher, logvar)
    if config.objective == "diffusion":

        def diffusion(batch: Batch, warmup: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return diffusion_loss(network, logvar, batch, sigma_data=config.sigma_data)

        compute = diffusion
    else:

        def consistency(batch: Batch, warmup: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return consistency_loss(network, teacher, logvar, batch, config, warmup)

        compute = consistency
    if config.compile:
        compute = torch.compile(compute)

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        warmup = min(1.0, iteration / config.tangent_warmup) if config.tangent_warmup else 1.0
        return compute(batch, torch.tensor(warmup))

    return at


def _discrete(
    config: TrainConfig,
    network: ConditionedNetwork,
    teacher: ConditionedNetwork,
    logvar: LogVariance | None,
    anchor: Anchor | None,
) -> Callable[[Batch, int], tuple[torch.Tensor, torch.Tensor]]:
    compute = torch.compile(discrete_loss) if config.compile else discrete_loss

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = drawn_for(batch, config, lambda shape: Draw.of(config, shape, iteration))
        loss, residual = compute(network, teacher, logvar, batch, draw.step, sigma_data=config.sigma_data)
        if anchor is not None:
            loss = loss + config.anchor_weight * anchor(network, batch, draw)
        return loss, residual

    return at


def _trajectory(
    config: TrainConfig, network: ConditionedNetwork, teacher: ConditionedNetwork, logvar: LogVariance | None
) -> Callable[[Batch, int], tuple[torch.Tensor, torch.Tensor]]:
    compute = torch.compile(trajectory_loss) if config.compile else trajectory_loss
    assert config.network is not None  # resolved
    trajectories = Trajectories(config, teacher, config.network.sample_shape, config.network.num_classes)

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        points = take(trajectories(iteration, batch.x_0.device), batch.rows or slice(None), batch.x_0.device)
        return compute(network, logvar, points, sigma_data=config.sigma_data, huber=config.huber)

    return at
