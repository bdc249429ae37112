"""Many-step samplers of a TrigFlow diffusion model (the teacher): DDIM and the second-order 2S.

They integrate the probability-flow ODE ``dx_t/dt = sigma_data * F(x_t / sigma_data, t)`` from noise
at ``times[0]`` to data at 0. In the EDM picture (``sigma = sigma_data * tan(t)``) DDIM is Euler's
method and 2S is Heun's, exactly; the tests check both to 1e-12. The few-step sampler of a
consistency model is in ``model/sampler.py``.

Times are Python floats (float64) whatever the dtype of the tensors; they are radians.
Source: Lu and Song, 2024, arXiv 2410.11081, Eq. 26-28 (with ``x_s`` for the misprinted ``x_t`` in
Eq. 26); Karras et al., 2022, arXiv 2206.00364, Eq. 5 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .._util.events import SILENT, Events
from ..errors import ConfigError, ShapeError

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, *sample) data units, t (B,) radians) -> F(x_t / sigma_data, t), (B, *sample), unitless."""

# 2S divides by cos(t); above this limit sigma exceeds 10,000 sigma_data and rounding dominates.
_MIN_COS = 1e-4


def karras_times(
    num_steps: int,
    sigma_data: float,
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    rho: float = 7.0,
    shift: float = 0.0,
) -> tuple[float, ...]:
    """Return the EDM noise levels as TrigFlow times, then 0.

    Args:
        num_steps: Steps of the solver, at least 1.
        sigma_data: Standard deviation of the data, data units, greater than 0.
        sigma_max: First noise level, data units.
        sigma_min: Last noise level before 0, data units; not used when ``num_steps`` is 1.
        rho: Exponent of the grid; larger puts more steps at low noise.
        shift: Share of a step by which all levels but the first are raised, in [0, 1).

    Returns:
        ``num_steps + 1`` times, radians, strictly falling from ``arctan(sigma_max / sigma_data)`` to 0.

    Raises:
        ConfigError: If an argument is out of its range.

    Source: arXiv 2206.00364, Eq. 5.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}, expected 1 or more; 18 to 40 is usual for a teacher.")
    if not (0 < sigma_min < sigma_max < math.inf and 0 < sigma_data < math.inf and 0 < rho < math.inf):
        raise ConfigError(
            f"sigma_min {sigma_min}, sigma_max {sigma_max}, sigma_data {sigma_data}, rho {rho}: expected "
            "0 < sigma_min < sigma_max, and sigma_data and rho greater than 0."
        )
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    last = max(num_steps - 1, 1)
    sigmas = [(high + (i - shift if i else 0) / last * (low - high)) ** rho for i in range(num_steps)]
    return (*(math.atan(sigma / sigma_data) for sigma in sigmas), 0.0)


def ddim_step(x_s: Tensor, F: Tensor, s: float, t: float, *, sigma_data: float) -> Tensor:
    """Move samples from time ``s`` to time ``t`` along the circle that ``F`` spans with them.

    Args:
        x_s: Samples at time ``s``, (B, *sample), data units.
        F: The network's output for ``(x_s / sigma_data, s)``, (B, *sample), unitless.
        s: Time of ``x_s``, radians.
        t: Time to go to, radians.
        sigma_data: Standard deviation of the data, data units.

    Returns:
        Samples at time ``t``, (B, *sample), data units. With ``t = 0`` this is the estimate of ``x_0``.

    Source: arXiv 2410.11081, Eq. 26.
    """
    return math.cos(s - t) * x_s - math.sin(s - t) * sigma_data * F


def sample_ode(
    velocity_fn: VelocityFn,
    noise: Tensor,
    times: Sequence[float],
    *,
    sigma_data: float,
    order: Literal[1, 2] = 2,
    events: Events = SILENT,
) -> Tensor:
    """Generate samples from standard normal noise by solving the probability-flow ODE, without gradients.

    Args:
        velocity_fn: Returns ``F(x_t / sigma_data, t)`` from ``x_t``, (B, *sample), data units, and
            ``t``, (B,), radians, dtype and device of ``noise``. Labels and guidance belong inside it.
        noise: Standard normal, (B, *sample), any floating dtype; the samples keep dtype and device.
        times: Radians, strictly falling, the first in (0, pi/2], the last 0. See ``karras_times``.
        sigma_data: Standard deviation of the data, data units.
        order: 1 is DDIM: one network call per step. 2 is 2S: two per step, one in the last, so
            ``2 * (len(times) - 1) - 1`` in all, and an error that falls with the square of the step.
        events: Receives each step.

    Returns:
        Samples, (B, *sample), data units, not clipped.

    Raises:
        ConfigError: If ``times``, ``sigma_data`` or ``order`` is invalid.
        ShapeError: If ``noise`` has no batch axis or is not floating, or ``velocity_fn`` returns
            another shape.

    Source: arXiv 2410.11081, Eq. 26 (order 1), Eq. 27-28 with r = 1 (order 2).
    """
    samples = noise
    for step, state in enumerate(solve_ode(velocity_fn, noise, times, sigma_data=sigma_data, order=order)):
        samples = state
        if step:
            events.step("steps", step, len(times) - 1)
    return samples


@torch.no_grad()
def solve_ode(
    velocity_fn: VelocityFn, noise: Tensor, times: Sequence[float], *, sigma_data: float, order: Literal[1, 2] = 2
) -> Iterator[Tensor]:
    """Yield the states of ``sample_ode`` at each of ``times``, (B, *sample), data units; the last are the samples."""
    _check(noise, times, sigma_data, order)

    def network(x: Tensor, t: float) -> Tensor:
        F = velocity_fn(x, noise.new_full((len(noise),), t))
        if F.shape != x.shape:
            raise ShapeError(f"velocity_fn returned {tuple(F.shape)}, expected {tuple(x.shape)}: the shape of its x_t.")
        return F

    x = sigma_data * math.sin(times[0]) * noise  # = sigma_max cos(t_0) noise: the EDM start, rescaled
    yield x
    for s, t in pairwise(times):
        F = network(x, s)
        y = ddim_step(x, F, s, t, sigma_data=sigma_data)
        if order == 2 and t > 0:  # at t = 0 the correction would need F where it is undefined
            noise_s = math.sin(s) * x + math.cos(s) * sigma_data * F
            noise_t = math.sin(t) * y + math.cos(t) * sigma_data * network(y, t)
            y = y - math.sin(s - t) / (2 * math.cos(s)) * (noise_t - noise_s)
        x = y
        yield x


def _check(noise: Tensor, times: Sequence[float], sigma_data: float, order: int) -> None:
    if noise.ndim < 2 or not noise.is_floating_point():
        raise ShapeError(
            f"noise is {tuple(noise.shape)} {noise.dtype}, expected (B, *sample) of a floating dtype: "
            "axis 0 is the batch."
        )
    if order not in (1, 2):
        raise ConfigError(f"order is {order}, expected 1 (DDIM) or 2 (2S).")
    if not (math.isfinite(sigma_data) and sigma_data > 0):
        raise ConfigError(f"sigma_data is {sigma_data}, expected a number greater than 0.")
    falling = all(s > t for s, t in pairwise(times))
    if len(times) < 2 or not falling or times[-1] != 0 or not 0 < times[0] <= math.pi / 2:
        raise ConfigError(
            f"times are {tuple(times)}, expected radians that fall strictly from at most pi/2 to 0. "
            "karras_times(num_steps, sigma_data) makes them."
        )
    if order == 2 and math.cos(times[0]) < _MIN_COS and len(times) > 2:
        raise ConfigError(
            f"times start at {times[0]}, expected at most {math.acos(_MIN_COS):.6f} for order 2, whose "
            "correction divides by cos(t). Start a little lower or use order=1."
        )
