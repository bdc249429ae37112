"""The losses: TrigFlow diffusion (Eq. 4) and continuous-time consistency (Algorithm 1).

Both draw a time, mix data with noise, and fit the network under an adaptive weight that is learned by a small head. The
consistency losses differ only in the velocity of the trajectory: that of the data (sCT) or of a teacher (sCD).

Source: arXiv 2410.11081, sections 3 and 4, appendices A and D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...model.networks.conditioning import PositionalEmbedding
from ...model.trigflow import add_noise, rotate, true_velocity
from ..config import NoiseConfig, TrainConfig
from .tangent import Network, discrete_tangent, grid_times, normalize_tangent, scaled_difference, scaled_jvp, tangent

ConditionedNetwork = Callable[..., Tensor]
"""``(x, t, class_labels) -> F``, and with ``guidance_scale=`` by name where a batch has one."""


class LogVariance(nn.Module):
    """Head of the adaptive weight: log variance of the residual at each time, -w(t) in the paper.

    For training only. It is initialized to 0 in every run, because the head of a teacher does not apply to consistency
    residuals.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.embedding = PositionalEmbedding(channels)
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t_B: Tensor) -> Tensor:
        """Return log variances, (B,)."""
        out: Tensor = self.linear(self.embedding(t_B))[:, 0]
        return out


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of one iteration, a pure function of the run's seed, the data and the iteration.

    Attributes:
        x_0: Clean samples, (B, ...), data units.
        z: Noise of standard deviation ``sigma_data``, (B, ...), data units.
        t: Times, (B,), radians, float32.
        class_labels: Labels, (B,), int64, or None.
        guidance_scale: Guidance scales, (B,), float32, inputs of teacher and student; None without this input.
        rows: Rows of the global batch; None for all.
    """

    x_0: Tensor
    z: Tensor
    t: Tensor
    class_labels: Tensor | None
    guidance_scale: Tensor | None = None
    rows: slice | None = None


class Conditions(Protocol):
    """Network inputs of a batch in addition to x and t."""

    @property
    def class_labels(self) -> Tensor | None:
        """Labels, (B,), int64."""

    @property
    def guidance_scale(self) -> Tensor | None:
        """Guidance scales, (B,), float32."""


def bind(network: ConditionedNetwork, batch: Conditions) -> Network:
    """Return a network as a function of x and t, with the labels and guidance scales of the batch."""
    if batch.guidance_scale is None:
        return lambda x, t: network(x, t, batch.class_labels)
    return lambda x, t: network(x, t, batch.class_labels, guidance_scale=batch.guidance_scale)


def mixed_seed(*words: int) -> int:
    """Return a 63-bit seed for torch from several words; the first is the run's seed."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded_generator(seed: int, iteration: int, stream: int) -> torch.Generator:
    """Return a random generator for a run's seed, an iteration and a named stream."""
    return torch.Generator().manual_seed(mixed_seed(seed, iteration, stream))


def sample_times(count: int, noise: NoiseConfig, generator: torch.Generator, *, sigma_data: float) -> Tensor:
    """Draw times, (B,), radians, float32, with ``ln(sigma_data tan t) ~ N(p_mean, p_std^2)``."""
    tau = torch.randn(count, generator=generator, dtype=torch.float64) * noise.p_std + noise.p_mean
    return torch.arctan(tau.exp() / sigma_data).float()


def weighted_residual(residual: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and the unweighted mean square of a residual.

    ``e^w / D ||residual||^2 - w`` averaged over the batch, D elements in a sample, ``w = -logvar``
    counted once for each sample.
    """
    square_B = residual.flatten(1).square().mean(dim=1)
    return weighted_mean(square_B, logvar), square_B.detach().mean()


def weighted_mean(loss_B: Tensor, logvar_B: Tensor | None) -> Tensor:
    """Return the batch mean of ``e^w loss - w``, ``w = -logvar``; without a head, the mean of the losses."""
    return (loss_B if logvar_B is None else loss_B * torch.exp(-logvar_B) + logvar_B).mean()


def diffusion_loss(
    network: ConditionedNetwork, logvar: LogVariance | None, batch: Batch, *, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """Return the TrigFlow loss (Eq. 4), as ``weighted_residual`` does."""
    x_t = add_noise(batch.x_0, batch.z, batch.t)
    F = bind(network, batch)(x_t / sigma_data, batch.t)
    residual = sigma_data * F - true_velocity(batch.x_0, batch.z, batch.t)
    return weighted_residual(residual, logvar(batch.t) if logvar else None)


def consistency_loss(
    network: ConditionedNetwork,
    teacher: ConditionedNetwork | None,
    logvar: LogVariance | None,
    batch: Batch,
    config: TrainConfig,
    warmup: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Return the sCM loss (Algorithm 1), as ``weighted_residual`` does.

    The target is ``F- + g``, without gradient; the output of the student is the reference F- (theta^- =
    stopgrad(theta)). All calls of the student use the same dropout mask, otherwise dF/dt would not be the derivative of
    the trained F.

    Args:
        network: The student.
        teacher: The diffusion model that gives the velocity (sCD), or None for the data (sCT).
        logvar: Head of the adaptive weight, or None.
        batch: Inputs of the iteration.
        config: The run, with the settings of the tangent.
        warmup: Factor r in [0, 1] of the part of the tangent with dF/dt.
    """
    sigma_data, settings = config.sigma_data, config.tangent
    s = None
    if settings.discrete_points:
        t, s = grid_times(batch.t, settings.discrete_points, sigma_data=sigma_data)
        batch = replace(batch, t=t)
    student = _with_same_masks(bind(network, batch), batch) if config.dropout else bind(network, batch)
    t = batch.t
    with torch.no_grad():
        x_t = add_noise(batch.x_0, batch.z, t)
        if teacher is None:
            dxdt = true_velocity(batch.x_0, batch.z, t)
        else:
            dxdt = sigma_data * bind(teacher, batch)(x_t / sigma_data, t)
    if settings.mode == "jvp2" and s is None:
        with torch.no_grad():
            reference, scaled_dF = scaled_jvp(student, x_t, t, dxdt, sigma_data=sigma_data)
        F = student(x_t / sigma_data, t)
    elif settings.mode == "jvp" and s is None:
        F, scaled_dF = scaled_jvp(student, x_t, t, dxdt, sigma_data=sigma_data)
        reference = F.detach()
    else:
        F = student(x_t / sigma_data, t)
        reference = F.detach()
    with torch.no_grad():
        if s is not None:
            x_s = rotate(x_t, dxdt, t - s)
            F_s = student(x_s / sigma_data, s)
            g = discrete_tangent(reference, F_s, x_t, t, s, dxdt, sigma_data=sigma_data, warmup=warmup)
        else:
            if settings.mode == "fd":
                scaled_dF = scaled_difference(student, x_t, t, dxdt, sigma_data=sigma_data, step=settings.step)
            g = tangent(reference, scaled_dF.detach(), x_t, t, dxdt, sigma_data=sigma_data, warmup=warmup)
        if settings.normalize:
            g = normalize_tangent(g, norm=settings.norm, c=settings.c)
        target = reference + g
    return weighted_residual(F - target, logvar(t) if logvar else None)


def _with_same_masks(student: Network, batch: Batch) -> Network:
    """Return the student with the same dropout mask in every call."""
    masks = torch.cuda if batch.x_0.is_cuda else torch
    state = masks.get_rng_state()

    def call(x: Tensor, t: Tensor) -> Tensor:
        masks.set_rng_state(state)
        return student(x, t)

    return call
