"""Learning-rate and weight-average schedules as functions of the iteration.

Source: EDM2, arXiv 2312.02696, section 3.1 and appendices B and C: learning rate, power-function average.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ...errors import ConfigError

MAX_SIGMA_REL = 12**-0.5
"""Width of the power-function average with exponent 0, the plain mean of all iterations."""


def linear_decay(iteration: int, *, warmup: int, decay: float, total: int) -> float:
    """Return the factor of a learning rate with linear warm-up, a plateau, and linear decay to 1 %.

    Args:
        iteration: Iteration, from 0.
        warmup: Iterations of the warm-up.
        decay: Iterations of the decay.
        total: Iterations of the run.
    """
    left = (total - iteration) / decay if decay else 1.0
    return _rise(iteration, warmup) * max(0.01, min(1.0, left))


def inverse_sqrt_decay(iteration: int, *, warmup: int, reference: int) -> float:
    """Return the factor of EDM2's learning rate, ``min(n / warmup, 1) / sqrt(max(n / reference, 1))``, n from 1.

    Args:
        iteration: Iteration, from 0; n is one more.
        warmup: Iterations of the linear warm-up.
        reference: Iterations after which the rate decays, t_ref.
    """
    return _rise(iteration, warmup) / math.sqrt(max((iteration + 1) / reference, 1.0))


def _rise(iteration: int, warmup: int) -> float:
    return min(1.0, (iteration + 1) / warmup) if warmup else 1.0


@lru_cache
def power_exponent(sigma_rel: float) -> float:
    """Return the exponent gamma of the power-function average whose relative width is ``sigma_rel``.

    The average weights time tau by ``tau^gamma`` up to now; the standard deviation of this profile is
    ``sigma_rel`` times its length: ``sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))``.

    Raises:
        ConfigError: If no average has this width; the mean of all iterations has width 0.2887.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ConfigError(f"sigma_rel is {sigma_rel}, expected 0 < sigma_rel < {MAX_SIGMA_REL:.4f}; 0.05 is usual.")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


def power_decay(sigma_rel: float, iteration: int) -> float:
    """Return the decay of the power-function average at an iteration: ``(1 - 1 / n)^(gamma + 1)``, n from 1.

    After iteration n the weights of iteration i have the share ``(i^(gamma+1) - (i-1)^(gamma+1)) / n^(gamma+1)``; the
    initial weights have none.
    """
    return float((1.0 - 1.0 / (iteration + 1)) ** (power_exponent(sigma_rel) + 1.0))
