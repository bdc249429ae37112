"""Differences of two sets of samples as numbers: pure functions of arrays, in float64.

Absolute differences are in units of ``sigma_data``, so that they are comparable between models. PSNR and SSIM use the
declared value range, not the range of an image. Nothing is clipped except for the 8-bit comparison of final images.

A reduced precision is judged by ``psnr_p05_db``, the PSNR that 95 % of the samples reach. With a few-step sampler a few
samples in a hundred turn into another image when they are rounded. They dominate the mean and the worst sample, which
therefore depend on the choice and the number of samples; a quantile does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ShapeError
from ...images import to_uint8
from ...spec import SamplerSpec

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
PERCENT_BELOW = 5
"""Percentage of the samples that may be below ``psnr_p05_db``."""
DOUBT = 0.05
"""Probability that an end of ``psnr_p05_interval_db`` is on the wrong side of the true percentile."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Differences between candidate samples and reference samples.

    Attributes:
        max_abs: Largest absolute difference, units of sigma_data; NaN if not finite.
        mean_abs: Mean absolute difference, units of sigma_data.
        relative_l2: Norm of the difference over the norm of the reference.
        psnr_db: Peak signal-to-noise ratio, the peak is the width of the value range; infinite if equal.
        worst_psnr_db: Lowest PSNR of a single sample; it falls with the number of samples.
        psnr_p05_db: The PSNR that 95 % of the samples reach: at most 5 % have less. A seed that occurs several times,
            in several batch splits, counts once, by its lowest.
        psnr_p05_interval_db: Confidence interval of the 5th percentile, each end with 95 % confidence; the lower end is
            ``-inf`` for 58 or fewer samples. See ``percentile_interval``.
        ssim: Mean structural similarity; None for samples that are not images.
        uint8_mismatch: Share of different 8-bit values; None for samples that are not images.
        uint8_max_step: Largest difference in 8-bit levels; None for samples that are not images.
        finite: Whether both sides are finite.
        worst_seed: Seed of the sample with ``max_abs``, or of the first non-finite sample.
    """

    max_abs: float
    mean_abs: float
    relative_l2: float
    psnr_db: float
    worst_psnr_db: float
    psnr_p05_db: float
    psnr_p05_interval_db: tuple[float, float]
    ssim: float | None
    uint8_mismatch: float | None
    uint8_max_step: int | None
    finite: bool
    worst_seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is NaN or infinite becomes None."""
        plain = {k: _finite(v) for k, v in asdict(self).items()}
        return plain | {"psnr_p05_interval_db": [_finite(end) for end in self.psnr_p05_interval_db]}


MIN_SPREAD = 0.5
"""Minimum standard deviation of samples, as a share of the reference's; lower values mean lost contrast."""


def find_blank(candidate: NDArray[np.float32], reference: NDArray[np.float32]) -> str:
    """Describe samples that are blank or all alike while those of the reference are not; "" if they are fine.

    The PSNR of a blank picture is high where the contrast of the reference is low.

    Args:
        candidate: (N, ...), finite or not.
        reference: Samples from the same noise, in the same form.
    """
    a, b = (np.reshape(each, (len(each), -1)).astype(np.float64) for each in (candidate, reference))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ""  # reported by ``Difference.finite``
    within = [np.median(each.std(axis=1)) for each in (a, b)]
    between = [math.sqrt(each.var(axis=0).mean()) for each in (a, b)]
    for (found, wanted), what in (
        (within, "samples are blank: within one"),
        (between, "samples are alike: between them"),
    ):
        if found < MIN_SPREAD * wanted:
            return f"{what} values spread by {found / wanted:.0%} of the reference's, expected {MIN_SPREAD:.0%} or more"
    return ""


def difference(
    candidate: NDArray[np.float32], reference: NDArray[np.float32], seeds: Sequence[int], spec: SamplerSpec
) -> Difference:
    """Measure the difference of samples from the same noise.

    Args:
        candidate: ``(N, *spec.image_shape)``, float32, data units, not clipped.
        reference: Samples of the reference, in the same form.
        seeds: Seed of each sample.
        spec: Scale and value range.

    Raises:
        ShapeError: If the shapes differ or there is no sample.
    """
    expected = (len(seeds), *spec.image_shape)
    if not len(seeds) or candidate.shape != expected or reference.shape != expected:
        raise ShapeError(
            f"candidate is {candidate.shape}, reference {reference.shape}, expected both {expected}, "
            "at least one sample. Make both from the same seeds."
        )
    a, b = candidate.astype(np.float64), reference.astype(np.float64)
    good = (np.isfinite(a) & np.isfinite(b)).reshape(len(a), -1).all(axis=1)
    if not good.all():
        nan = float("nan")
        return Difference(
            max_abs=nan,
            mean_abs=nan,
            relative_l2=nan,
            psnr_db=nan,
            worst_psnr_db=nan,
            psnr_p05_db=nan,
            psnr_p05_interval_db=(nan, nan),
            ssim=None,
            uint8_mismatch=None,
            uint8_max_step=None,
            finite=False,
            worst_seed=int(seeds[int(np.flatnonzero(~good)[0])]),
        )
    width = spec.value_range[1] - spec.value_range[0]
    delta = np.abs(a - b)
    by_sample = np.mean(np.square(delta).reshape(len(a), -1), axis=1)
    squares = float(by_sample.mean())
    low, *interval = percentile_interval([_psnr_db(square, width) for square in _by_seed(by_sample, seeds)])
    norm = math.sqrt(float(np.mean(b**2)))
    picture = spec.output == "pixels" and len(spec.image_shape) == 3
    mismatch = step = None
    if picture and spec.image_shape[0] in (1, 3):
        levels = np.abs(to_uint8(candidate, spec.value_range).astype(np.int16) - to_uint8(reference, spec.value_range))
        mismatch, step = float(np.mean(levels != 0)), int(levels.max())
    return Difference(
        max_abs=float(delta.max()) / spec.sigma_data,
        mean_abs=float(delta.mean()) / spec.sigma_data,
        relative_l2=math.sqrt(squares) / norm if norm else (math.inf if squares else 0.0),
        psnr_db=_psnr_db(squares, width),
        worst_psnr_db=_psnr_db(float(by_sample.max()), width),
        psnr_p05_db=low,
        psnr_p05_interval_db=(interval[0], interval[1]),
        ssim=ssim(a, b, width) if picture else None,
        uint8_mismatch=mismatch,
        uint8_max_step=step,
        finite=True,
        worst_seed=int(seeds[int(delta.reshape(len(a), -1).max(axis=1).argmax())]),
    )


def percentile_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Estimate the 5th percentile of any distribution from a sample.

    Of N independent values, the number below the true percentile is binomial, B(N, 0.05). The value at rank k is above
    the percentile with the probability that fewer than k values are below it, and both ends are ranks that are on the
    wrong side with a probability of at most ``DOUBT``. The upper end is at most the median, so that a candidate with
    more than half of its values below always fails.

    Args:
        values: At least one.

    Returns:
        The percentile of the sample, the lower end (-inf if there are too few values), and the upper end.

    Source: David & Nagaraja, "Order Statistics", section 7.1, distribution-free confidence intervals for quantiles.
    """
    ordered, count = sorted(values), len(values)
    share, k = PERCENT_BELOW / 100, np.arange(1, count + 1)
    steps = np.concatenate([[0.0], np.log((count - k + 1) / k)])
    log_pmf = np.cumsum(steps) + np.arange(count + 1) * math.log(share / (1 - share)) + count * math.log(1 - share)
    cdf = np.cumsum(np.exp(log_pmf))
    low = int(
        np.searchsorted(cdf, DOUBT, side="right")
    )  # ranks from 1: the number of values that may be at or below the percentile
    high = min(int(np.searchsorted(cdf, 1 - DOUBT - 1e-9)), (count - 1) // 2) + 1
    rank = count * PERCENT_BELOW // 100 + 1
    return ordered[rank - 1], ordered[low - 1] if low else -math.inf, ordered[high - 1]


def _by_seed(by_sample: NDArray[np.float64], seeds: Sequence[int]) -> list[float]:
    """Return the largest value of each seed."""
    largest: dict[int, float] = {}
    for seed, value in zip(seeds, by_sample, strict=True):
        largest[int(seed)] = max(float(value), largest.get(int(seed), 0.0))
    return list(largest.values())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _psnr_db(mean_square: float, width: float) -> float:
    return 10 * math.log10(width**2 / mean_square) if mean_square else math.inf


def ssim(a: NDArray[np.float64], b: NDArray[np.float64], value_width: float) -> float:
    """Mean structural similarity of images, 1 if they are equal.

    Gaussian window of 11 pixels, sigma 1.5, only at positions inside the image; a smaller image uses its largest odd
    window. Channels have equal weight.

    Args:
        a: (N, C, H, W), float64.
        b: (N, C, H, W), float64.
        value_width: Difference of the highest and the lowest possible value.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    side = min(_WINDOW, *a.shape[-2:])
    side -= 1 - side % 2
    offset = np.arange(side) - side // 2
    window = np.exp(-(offset**2) / (2 * _SIGMA**2))
    window /= window.sum()

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        rows, columns = x.shape[-2] - side + 1, x.shape[-1] - side + 1
        x = sum((window[k] * x[..., k : k + rows, :] for k in range(side)), np.zeros(()))
        return sum((window[k] * x[..., :, k : k + columns] for k in range(side)), np.zeros(()))

    mean_a, mean_b = blur(a), blur(b)
    # Population moments, as in the paper: E[x^2] - E[x]^2 under the window.
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * value_width) ** 2, (_K2 * value_width) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return float(np.mean(luminance * structure))
