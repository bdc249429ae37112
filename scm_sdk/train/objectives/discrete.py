"""Consistency distillation in discrete time.

The student at time t is fitted to its own output at a smaller time s on the same trajectory of the teacher:

    x_s = one second-order step of the teacher from x_t
    F*  = (cos(t) x_t - f-(x_s, s)) / (sigma_d sin(t))                so that f(x_t, t) = f-(x_s, s)

At and below the smallest time the target is the teacher's estimate, which anchors the chain. Steps are long and random,
up to ``discrete_step`` radians: information from the teacher reaches the largest times in a few thousand iterations;
the continuous-time tangent, with its infinitesimal step, needs far more. The cost is the error of the teacher's step.
There is no JVP and no tangent normalization.

``anchor.weight`` adds the diffusion loss at small times: there the posterior is all but a point, the
trajectory's end its mean, and data says more exactly than a teacher what that is.

Source: Song et al., 2023, arXiv 2303.01469, algorithm 2, in TrigFlow's terms; steps as in arXiv 2410.11081, app. E.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...model.trigflow import add_noise, expand_time, predict_data, rotate
from ..config import TrainConfig
from .base import (
    Batch,
    ConditionedNetwork,
    LogVariance,
    bind,
    diffusion_loss,
    sample_times,
    seeded_generator,
    weighted_residual,
)
from .stable_target import StableTarget
from .tangent import Network

MIN_TIME = 0.02
"""Smallest time of the chain, radians, where less than 2 % of the noise remains. Without a fixed end the student would
drift at smaller times, and then at all larger ones."""


@dataclass(frozen=True, kw_only=True)
class DiscreteDraw:
    """Random numbers of one iteration in addition to its batch: a pure function of the run's seed and the iteration.

    Attributes:
        step: Lengths of the teacher's steps, (B,), radians.
        z: Noise of the anchor, (B, ...), standard deviation ``sigma_data``.
        t: Times of the anchor, (B,), radians.
    """

    step: Tensor
    z: Tensor
    t: Tensor

    @classmethod
    def of(cls, config: TrainConfig, shape: torch.Size, iteration: int) -> DiscreteDraw:
        """Draw the random inputs of an iteration."""
        generator = seeded_generator(config.seed, iteration, stream=2)
        share = 1 / 3 + 2 / 3 * torch.rand(shape[0], generator=generator)
        return cls(
            step=config.discrete_step * share,
            z=torch.randn(shape, generator=generator) * config.sigma_data,
            t=sample_times(shape[0], config.anchor.noise, generator, sigma_data=config.sigma_data),
        )


def teacher_step(teacher: Network, x_t: Tensor, t: Tensor, s: Tensor, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Step along the teacher's trajectory from times ``t`` to ``s`` with one second-order step.

    Args:
        teacher: The diffusion model, labels already bound.
        x_t: Noisy samples, (B, ...), data units.
        t: Their times, (B,), radians.
        s: Target times, (B,), radians, at most ``t``.
        sigma_data: Standard deviation of the data.

    Returns:
        ``x_s`` and the teacher's F there, both (B, ...).
    """
    velocity = sigma_data * teacher(x_t / sigma_data, t)
    F = teacher(rotate(x_t, velocity, t - s) / sigma_data, s)
    return x_t - expand_time(t - s, x_t) * 0.5 * (velocity + sigma_data * F), F


def discrete_loss(
    network: ConditionedNetwork,
    teacher: ConditionedNetwork,
    logvar: LogVariance | None,
    batch: Batch,
    step: Tensor,
    *,
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    """Return the discrete-time consistency loss, as ``weighted_residual`` does.

    Args:
        network: The student; its output at ``s`` is the reference, without gradient.
        teacher: The diffusion model that defines the trajectories.
        logvar: Head of the adaptive weight, or None.
        batch: Inputs of the iteration.
        step: Differences ``t - s``, (B,), radians; ``s`` is at least ``MIN_TIME``.
        sigma_data: Standard deviation of the data.
    """
    t, student = batch.t, bind(network, batch)
    x_t = add_noise(batch.x_0, batch.z, t)
    with torch.no_grad():
        s = torch.minimum(t, (t - step).clamp(min=MIN_TIME))
        x_s, teacher_F = teacher_step(bind(teacher, batch), x_t, t, s, sigma_data=sigma_data)
        F = torch.where(expand_time(s, x_t) > MIN_TIME, student(x_s / sigma_data, s), teacher_F)
        end = predict_data(x_s, F, s, sigma_data=sigma_data)
        scale = sigma_data * expand_time(torch.sin(t).clamp(min=1e-6), x_t)
        target = (expand_time(torch.cos(t), x_t) * x_t - end) / scale
    return weighted_residual(student(x_t / sigma_data, t) - target, logvar(t) if logvar else None)


class Anchor:
    """The diffusion loss at small times, with a separate adaptive weight.

    Args:
        config: The run.
        target: Replaces data by posterior means, or None.
    """

    def __init__(self, config: TrainConfig, target: StableTarget | None) -> None:
        self._config, self._target = config, target
        self.logvar = LogVariance()

    def __call__(self, network: ConditionedNetwork, batch: Batch, draw: DiscreteDraw) -> Tensor:
        """Return the loss, a scalar, for the images and labels of the batch."""
        batch = replace(batch, z=draw.z, t=draw.t)
        if self._target is not None:
            batch = self._target(batch)
        logvar = self.logvar if self._config.adaptive_weighting else None
        return diffusion_loss(network, logvar, batch, sigma_data=self._config.sigma_data)[0]
