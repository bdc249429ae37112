"""The losses: TrigFlow diffusion (Eq. 4) and continuous-time consistency (Algorithm 1).

Both draw a time, mix data with noise, and fit the network under an adaptive weight that a small head
learns beside it. The consistency losses differ in one line: where the trajectory's velocity comes
from, the data (sCT) or a teacher (sCD).

Source: arXiv 2410.11081, sections 3 and 4, appendices A and D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..model.layers import PositionalEmbedding
from ..model.trigflow import add_noise, true_velocity
from .config import TrainConfig
from .tangent import normalize_tangent, scaled_jvp, tangent

ConditionedNetwork = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class LogVariance(nn.Module):
    """The adaptive weight's head: log variance of the residual at each time, -w(t) in the paper.

    Training only. It starts at 0 and is made anew for every run: a teacher's says nothing about
    consistency residuals.
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
    """What one iteration sees. A pure function of the run's seed, the data and the iteration.

    Attributes:
        x_0: Clean samples, (B, ...), data units.
        z: Noise of standard deviation ``sigma_data``, (B, ...), data units.
        t: Times, (B,), radians, float32.
        class_labels: Labels, (B,), int64, or None.
        rows: Which samples of the iteration's whole batch these are; None for all of them.
    """

    x_0: Tensor
    z: Tensor
    t: Tensor
    class_labels: Tensor | None
    rows: slice | None = None


def seeded_generator(seed: int, iteration: int, stream: int) -> torch.Generator:
    """Return a generator that is a function of a run's seed, the iteration and who draws: each has its own stream."""
    words = np.random.SeedSequence([seed, iteration, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def sample_times(
    count: int,
    config: TrainConfig,
    generator: torch.Generator,
    *,
    p_mean: float | None = None,
    p_std: float | None = None,
) -> Tensor:
    """Draw times, (B,), radians, float32, with ``ln(sigma_data tan t) ~ N(p_mean, p_std^2)``, the config's if None."""
    p_mean, p_std = config.p_mean if p_mean is None else p_mean, config.p_std if p_std is None else p_std
    tau = torch.randn(count, generator=generator, dtype=torch.float64) * p_std + p_mean
    return torch.arctan(tau.exp() / config.sigma_data).float()


def weighted_residual(residual: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and the unweighted mean square of a residual.

    ``e^w / D ||residual||^2 - w`` averaged over the batch, D elements in a sample, ``w = -logvar``
    counted once for each sample.
    """
    square_B = residual.flatten(1).square().mean(dim=1)
    loss_B = square_B if logvar is None else square_B * torch.exp(-logvar) + logvar
    return loss_B.mean(), square_B.detach().mean()


def diffusion_loss(
    network: ConditionedNetwork, logvar: LogVariance | None, batch: Batch, *, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """Return the TrigFlow loss (Eq. 4), as ``weighted_residual`` does."""
    x_t = add_noise(batch.x_0, batch.z, batch.t)
    F = network(x_t / sigma_data, batch.t, batch.class_labels)
    residual = sigma_data * F - true_velocity(batch.x_0, batch.z, batch.t)
    return weighted_residual(residual, logvar(batch.t) if logvar else None)


def consistency_target(
    network: ConditionedNetwork,
    teacher: ConditionedNetwork | None,
    batch: Batch,
    config: TrainConfig,
    warmup: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Return x_t and the target ``F- + g`` of the student, both (B, ...), without gradient.

    Args:
        network: The student; its own output is the reference point (theta^- = stopgrad(theta)).
        teacher: The diffusion model whose velocity is followed (sCD), or None for the data's (sCT).
        batch: What the iteration sees.
        config: The run.
        warmup: Factor r in [0, 1].
    """
    sigma_data = config.sigma_data
    with torch.no_grad():
        x_t = add_noise(batch.x_0, batch.z, batch.t)
        if teacher is None:
            dxdt = true_velocity(batch.x_0, batch.z, batch.t)
        else:
            dxdt = sigma_data * teacher(x_t / sigma_data, batch.t, batch.class_labels)
        F, scaled_dF = scaled_jvp(
            lambda x, t: network(x, t, batch.class_labels), x_t, batch.t, dxdt, sigma_data=sigma_data
        )
        g = tangent(F, scaled_dF, x_t, batch.t, dxdt, sigma_data=sigma_data, warmup=warmup)
        if config.normalize_tangent:
            g = normalize_tangent(g, norm=config.tangent_norm, c=config.tangent_c)
        return x_t, F + g


def consistency_loss(
    network: ConditionedNetwork,
    teacher: ConditionedNetwork | None,
    logvar: LogVariance | None,
    batch: Batch,
    config: TrainConfig,
    warmup: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Return the sCM loss (Algorithm 1), as ``weighted_residual`` does.

    Two passes: the JVP without gradient, then a plain forward with it. Both see the same dropout
    mask, or dF/dt would not be the derivative of the F that is trained.
    """
    mask_state = torch.get_rng_state() if config.dropout else None
    x_t, target = consistency_target(network, teacher, batch, config, warmup)
    if mask_state is not None:
        torch.set_rng_state(mask_state)
    F = network(x_t / config.sigma_data, batch.t, batch.class_labels)
    return weighted_residual(F - target, logvar(batch.t) if logvar else None)
