"""TrigFlow, the noise process of sCM, as pure functions of tensors.

    x_t = cos(t) * x_0 + sin(t) * z,    z ~ N(0, sigma_data^2 I),    0 <= t <= pi/2

``t`` is an angle in radians: 0 is data, pi/2 is noise. If the data has standard deviation
``sigma_data``, so has ``x_t`` at every ``t``; no scaling by schedule appears anywhere.

The functions have no parameters, no state and no device transfers. ``train/objectives`` differentiates through them and
``model/sampler.py`` unrolls them.

Shape letters: B batch; samples have any rank, so ``t`` is broadcast over all axes but the first.
Source: Lu and Song, 2024, arXiv 2410.11081, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Reshape times (B,) or (1,) to (B, 1, ..., 1) so that they broadcast over samples.

    Raises:
        ShapeError: If ``t`` does not hold one time per sample (or a single one).
    """
    if t.ndim != 1 or t.shape[0] not in (1, like.shape[0]):
        raise ShapeError(
            f"t has shape {tuple(t.shape)}, expected ({like.shape[0]},): one time per sample. "
            "For a single time use t.expand(len(x_t))."
        )
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(x_0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return ``x_t = cos(t) x_0 + sin(t) z``.

    Args:
        x_0: Clean samples, (B, ...), data units.
        z: Noise of standard deviation ``sigma_data``, (B, ...), data units.
        t: Times, (B,), radians in [0, pi/2].
    """
    t = expand_time(t, x_0)
    return torch.cos(t) * x_0 + torch.sin(t) * z


def true_velocity(x_0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return ``dx_t/dt = cos(t) z - sin(t) x_0``, data units; the target of ``sigma_data * F``."""
    t = expand_time(t, x_0)
    return torch.cos(t) * z - torch.sin(t) * x_0


def rotate(x_t: Tensor, dxdt: Tensor, angle: Tensor) -> Tensor:
    """Follow a trajectory back by ``angle``: ``cos(angle) x_t - sin(angle) dx/dt``, (B, ...), data units.

    DDIM, and exact where the velocity is that of ``x_t = cos(t) x_0 + sin(t) z``.

    Args:
        x_t: Noisy samples, (B, ...), data units.
        dxdt: Their velocities, (B, ...), data units.
        angle: Angle of the rotation, (B,), radians.
    """
    angle = expand_time(angle, x_t)
    return torch.cos(angle) * x_t - torch.sin(angle) * dxdt


def predict_data(x_t: Tensor, F: Tensor, t: Tensor, *, sigma_data: float) -> Tensor:
    """Step from a noisy sample to the data end of its trajectory.

    Computes ``cos(t) x_t - sin(t) sigma_data F``. For a consistency model this is f(x_t, t); for a
    diffusion model it is the denoiser E[x_0 | x_t].

    Args:
        x_t: Noisy samples, (B, ...), data units.
        F: Output of the network for ``(x_t / sigma_data, t)``, (B, ...), unitless.
        t: Times, (B,), radians in [0, pi/2].
        sigma_data: Standard deviation of the data, data units, greater than 0.

    Returns:
        Estimates of ``x_0``, (B, ...), data units. Where ``t`` is 0 this is ``x_t`` exactly.

    Raises:
        ShapeError: If ``t`` does not hold one time per sample.

    Source: arXiv 2410.11081, equation 5.
    """
    t = expand_time(t, x_t)
    return torch.cos(t) * x_t - torch.sin(t) * (sigma_data * F)


def predict_noise(x_t: Tensor, F: Tensor, t: Tensor, *, sigma_data: float) -> Tensor:
    """Return the noise estimate ``sin(t) x_t + cos(t) sigma_data F``, (B, ...), data units.

    Its standard deviation is ``sigma_data``; divide by it for unit noise.
    """
    t = expand_time(t, x_t)
    return torch.sin(t) * x_t + torch.cos(t) * (sigma_data * F)
