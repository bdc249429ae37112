"""Variational score distillation: move the distribution of the student's samples onto the data distribution.

A *fake score*, a diffusion model of the student's current samples, is trained together with the student by Eq. 4. On
noisy samples of the student, the student moves along the difference between the fake score and the data's score, which
is that of the teacher or, for data in memory, the exact one. Combined with another loss this sharpens samples; alone it
tends to drop modes.

There are two weightings of the difference. The paper's is learned and divides by the mean difference at that time. Its
gradient does not shrink when the student is as good as the teacher and most of the difference is the error of the fake
score: near the teacher the student does not converge and moves by steps of the learning rate. Decay the learning rate
or end such a run early (the paper uses 20,000 iterations together with another loss). Dividing by the teacher's error
on each sample instead reduces the gradient as the student improves.

Sources: arXiv 2410.11081, appendix C (adaptive VSD, sCD+VSD), one fake-score step per step of the student. The other
weighting: Yin et al., 2023, "DMD", arXiv 2311.18828, Eq. 8, combined with a regression onto trajectories.
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
"""Lower bound of the teacher's mean absolute error, data units; at the smallest times it is only rounding."""
Score = Callable[[Batch], Tensor]
"""Maps ``x_t``, ``t`` and labels of a batch to F: the velocity at x_t divided by sigma_data, (B, ...)."""


def teacher_score(teacher: ConditionedNetwork, *, sigma_data: float) -> Score:
    """Return the score of a diffusion model."""
    return lambda batch: bind(teacher, batch)(add_noise(batch.x_0, batch.z, batch.t) / sigma_data, batch.t)


def exact_score(target: StableTarget, *, sigma_data: float) -> Score:
    """Return the exact score of the training data, computed over all images."""

    def score(batch: Batch) -> Tensor:
        mean = target(batch)
        return true_velocity(mean.x_0, mean.z, batch.t) / sigma_data

    return score


@dataclass(frozen=True, kw_only=True)
class VsdDraw:
    """Random numbers of one iteration: a pure function of the run's seed and the iteration.

    Attributes:
        noises: Noise of each sampler step, (B, ...), standard deviation ``sigma_data``.
        fake_z: Noise for training the fake score.
        fake_t: Times for training the fake score, (B,), radians.
        z: Noise of the comparison.
        t: Times of the comparison, (B,), radians.
    """

    noises: tuple[Tensor, ...]
    fake_z: Tensor
    fake_t: Tensor
    z: Tensor
    t: Tensor

    @classmethod
    def of(cls, config: TrainConfig, shape: torch.Size, iteration: int) -> VsdDraw:
        """Draw the random inputs of an iteration."""
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
    """The fake score with its optimizer, and the VSD loss of the student.

    Args:
        config: The run.
        network: Initial weights of the fake score, those of the teacher or the student; copied.
        score: The score of the data.
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
        """Return the modules of a checkpoint by name."""
        return {"fake": self.fake, "fake_logvar": self.fake_logvar, "vsd_logvar": self.logvar}

    def __call__(self, network: ConditionedNetwork, batch: Batch, iteration: int) -> tuple[Tensor, Tensor]:
        """Train the fake score for one step, then return the student's loss and mean squared difference.

        Args:
            network: The student.
            batch: A batch, of which the labels are used.
            iteration: Iteration; it selects the draw and, in turn, one of several sampler steps.
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
        """Return the factor from a difference of F to one of samples, over their mean absolute error, (B, 1, ...)."""
        size = error.abs().flatten(1).mean(dim=1).clamp_min(LEAST_ERROR)
        return expand_time(self._config.sigma_data * torch.sin(t) / size, error)

    def _generate(self, network: Network, draw: VsdDraw, *, step: int) -> Tensor:
        """Return the student's samples after a sampler step, with the gradient of that step only."""
        sigma_data, x_0 = self._config.sigma_data, torch.zeros_like(draw.z)
        for k in range(step + 1):
            with torch.set_grad_enabled(k == step):
                t = torch.full((len(x_0),), self._times[k], device=x_0.device)
                x_t = add_noise(x_0, draw.noises[k], t)
                x_0 = predict_data(x_t, network(x_t / sigma_data, t), t, sigma_data=sigma_data)
        return x_0

    def _learn(self, batch: Batch, iteration: int) -> None:
        """Fit the fake score to the student's samples; a non-finite step is skipped."""
        factor = self._config.vsd.learning_rate / self._config.optimizer.learning_rate or 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.learning_rate_at(iteration) * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = diffusion_loss(self._call_fake, self.fake_logvar, batch, sigma_data=self._config.sigma_data)
        loss.backward()  # type: ignore[no-untyped-call]
        if torch.isfinite(nn.utils.clip_grad_norm_(self._learned, self._config.optimizer.grad_clip or math.inf)):
            self.optimizer.step()
            normalize_weights_(self.fake)
