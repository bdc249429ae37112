"""Variational score distillation: move the distribution of the student's samples onto the data distribution.

A *fake score*, a diffusion model of what the student makes just now, is trained beside the student by Eq. 4. Where it
and the data's score disagree on a noisy sample of the student, the student is moved along the difference. The data's
score is the teacher's or, for data that fits in memory, the exact one. Beside another loss this sharpens samples;
alone it tends to drop modes.

Two weightings of the difference. The paper's is learned: it divides by what the difference is on average at that time.
So it pulls as hard when the student is as good as the teacher as at the start, when most of what differs is the fake
score's own error: near the teacher the student does not settle, it walks to and fro by steps of the learning rate. Let
that fall, or end such a run early (the paper's is 20,000 iterations beside another loss). Dividing by the teacher's
error on the very sample instead lets the pull fade as the student gets better.

Sources: arXiv 2410.11081, appendix C (adaptive VSD, sCD+VSD), one fake-score step for each step of the student. The
other weighting: Yin et al., 2023, "DMD", arXiv 2311.18828, Eq. 8, who put it beside a fit of trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...model.networks.magnitude import normalize_weights_
from ...model.trigflow import add_noise, expand_time, predict_data, true_velocity
from ...spec import default_times
from ..batches import drawn_for
from ..config import TrainConfig
from ..parallel.mixed import in_precision
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

LEAST_ERROR = 1e-3
"""Mean absolute error of the teacher, data units, that still weights: at the smallest times it is rounding."""
Score = Callable[[Batch], Tensor]
"""From a batch, of which ``x_t``, ``t`` and labels count, to F: the velocity at x_t over sigma_data, (B, ...)."""


def teacher_score(teacher: ConditionedNetwork, *, sigma_data: float) -> Score:
    """Return the score of a diffusion model."""
    return lambda batch: bind(teacher, batch)(add_noise(batch.x_0, batch.z, batch.t) / sigma_data, batch.t)


def exact_score(target: StableTarget, *, sigma_data: float) -> Score:
    """Return the score of the training data itself, every image of which is looked at."""

    def score(batch: Batch) -> Tensor:
        mean = target(batch)
        return true_velocity(mean.x_0, mean.z, batch.t) / sigma_data

    return score


@dataclass(frozen=True, kw_only=True)
class VsdDraw:
    """Random numbers of one iteration: a pure function of the run's seed and the iteration.

    Attributes:
        noises: Noise of each sampler step, (B, ...), standard deviation ``sigma_data``.
        fake_z: Noise that the fake score learns from.
        fake_t: Its times, (B,), radians.
        z: Noise of the comparison.
        t: Its times.
    """

    noises: tuple[Tensor, ...]
    fake_z: Tensor
    fake_t: Tensor
    z: Tensor
    t: Tensor

    @classmethod
    def of(cls, config: TrainConfig, shape: torch.Size, iteration: int) -> VsdDraw:
        """Draw what an iteration sees."""
        generator = seeded_generator(config.seed, iteration, stream=1)

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator) * config.sigma_data

        return cls(
            noises=tuple(noise() for _ in range(config.vsd.steps)),
            fake_z=noise(),
            fake_t=sample_times(shape[0], config.noise, generator, sigma_data=config.sigma_data),
            z=noise(),
            t=sample_times(shape[0], config.vsd.noise, generator, sigma_data=config.sigma_data),
        )


class Vsd:
    """The fake score with its optimizer, and the loss that it gives the student.

    Args:
        config: The run.
        network: What the fake score starts from, the teacher's weights or the student's; copied.
        score: The data's score.
    """

    def __init__(self, config: TrainConfig, network: nn.Module, score: Score) -> None:
        self._config, self._score = config, score
        self.fake = deepcopy(network).requires_grad_(True)
        self._call_fake = in_precision(self.fake, config.precision)
        self.fake_logvar, self.logvar = LogVariance(), LogVariance()
        self._learned = [*self.fake.parameters(), *self.fake_logvar.parameters()]
        its = config.optimizer
        self.optimizer = torch.optim.Adam(self._learned, lr=its.learning_rate, betas=its.betas, eps=its.epsilon)
        self._times = default_times(config.vsd.steps, sigma_data=config.sigma_data, mid_time=config.mid_time)

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what a checkpoint keeps, by name."""
        return {"fake": self.fake, "fake_logvar": self.fake_logvar, "vsd_logvar": self.logvar}

    def __call__(self, network: ConditionedNetwork, batch: Batch, iteration: int) -> tuple[Tensor, Tensor]:
        """Let the fake score take its step, then return the student's loss and mean square difference.

        Args:
            network: The student.
            batch: Its labels count.
            iteration: Which draw; of several sampler steps one is trained at a time, in turn.
        """
        config = self._config
        draw = drawn_for(batch, config, lambda shape: VsdDraw.of(config, shape, iteration))
        images = self._generate(bind(network, batch), draw, step=iteration % config.vsd.steps)
        self._learn(replace(batch, x_0=images.detach(), z=draw.fake_z, t=draw.fake_t), iteration)
        with torch.no_grad():
            noisy = replace(batch, x_0=images.detach(), z=draw.z, t=draw.t)
            x_t = add_noise(noisy.x_0, noisy.z, noisy.t)
            F = self._score(noisy)
            difference = F - bind(self._call_fake, noisy)(x_t / config.sigma_data, draw.t)
            if config.vsd.weighting == "error":
                estimate = predict_data(x_t, F, draw.t, sigma_data=config.sigma_data)
                difference = difference * self._per_error(noisy.x_0 - estimate, draw.t)
        moved = images.detach() if iteration < config.vsd.warmup_iterations else images
        logvar = self.logvar(draw.t) if config.vsd.weighting == "learned" else None
        return weighted_residual(moved - images.detach() + difference, logvar)

    def _per_error(self, error: Tensor, t: Tensor) -> Tensor:
        """Return what makes a difference of F one of estimated samples, over their mean absolute error, (B, 1, ...)."""
        size = error.abs().flatten(1).mean(dim=1).clamp_min(LEAST_ERROR)
        return expand_time(self._config.sigma_data * torch.sin(t) / size, error)

    def _generate(self, network: Network, draw: VsdDraw, *, step: int) -> Tensor:
        """Return the student's samples after a sampler step; the gradient goes through that call only."""
        sigma_data, x_0 = self._config.sigma_data, torch.zeros_like(draw.z)
        for k in range(step + 1):
            with torch.set_grad_enabled(k == step):
                t = torch.full((len(x_0),), self._times[k], device=x_0.device)
                x_t = add_noise(x_0, draw.noises[k], t)
                x_0 = predict_data(x_t, network(x_t / sigma_data, t), t, sigma_data=sigma_data)
        return x_0

    def _learn(self, batch: Batch, iteration: int) -> None:
        """Fit the fake score to the student's samples; a step that is not finite is left out."""
        factor = self._config.vsd.learning_rate / self._config.optimizer.learning_rate or 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.learning_rate_at(iteration) * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = diffusion_loss(self._call_fake, self.fake_logvar, batch, sigma_data=self._config.sigma_data)
        loss.backward()  # type: ignore[no-untyped-call]
        if torch.isfinite(nn.utils.clip_grad_norm_(self._learned, self._config.optimizer.grad_clip or math.inf)):
            self.optimizer.step()
            normalize_weights_(self.fake)
