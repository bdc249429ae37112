"""The sCM tangent: cos(t) times the derivative of the consistency function along the trajectory.

    df/dt    = -cos(t) (sigma_d F - dx/dt) - sin(t) (x_t + sigma_d dF/dt)             (Eq. 6)
    g        = cos(t) df/dt, with the second part faded in by r
    dF/dt    = grad_x F . (dx/dt) / sigma_d + dF/dt|_x                  along (x_t / sigma_d, t)

``g`` includes the prior weight 1 / (sigma_d tan t): do not apply it to the loss again.
The JVP carries cos(t) sin(t) in its tangents, so nothing grows near t = 0 or t = pi/2. (The paper's
text has a sigma_d too many in these tangents; its Algorithm 1 is right.)

``scaled_difference`` computes dF/dt without forward-mode differentiation; ``discrete_tangent`` does not need dF/dt.

Source: arXiv 2410.11081, section 4 and Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ...model.solvers import karras_times
from ...model.trigflow import expand_time

Network = Callable[[Tensor, Tensor], Tensor]


def scaled_jvp(network: Network, x_t: Tensor, t: Tensor, dxdt: Tensor, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return F and ``cos(t) sin(t) dF/dt`` along the trajectory, both (B, ...), unitless.

    Args:
        network: ``(x, t) -> F``, labels already bound; differentiable in forward mode.
        x_t: Noisy samples, (B, ...), data units.
        t: Times, (B,), radians.
        dxdt: Velocity of the trajectory, (B, ...), data units.
        sigma_data: Standard deviation of the data.
    """
    speed_B = torch.cos(t) * torch.sin(t)
    primals = (x_t / sigma_data, t)
    tangents = (expand_time(speed_B, x_t) * dxdt / sigma_data, speed_B)
    F: Tensor
    F, dF = torch.func.jvp(network, primals, tangents)[:2]
    return F, dF


def scaled_difference(
    network: Network, x_t: Tensor, t: Tensor, dxdt: Tensor, *, sigma_data: float, step: float
) -> Tensor:
    """Return ``cos(t) sin(t) dF/dt`` along the trajectory by a central difference, (B, ...), unitless.

    Two calls of the network, for attention or wrappers without a forward derivative. Because the direction has the
    factor cos(t) sin(t), the times stay between 0 and pi/2. The error is O(``step^2``) plus rounding / ``step``.

    Args:
        network: As for ``scaled_jvp``; not necessarily differentiable.
        x_t: Noisy samples, (B, ...), data units.
        t: Times, (B,), radians.
        dxdt: Velocity of the trajectory, (B, ...), data units.
        sigma_data: Standard deviation of the data.
        step: Relative step along ``cos(t) sin(t) dx/dt`` in both directions.
    """
    dt_B = step * torch.cos(t) * torch.sin(t)
    dx = expand_time(dt_B, x_t) * dxdt / sigma_data
    x = x_t / sigma_data
    return (network(x + dx, t + dt_B) - network(x - dx, t - dt_B)) / (2.0 * step)


def grid_times(t: Tensor, count: int, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Round times up to the grid of the discrete-time ablation; return them and their lower neighbors, each (B,).

    The grid is EDM's, ``count`` noise levels and 0. The probability of a grid time is that of the interval down to its
    lower neighbor.

    Args:
        t: Times, (B,), radians; those above the grid are set to the largest grid time.
        count: Number of nonzero grid times, at least 2.
        sigma_data: Standard deviation of the data.

    Source: arXiv 2410.11081, appendix E; the shares as in arXiv 2310.14189, section 3.5.
    """
    grid = torch.tensor(karras_times(count, sigma_data)[::-1], dtype=t.dtype, device=t.device)
    above = torch.searchsorted(grid, t.contiguous()).clamp(1, count)
    return grid[above], grid[above - 1]


def discrete_tangent(
    F: Tensor,
    F_s: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    dxdt: Tensor,
    *,
    sigma_data: float,
    warmup: Tensor | float = 1.0,
) -> Tensor:
    """Return ``cos(t)`` times the difference quotient of f between s and t, (B, ...), data units.

        (f(x_t, t) - f(x_s, s)) / sin(t - s)      with x_s = cos(t - s) x_t - sin(t - s) dx/dt

    As s tends to t this is ``tangent``; there is no JVP.

    Args:
        F: Network output at (x_t / sigma_data, t), (B, ...).
        F_s: Network output at (x_s / sigma_data, s), (B, ...).
        x_t: Noisy samples, (B, ...), data units.
        t: Times, (B,), radians.
        s: Earlier times, (B,), radians.
        dxdt: Velocity at t, (B, ...), data units.
        sigma_data: Standard deviation of the data.
        warmup: Factor r in [0, 1] of the part that corresponds to the JVP in continuous time.

    Source: arXiv 2410.11081, appendix E.
    """
    angle, s = expand_time(t - s, x_t), expand_time(s, x_t)
    dF = (torch.cos(angle) * F - F_s) / torch.sin(angle)
    quotient = -torch.cos(s) * (sigma_data * F - dxdt) - warmup * torch.sin(s) * (x_t + sigma_data * dF)
    return torch.cos(expand_time(t, x_t)) * quotient


def tangent(
    F: Tensor,
    scaled_dF: Tensor,
    x_t: Tensor,
    t: Tensor,
    dxdt: Tensor,
    *,
    sigma_data: float,
    warmup: Tensor | float = 1.0,
) -> Tensor:
    """Return ``g = cos(t) df/dt``, (B, ...), data units, before normalization.

    Args:
        F: Network output at (x_t / sigma_data, t), (B, ...).
        scaled_dF: ``cos(t) sin(t) dF/dt`` from ``scaled_jvp``, (B, ...).
        x_t: Noisy samples, (B, ...), data units.
        t: Times, (B,), radians.
        dxdt: Velocity, (B, ...), data units.
        sigma_data: Standard deviation of the data.
        warmup: Factor r in [0, 1] of the part with the JVP.
    """
    t = expand_time(t, x_t)
    cos, sin = torch.cos(t), torch.sin(t)
    return -cos.square() * (sigma_data * F - dxdt) - warmup * (cos * sin * x_t + sigma_data * scaled_dF)


def normalize_tangent(g: Tensor, *, norm: Literal["l2", "rms", "clamp"], c: float) -> Tensor:
    """Return ``g / (||g|| + c)`` with the norm over each sample, (B, ...).

    ``l2`` is the paper's norm. ``rms`` divides it by the square root of the number of elements, so that c does not
    depend on the sample size; better for small samples. ``clamp`` clips each element to [-1, 1] instead, which the
    paper found similarly good; it does not use c.
    """
    if norm == "clamp":
        return g.clamp(-1.0, 1.0)
    flat = g.flatten(1)
    size = flat.norm(dim=1) if norm == "l2" else flat.square().mean(dim=1).sqrt()
    return g / (expand_time(size, g) + c)
