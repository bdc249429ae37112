"""``scm-noise-v1``: a seed always gives the same noise, so its numbers are fixed here."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk.errors import ConfigError
from scm_sdk.noise import check_seed, draw_noise, philox4x32, round_keys, standard_normal
from scm_sdk.spec import SamplerSpec, default_times

GOLDEN = [  # seed, step, the first numbers; never change them: they are people's pictures
    (0, 0, [0.9911377, -0.9246626, -0.61760896, -0.4820686, -0.15363823, 0.1808259]),
    (0, 1, [1.1363673, -0.675883, 1.2405918, 0.22425114, 1.0219787, -0.8072827]),
    (1234, 0, [1.2291553, -1.6164905, 0.46462113, -1.5605406, 0.7433671, 0.6330828]),
    (2**32, 0, [0.12814565, -0.017424956, 1.0251772, -1.4683539, -0.50531477, 0.43530026]),
    (2**64 - 1, 1, [1.0626649, -0.41247267, -0.008819458, 2.0979044, -0.12334855, -1.0975322]),
]
SUMS = [[43.8847, 37.4265, 8.0942], [2.5710, 28.1881, -77.9551]]

SEEDS = st.integers(0, 2**64 - 1)
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


def spec(shape: tuple[int, ...] = (3, 5, 5), steps: int = 2) -> SamplerSpec:
    return SamplerSpec(times=default_times(steps), sample_shape=shape)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    w_0, w_1, w_2, w_3 = (int(word, 16) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    even, odd = np.array([[w_0], [w_2]], np.uint64), np.array([[w_1], [w_3]], np.uint64)
    philox4x32(even, odd, round_keys([low + (high << 32)]), np.empty((3, 2, 1), np.uint64))
    words = (even[0, 0], odd[0, 0], even[1, 0], odd[1, 0])
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def _by_hand(seed: int, step: int, element: int) -> np.float32:
    """The contract once more, one number at a time, with Python's integers and mathematics."""
    c, k = [element // 4, step, 0, 0], [seed % 2**32, seed // 2**32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    first = element % 4 // 2 * 2
    u_0, u_1 = ((c[first + i] + 0.5) / 2**32 for i in range(2))
    turn = math.cos if element % 2 == 0 else math.sin
    return np.float32(math.sqrt(-2 * math.log(u_0)) * turn(2 * math.pi * u_1))


@given(SEEDS, st.integers(0, 2**32 - 1), SHAPES)
def test_agrees_with_the_contract_written_another_way(seed: int, step: int, shape: tuple[int, ...]) -> None:
    noise = standard_normal(seed, step, shape)
    expected = np.array([_by_hand(seed, step, i) for i in range(noise.size)], np.float32)
    assert noise.dtype == np.float32
    assert noise.shape == shape
    # One unit in the last place of float32 is what two mathematics libraries may differ by.
    np.testing.assert_array_max_ulp(noise.ravel(), expected, maxulp=1)


@pytest.mark.parametrize(
    "seed, step, expected",
    GOLDEN,
)
def test_golden_values(seed: int, step: int, expected: list[float]) -> None:
    np.testing.assert_array_equal(standard_normal(seed, step, (6,)), np.array(expected, np.float32))


def test_golden_digest_of_a_batch() -> None:
    """3 x 2 x 3,072 numbers at once, rounded so that the last place does not matter."""
    noise = np.stack(draw_noise(spec((3, 32, 32)), [0, 1234, 2**64 - 1]))
    assert noise.shape == (2, 3, 3, 32, 32)
    np.testing.assert_allclose(noise.sum(axis=(2, 3, 4), dtype=np.float64), SUMS, rtol=0, atol=1e-3)


@given(st.lists(SEEDS, min_size=1, max_size=6), st.data())
def test_a_seeds_noise_depends_on_nothing_else(seeds: list[int], data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    order = data.draw(st.permutations(range(len(seeds))))
    together = draw_noise(spec(shape), seeds)
    shuffled = draw_noise(spec(shape), [seeds[i] for i in order])
    for step in range(2):
        np.testing.assert_array_equal(together[step][list(order)], shuffled[step])
        for i, seed in enumerate(seeds):
            np.testing.assert_array_equal(together[step][i], standard_normal(seed, step, shape))


def test_chunks_leave_no_seam() -> None:
    """A sample longer than a chunk starts like a shorter one."""
    long = standard_normal(7, 0, (200_003,))
    np.testing.assert_array_equal(long[:99], standard_normal(7, 0, (99,)))
    np.testing.assert_array_equal(long[-3:], [_by_hand(7, 0, i) for i in range(200_000, 200_003)])


def test_samples_that_fill_several_chunks_are_those_of_their_seeds() -> None:
    """Seventy samples of 301 blocks, two steps: chunks of whole samples, the last one short."""
    together = draw_noise(spec((3, 401, 1)), range(70))
    for step in range(2):
        for seed in (0, 1, 6, 7, 12, 13, 14, 41, 69):
            np.testing.assert_array_equal(together[step][seed], standard_normal(seed, step, (3, 401, 1)))


def test_more_steps_keep_the_first_noise() -> None:
    one, four = draw_noise(spec(steps=1), [5]), draw_noise(spec(steps=4), [5])
    assert (len(one), len(four)) == (1, 4)
    np.testing.assert_array_equal(one[0], four[0])


def test_is_standard_normal() -> None:
    """Moments and tails of a million numbers, within five standard errors; steps and seeds unrelated."""
    noise = np.stack([standard_normal(seed, step, (250_000,)) for seed in (1, 2) for step in (0, 1)])
    z = noise.astype(np.float64)
    assert abs(z.mean()) < 5 / 1000
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2) / 1000
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96) / 1000
    share = (np.abs(z) > 3).mean()
    assert abs(share - 0.0026998) < 5 * math.sqrt(0.0027) / 1000
    correlation = np.corrcoef(np.concatenate([z, np.roll(z[:1], 1, axis=1)]))
    assert np.abs(correlation - np.eye(5)).max() < 5 / 500


def test_numbers_are_finite_at_the_ends_of_u() -> None:
    """The smallest u is 2^-33, so the largest number is known."""
    assert math.isclose(math.sqrt(-2 * math.log(0.5 / 2**32)), 6.7637, rel_tol=1e-4)
    assert np.isfinite(standard_normal(0, 0, (100_000,))).all()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "3", None, True, np.float32(2), np.bool_(True), [1]])
def test_refuses_what_is_no_seed(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"seed is .*, expected a whole number with 0 <= seed < 2\*\*64"):
        check_seed(seed)
    with pytest.raises(ConfigError, match="seed is"):
        draw_noise(spec(), [0, seed])  # type: ignore[list-item]


def test_takes_numpy_integers() -> None:
    np.testing.assert_array_equal(
        draw_noise(spec(), np.array([3, 2**64 - 1], np.uint64))[1],  # type: ignore[arg-type]
        draw_noise(spec(), [3, 2**64 - 1])[1],
    )
    assert type(check_seed(np.int64(3))) is int


def test_refuses_no_seeds_and_empty_or_endless_shapes() -> None:
    with pytest.raises(ConfigError, match="seeds is empty"):
        draw_noise(spec(), [])
    with pytest.raises(ConfigError, match=r"shape is \(3, 0\), expected axes of 1 or more"):
        standard_normal(0, 0, (3, 0))
    with pytest.raises(ConfigError, match="at most 2\\*\\*34 in one sample"):
        standard_normal(0, 0, (2**35,))
    with pytest.raises(ConfigError, match="step is -1, expected 0 <= step"):
        standard_normal(0, -1, (3,))
