"""With which factors was one value of a graph made from others? Found by least squares: the algebra is linear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FACTOR_TOLERANCE = 1e-5
"""Of the sampler's factors, which are float32 in every precision."""


@dataclass(frozen=True)
class Factor:
    """A factor that was solved for, and how far rounding lets it be from what it was made with."""

    value: float
    doubt: float

    def differs(self, wanted: float) -> bool:
        """Whether it cannot have been made with ``wanted``."""
        return not abs(self.value - wanted) <= max(FACTOR_TOLERANCE * max(1.0, abs(wanted)), self.doubt)


def solve_factors(target: np.ndarray, *parts: np.ndarray) -> tuple[Factor, ...]:
    """Return the factors with which the parts add up to the target, by least squares in float64.

    The doubt is six standard errors: where the parts are nearly parallel, rounding moves the factors far.
    """
    columns = np.stack([part.astype(np.float64).ravel() for part in parts], axis=1)
    wanted = target.astype(np.float64).ravel()
    factors, *_ = np.linalg.lstsq(columns, wanted, rcond=None)
    noise = float(np.std(columns @ factors - wanted))
    errors = noise * np.sqrt(np.diag(np.linalg.pinv(columns.T @ columns)))
    return tuple(Factor(float(f), 6 * float(e)) for f, e in zip(factors, errors, strict=True))
