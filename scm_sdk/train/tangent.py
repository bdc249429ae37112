"""The tangent of sCM: how the consistency function changes along the trajectory, times cos(t).

    df/dt    = -cos(t) (sigma_d F - dx/dt) - sin(t) (x_t + sigma_d dF/dt)             (Eq. 6)
    g        = cos(t) df/dt, with the second part faded in by r
    dF/dt    = grad_x F . (dx/dt) / sigma_d + dF/dt|_x                  along (x_t / sigma_d, t)

The prior weight 1 / (sigma_d tan t) is already inside ``g``: do not weight the loss by it again.
The JVP carries cos(t) sin(t) in its tangents, so nothing grows near t = 0 or t = pi/2. (The paper's
text has a sigma_d too many in these tangents; its Algorithm 1 is right.)

Source: arXiv 2410.11081, section 4 and Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..model.trigflow import expand_time

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
        warmup: Factor r in [0, 1] on the part that holds the JVP.
    """
    t = expand_time(t, x_t)
    cos, sin = torch.cos(t), torch.sin(t)
    return -cos.square() * (sigma_data * F - dxdt) - warmup * (cos * sin * x_t + sigma_data * scaled_dF)


def normalize_tangent(g: Tensor, *, norm: Literal["l2", "rms"], c: float) -> Tensor:
    """Return ``g / (||g|| + c)`` with the norm over each sample, (B, ...).

    ``l2`` is the paper's. ``rms`` divides it by the square root of the number of elements, so that
    c and the step have the same meaning for every sample size; better for tiny samples.
    """
    flat = g.flatten(1)
    size = flat.norm(dim=1) if norm == "l2" else flat.square().mean(dim=1).sqrt()
    return g / (expand_time(size, g) + c)
