"""Distillation onto the endpoints of the teacher's trajectories.

From noise the teacher's equation is solved once, in ``trajectory.steps`` second-order steps; each of its states x_t
then is a sample whose target is known:

    f(x_t, t) = x_end            where x_end is the end of the trajectory

Without bootstrapping, errors of the student at one time are not targets at another, so it learns as fast at large times
as at small ones. A trajectory of K steps costs 2K - 1 calls of the teacher without gradient and gives K samples, two
calls per sample as in ``discrete``.

Source: Luhmann and Luhmann, 2021, arXiv 2101.02388, for the first state; here for all states, because a consistency
model is evaluated at any time. The pseudo-Huber loss of Song and Dhariwal, 2023, arXiv 2310.14189, applied per element,
is robust against the few samples at the border between two modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.solvers import karras_times, solve_ode
from ...model.trigflow import predict_data
from ..batches import take
from ..config import TrainConfig
from .base import ConditionedNetwork, LogVariance, bind, seeded_generator, weighted_mean
from .guidance import sample_guidance

SIGMA_MIN = 0.01
"""Smallest noise level of a trajectory, data units."""
BLOCK_ITERATIONS = 512
"""Iterations that share one block of trajectories. With 64 the states of a trajectory are used in quick succession, and
the student overfits each block."""
BLOCK_ELEMENTS = 1 << 25
"""Maximum number of elements of a block's states: 128 MiB."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """States on trajectories and their end points.

    Attributes:
        x_t: States, (B, ...), data units.
        t: Their times, (B,), radians, float32.
        end: End points of their trajectories, (B, ...), data units.
        class_labels: Labels, (B,), int64, or None.
        guidance_scale: Guidance scales of the trajectories, (B,), float32, or None.
    """

    x_t: Tensor
    t: Tensor
    end: Tensor
    class_labels: Tensor | None
    guidance_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TrajectoryConditions:
    """Conditioning of trajectories: labels and guidance scales, (B,) each, or None."""

    class_labels: Tensor | None
    guidance_scale: Tensor | None


class Trajectories:
    """Provides the points of each iteration, a pure function of the run's seed and the iteration.

    Args:
        config: The run.
        teacher: The diffusion model.
        sample_shape: Shape of one sample.
        num_classes: Number of labels, drawn uniformly; 0 for none.
    """

    def __init__(
        self, config: TrainConfig, teacher: ConditionedNetwork, sample_shape: tuple[int, ...], num_classes: int
    ) -> None:
        self._config, self._teacher = config, teacher
        self._shape, self._num_classes = sample_shape, num_classes
        fits = BLOCK_ELEMENTS // (config.batch_size * math.prod(sample_shape))
        self._iterations = max(1, min(BLOCK_ITERATIONS, fits))
        self._block = -1

    def times(self, shift: float) -> tuple[float, ...]:
        """Return the times of a block's trajectories, radians, falling to 0: a grid shifted by ``shift`` of a step."""
        steps, sigma_data = self._config.trajectory.steps, self._config.sigma_data
        return karras_times(steps, sigma_data, sigma_min=SIGMA_MIN, shift=shift)

    def __call__(self, iteration: int, device: torch.device | None = None) -> Points:
        """Return the points of an iteration on a device; the last block is cached."""
        block, at = divmod(iteration, self._iterations)
        if block != self._block:
            self._solve(block, device)
        size = self._config.batch_size
        state, sample = self._order[at * size : (at + 1) * size].unbind(1)
        conditions = take(self._conditions, sample, self._ends.device)
        return Points(
            x_t=self._states[state, sample],
            t=self._times[state],
            end=self._ends[sample],
            class_labels=conditions.class_labels,
            guidance_scale=conditions.guidance_scale,
        )

    def _solve(self, block: int, device: torch.device | None) -> None:
        config, steps = self._config, self._config.trajectory.steps
        generator = seeded_generator(config.seed, block, stream=3)
        count = math.ceil(self._iterations * config.batch_size / steps)
        labels = torch.randint(self._num_classes, (count,), generator=generator) if self._num_classes else None
        noise = torch.randn((count, *self._shape), generator=generator).to(device)
        times = self.times(float(torch.rand((), generator=generator)))
        guidance = sample_guidance(config, count, block, stream=6)
        self._conditions = take(
            TrajectoryConditions(class_labels=labels, guidance_scale=guidance), slice(None), noise.device
        )
        size = config.batch_size  # one large batch would not fit in the processor cache
        parts = [slice(at, at + size) for at in range(0, count, size)]
        followed = [self._follow(noise[part], take(self._conditions, part, noise.device), times) for part in parts]
        states = torch.cat(followed, dim=1)
        self._states, self._ends = states[:-1], states[-1]
        self._times = torch.tensor(times[:-1], dtype=torch.float32)
        order = torch.randperm(steps * count, generator=generator)
        self._order = torch.stack([order // count, order % count], dim=1)
        self._block = block

    def _follow(self, noise: Tensor, conditions: TrajectoryConditions, times: tuple[float, ...]) -> Tensor:
        sigma_data, teacher = self._config.sigma_data, bind(self._teacher, conditions)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            return teacher(x_t / sigma_data, t)

        return torch.stack(list(solve_ode(velocity, noise, times, sigma_data=sigma_data, order=2)))


def trajectory_loss(
    network: ConditionedNetwork, logvar: LogVariance | None, points: Points, *, sigma_data: float, huber: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of the student's estimates of the end points and their mean squared error, data units squared.

    Args:
        network: The student.
        logvar: Head of the adaptive weight, or None.
        points: Inputs of the iteration.
        sigma_data: Standard deviation of the data.
        huber: Error, data units, above which the loss grows linearly; 0 for the squared error.
    """
    F = bind(network, points)(points.x_t / sigma_data, points.t)
    error = (predict_data(points.x_t, F, points.t, sigma_data=sigma_data) - points.end).flatten(1)
    square_B = error.square().mean(dim=1)
    if huber:
        loss_B = ((error.square() + huber**2).sqrt() - huber).mean(dim=1)
    else:  # in terms of F, whose magnitude is the same at all times
        loss_B = square_B / (sigma_data * torch.sin(points.t)).square()
    return weighted_mean(loss_B, logvar(points.t) if logvar else None), square_B.detach().mean()
