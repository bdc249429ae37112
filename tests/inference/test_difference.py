"""The numbers that parity is judged by are the right numbers."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk.errors import ShapeError
from scm_sdk.inference.parity.difference import difference, percentile_interval, ssim
from scm_sdk.spec import SamplerSpec

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 16, 16))


def pair(seed: int, scale: float, shape: tuple[int, ...] = (4, 3, 16, 16)) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    a = draw.uniform(-1, 1, shape).astype(np.float32)
    return a, a + np.float32(scale) * draw.standard_normal(shape).astype(np.float32)


def test_the_numbers_of_a_known_difference() -> None:
    a = np.zeros((2, 3, 16, 16), np.float32)
    b = a.copy()
    b[1, 0, 0, 0] = 0.5
    found = difference(a, b, [7, 8], SPEC)
    count = a.size
    assert found.max_abs == 1.0  # 0.5 in units of sigma_data = 0.5
    assert found.mean_abs == pytest.approx(1.0 / count)
    assert found.relative_l2 == pytest.approx(1.0)
    assert found.psnr_db == pytest.approx(10 * math.log10(2.0**2 / (0.25 / count)))
    assert found.uint8_mismatch == pytest.approx(1 / count)
    assert found.uint8_max_step == 191 - 128  # to_uint8 of 0.5 and of 0
    assert found.worst_seed == 8


def test_equal_samples_are_equal() -> None:
    a, _ = pair(0, 0)
    found = difference(a, a, range(4), SPEC)
    assert (found.max_abs, found.psnr_db, found.uint8_mismatch, found.uint8_max_step) == (0, math.inf, 0, 0)
    assert found.ssim == pytest.approx(1, abs=1e-12)
    assert found.to_dict()["psnr_db"] is None


@given(st.integers(0, 99), st.floats(1e-4, 1))
def test_differences_are_symmetric_and_ordered(seed: int, scale: float) -> None:
    a, b = pair(seed, scale)
    one, other = difference(a, b, range(4), SPEC), difference(b, a, range(4), SPEC)
    assert (one.max_abs, one.mean_abs, one.psnr_db) == (other.max_abs, other.mean_abs, other.psnr_db)
    assert one.ssim == pytest.approx(other.ssim, abs=1e-12)
    assert 0 < one.mean_abs <= one.max_abs
    assert one.ssim is not None and -1 <= one.ssim <= 1


def test_ssim_against_a_direct_transcription() -> None:
    """Wang et al. 2004, equation 13, one window at a time."""
    a, b = (x.astype(np.float64) for x in pair(3, 0.2, (2, 1, 14, 13)))
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for n in range(2):
        for y in range(14 - 10):
            for x in range(13 - 10):
                p, q = a[n, 0, y : y + 11, x : x + 11], b[n, 0, y : y + 11, x : x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append(((2 * mp * mq + c1) * (2 * cov + c2)) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b, 2.0) == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(a, b, 2.0) < 0.99


@pytest.mark.parametrize("side", [1, 2, 4, 8, 11])
def test_ssim_of_small_pictures(side: int) -> None:
    a, b = (x.astype(np.float64) for x in pair(1, 0.1, (2, 3, side, side)))
    assert ssim(a, a, 2.0) == pytest.approx(1)
    assert ssim(a, b, 2.0) < 1


def test_what_is_no_picture_has_no_picture_numbers() -> None:
    spec = msgspec.structs.replace(SPEC, output="latents", sample_shape=(4, 8))
    a, b = pair(0, 0.1, (2, 4, 8))
    found = difference(a, b, [0, 1], spec)
    assert (found.ssim, found.uint8_mismatch, found.uint8_max_step) == (None, None, None)
    assert found.max_abs > 0
    with pytest.raises(ShapeError, match=r"candidate is \(2, 4, 8\), reference \(1, 4, 8\)"):
        difference(a, b[:1], [0, 1], spec)


@given(st.integers(1, 400), st.integers(0, 2**32))
def test_the_interval_of_the_percentile_is_of_its_ranks(count: int, seed: int) -> None:
    """Whatever the distribution: the ends are the values at binomial ranks, around the estimate."""
    values = np.random.default_rng(seed).permutation(count).astype(float)
    value, low, high = percentile_interval(values)
    assert low <= value <= high and sum(values < value) <= 0.05 * count
    assert (low == -math.inf) == (0.95**count > 0.05)
    assert high <= np.sort(values)[(count - 1) // 2]


@pytest.mark.parametrize("count", [3, 32, 59, 512])
def test_the_interval_holds_the_percentile_as_often_as_it_says(count: int) -> None:
    """Of uniform values the 5th percentile is 0.05: each end may be on its wrong side in 5 % of the draws."""
    draws = np.random.default_rng(0).random((4000, count))
    ends = np.array([percentile_interval(row)[1:] for row in draws])
    assert (ends[:, 0] > 0.05).mean() < 0.06 and (ends[:, 1] < 0.05).mean() < 0.06
    if count == 512:
        assert (ends[:, 1] - ends[:, 0]).mean() < 0.04, "many samples decide"
