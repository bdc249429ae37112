"""Frechet and kernel distance, precision and recall of two sets of features, in numpy.

``quality.py`` calls them with features of images; they work with any (N, D) features.

Source: Heusel et al., 2017, arXiv 1706.08500 (Frechet distance); Binkowski et al., 2018, arXiv
1801.01401 (KID); Zaremba et al., 2013, arXiv 1307.1954 (the block estimator and its interval); Kynkäänniemi et
al., 2019, arXiv 1904.06991 (precision and recall).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, ShapeError

MIN_BLOCKS = 8
MAX_BLOCK = 1000

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """A Gaussian fitted to features.

    Attributes:
        mean: (D,), float64.
        cov: (D, D), float64, divided by N - 1.
        count: Number of samples, N.
    """

    mean: NDArray[np.float64]
    cov: NDArray[np.float64]
    count: int


def feature_stats(features: FloatArray) -> FeatureStats:
    """Fit a Gaussian to ``features``, (N, D), any float dtype, in float64.

    Raises:
        ShapeError: If ``features`` is not two-dimensional or holds fewer than two samples.
        ConfigError: If it holds a value that is not finite.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ShapeError(f"features have shape {features.shape}, expected (N, D) with N >= 2: one row per image.")
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise ConfigError(
            f"features hold {int((~np.isfinite(x)).sum())} values that are not finite, expected none. "
            "Look at the images they come from."
        )
    mean = x.mean(axis=0)
    centered = x - mean
    return FeatureStats(mean=mean, cov=centered.T @ centered / (len(x) - 1), count=len(x))


def frechet_distance(stats_a: FeatureStats, stats_b: FeatureStats) -> float:
    """Return the squared Frechet (2-Wasserstein) distance between two Gaussians.

    Computes ``|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))``, the last trace as the sum
    of the square roots of the eigenvalues of ``r' C_b r`` with ``r r' = C_a``. Both matrices are
    symmetric, so no complex root and no scipy is needed, and singular covariances (N <= D) are fine.

    Args:
        stats_a: One Gaussian, D-dimensional.
        stats_b: The other one, D-dimensional.

    Returns:
        The distance, 0 or more, in squared feature units.

    Raises:
        ShapeError: If the dimensions differ.

    Source: Dowson and Landau, 1982; used as in arXiv 1706.08500.
    """
    if stats_a.mean.shape != stats_b.mean.shape:
        raise ShapeError(
            f"the statistics have {stats_a.mean.size} and {stats_b.mean.size} dimensions, expected the same. "
            "Compute both with the same feature network."
        )
    values, vectors = np.linalg.eigh(stats_a.cov)
    kept = values > values[-1] * 1e-13  # with N < D most directions are empty: drop them
    root = vectors[:, kept] * np.sqrt(values[kept].clip(min=0))
    product = root.T @ stats_b.cov @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    gap = stats_a.mean - stats_b.mean
    distance = gap @ gap + np.trace(stats_a.cov) + np.trace(stats_b.cov) - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave -1e-13 for equal statistics


def kernel_distance(
    features_a: FloatArray, features_b: FloatArray, *, block: int | None = None, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the kernel distance (KID) of two sets of features and its 95 % confidence interval.

    Both sets are shuffled and cut into disjoint blocks; each pair of blocks gives one unbiased
    estimate with the kernel ``(x . y / D + 1)^3``. The estimates are independent, so the Student
    interval around their mean is valid. Real sets score around 0, also below it.

    Args:
        features_a: (N, D).
        features_b: (M, D).
        block: Samples of each set per block, at least 2; by default the smaller set makes 8 blocks
            or, when it is large, blocks of 1,000.
        seed: Of the shuffle.

    Returns:
        The mean over blocks, and (low, high) of its 95 % confidence interval.

    Raises:
        ShapeError: If the sets are not (N, D) and (M, D).
        ConfigError: If there are not enough samples for two blocks.
    """
    return _interval(_block_estimates(features_a, features_b, block, seed))


def kernel_distance_delta(
    features_a: FloatArray, features_b: FloatArray, reference: FloatArray, *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the KID of ``a`` minus that of ``b``, both to the reference, and its 95 % interval.

    All three use the same blocks, so that variation shared by ``a`` and ``b``, such as seeds, cancels: the interval is
    far narrower than those of ``kernel_distance``.

    Args:
        features_a: (N, D), for example of a reduced precision.
        features_b: (N, D), of the same seeds and labels.
        reference: (M, D), of real pictures.
        seed: Of the shuffle.

    Raises:
        ShapeError: If ``a`` and ``b`` differ in shape, or the sets are not of one network.
        ConfigError: If there are not enough samples for two blocks.
    """
    if features_a.shape != features_b.shape:
        raise ShapeError(
            f"features have shapes {features_a.shape} and {features_b.shape}, expected the same: one row per seed."
        )
    a, b = (_block_estimates(features, reference, None, seed) for features in (features_a, features_b))
    return _interval(a - b)


def precision_recall(generated: FloatArray, reference: FloatArray, *, neighbors: int = 3) -> tuple[float, float]:
    """Return improved precision and recall of two sets of features, each in [0, 1].

    Precision is the share of generated samples inside the reference's manifold, recall the share of reference samples
    inside the generated one's; a manifold is the union of balls that reach to each sample's third-nearest neighbor.

    Args:
        generated: (N, D).
        reference: (M, D).
        neighbors: The k of the balls.

    Raises:
        ShapeError: If the sets are not (N, D) and (M, D).
        ConfigError: If a set has no more than ``neighbors`` samples.

    Source: Kynkäänniemi et al., 2019, arXiv 1904.06991.
    """
    _check_pair(generated, reference)
    fewest = min(len(generated), len(reference))
    if fewest <= neighbors:
        raise ConfigError(f"{fewest} samples, expected more than {neighbors}, the neighbors that are looked for.")
    radii = [_radii(each, neighbors) for each in (generated, reference)]
    return _inside(generated, reference, radii[1]), _inside(reference, generated, radii[0])


def _radii(features: FloatArray, neighbors: int) -> NDArray[np.float64]:
    """Return each sample's squared distance to its k-th nearest other sample, (N,)."""
    parts = [np.partition(d, neighbors, axis=1)[:, neighbors] for d in _square_distances(features, features)]
    return np.concatenate(parts)


def _inside(samples: FloatArray, centers: FloatArray, radii: NDArray[np.float64]) -> float:
    return float(np.mean(np.concatenate([(d <= radii).any(axis=1) for d in _square_distances(samples, centers)])))


def _square_distances(a: FloatArray, b: FloatArray, at_once: int = 500) -> Iterator[NDArray[np.float64]]:
    b = np.asarray(b, np.float64)
    norms = np.square(b).sum(axis=1)
    for start in range(0, len(a), at_once):
        x = np.asarray(a[start : start + at_once], np.float64)
        yield (np.square(x).sum(axis=1)[:, None] + norms - 2 * (x @ b.T)).clip(min=0)


def _check_pair(a: FloatArray, b: FloatArray) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"features have shapes {a.shape} and {b.shape}, expected (N, D) and (M, D). "
            "Compute both with the same feature network."
        )


def _block_estimates(
    features_a: FloatArray, features_b: FloatArray, block: int | None, seed: int
) -> NDArray[np.float64]:
    _check_pair(features_a, features_b)
    fewest, dim = min(len(features_a), len(features_b)), features_a.shape[1]
    size = min(MAX_BLOCK, fewest // MIN_BLOCKS) if block is None else block
    count = fewest // size if size >= 1 else 0
    if size < 2 or count < 2:
        raise ConfigError(
            f"{fewest} samples make {count} blocks of {size}, expected at least 2 blocks of at least 2. "
            "Give more samples or a smaller block."
        )
    rng = np.random.default_rng(seed)
    pick_a = rng.permutation(len(features_a))[: count * size].reshape(count, size)
    pick_b = rng.permutation(len(features_b))[: count * size].reshape(count, size)
    pairs = zip(pick_a, pick_b, strict=True)
    return np.array([_mmd2(features_a[i], features_b[j], dim) for i, j in pairs])


def _interval(estimates: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    mean, count = float(estimates.mean()), len(estimates)
    half = _student_975(count - 1) * float(estimates.std(ddof=1)) / math.sqrt(count)
    return mean, (mean - half, mean + half)


def _mmd2(x: FloatArray, y: FloatArray, dim: int) -> float:
    """Return the unbiased squared discrepancy of two equally large sets."""
    x, y, n = np.asarray(x, np.float64), np.asarray(y, np.float64), len(x)
    within = 0.0
    for z in (x, y):
        kernel = (z @ z.T / dim + 1) ** 3
        within += (kernel.sum() - np.trace(kernel)) / (n * (n - 1))
    return float(within - 2 * ((x @ y.T / dim + 1) ** 3).mean())


def _student_975(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t: exact to 3, then Cornish-Fisher (error < 0.3 %)."""
    if freedom <= 3:
        return (12.7062, 4.30265, 3.18245)[freedom - 1]
    z, v = NormalDist().inv_cdf(0.975), freedom
    first = (z**3 + z) / (4 * v)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return z + first + second + third
