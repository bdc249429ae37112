"""The noise contract ``scm-noise-v1``: how a seed becomes the noise of an image.

Noise is a pure function of (seed, step, element). Nothing else enters: not the batch, not the
position in it, no backend, no device, no state. ``docs/noise.md`` is the normative text, with test vectors, for other
languages; ``scm.js`` of ``scm-export web`` follows it. In short:

1. **Counter.** A sample of n numbers has ceil(n / 4) blocks. Block b of step s is Philox4x32-10
   of counter words (b, s, 0, 0) under key words (seed mod 2^32, seed div 2^32); it gives four
   32-bit words x_0 .. x_3.
2. **Uniform.** u_i = (x_i + 0.5) / 2^32, exact in float64, in (0, 1).
3. **Normal.** Box-Muller in float64: words 0 and 1 give
   z_0 = r cos(2 pi u_1) and z_1 = r sin(2 pi u_1) with r = sqrt(-2 ln u_0);
   words 2 and 3 give z_2 and z_3 in the same way. Each is rounded to float32.
4. **Order.** z_i of block b is element 4 b + i of the sample in C order; what the last block has
   too much is dropped.

Steps 1 and 2 are integer arithmetic and the same everywhere. Step 3 relies on log, cos and sin to
about one unit in the last place of float64; float32 has 29 bits less, so two good mathematics
libraries can differ, by one unit in the last place of float32, in about one number of 10^8.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox, Random123).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .spec import SamplerSpec

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW32 = np.array(0xFFFFFFFF, np.uint64)  # arrays: numpy converts a number again in each call
_SHIFT32 = np.array(32, np.uint64)
_ROUND_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * np.array(_KEY_STEPS)[:, None]
_CHUNK_BLOCKS = 1 << 12
"""Blocks worked on at a time: the temporaries (64 KiB each, five of them) stay in the processor's cache."""
_FLOAT_BITS = np.array(0x4330000000000000, np.uint64)
"""The bits of 2.0**52: a 32-bit word put below them is the float64 2.0**52 + word, without a conversion."""

_Words = NDArray[np.uint64]


def standard_normal(seed: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the standard normal noise of one sample.

    Args:
        seed: The sample's seed, 0 <= seed < 2**64.
        step: Which noise tensor of the sampler, 0 for the first network call.
        shape: Shape of one sample, without a batch axis.

    Returns:
        Noise, ``shape``, float32, mean 0 and variance 1; absolute values are below 6.77.

    Raises:
        ConfigError: If the seed, the step or the shape is out of range.

    Source: ``scm-noise-v1``, the text at the top of this file.
    """
    return _draw([check_seed(seed)], [step], shape).reshape(shape)


def draw_noise(spec: SamplerSpec, seeds: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return what the noise inputs of a sampler need, ``noise_0`` first.

    Args:
        spec: The sampler.
        seeds: One seed for each sample, 0 <= seed < 2**64. Equal seeds give equal noise.

    Returns:
        One array for each of ``spec.noise_inputs``, ``(B, *spec.sample_shape)``, float32.

    Raises:
        ConfigError: If there is no seed or one is out of range.
    """
    if len(seeds) == 0:
        raise ConfigError("seeds is empty, expected one seed for each image. Give at least one.")
    checked = [check_seed(seed) for seed in seeds]
    return list(_draw(checked, range(len(spec.noise_inputs)), spec.sample_shape))


def check_seed(seed: object) -> int:
    """Return a seed as a plain int, or refuse it.

    Raises:
        ConfigError: If it is no integer or not in 0 <= seed < 2**64.
    """
    value: int | None = None
    if not isinstance(seed, bool | np.bool_):
        try:
            value = operator.index(seed)  # type: ignore[arg-type]
        except TypeError:
            value = None
    if value is None or not 0 <= value < 1 << 64:
        raise ConfigError(f"seed is {seed!r}, expected a whole number with 0 <= seed < 2**64. Choose one in range.")
    return value


def philox4x32(even: _Words, odd: _Words, keys: Sequence[tuple[_Words, _Words]], spare: _Words) -> None:
    """Encrypt counters with Philox4x32-10, in place.

    Words 0 and 2 are in one array and 1 and 3 in another, both in the other order after each round, and no array is
    made twice: what counts for a small sample is the number of calls, for a large one the cache.

    Args:
        even: Words 0 and 2 of the counters, (2, ...), below 2**32; the encrypted words afterwards.
        odd: Words 1 and 3, (2, ...).
        keys: The key words of every round: ``round_keys``; they broadcast.
        spare: Room to work in, (3, 2, ...); of no use afterwards.

    Source: Random123 1.14, ``philox.h``; its known answers are in the tests.
    """
    product, factors, others = spare
    factors[0], factors[1] = _MULTIPLIERS  # full arrays: numpy multiplies those twice as fast as by a number
    others[0], others[1] = factors[1], factors[0]
    (even_0, even_1), (odd_0, odd_1) = even, odd
    for i, (key_0, key_1) in enumerate(keys):
        if i % 2 == 0:
            key_0, key_1 = key_1, key_0
        np.multiply(even, factors, out=product)
        np.right_shift(product, _SHIFT32, out=even)
        np.bitwise_xor(even_0, odd_1, out=even_0)
        np.bitwise_xor(even_1, odd_0, out=even_1)
        np.bitwise_xor(even_0, key_0, out=even_0)
        np.bitwise_xor(even_1, key_1, out=even_1)
        np.bitwise_and(product, _LOW32, out=odd)
        factors, others = others, factors


def round_keys(seeds: Sequence[int]) -> list[tuple[_Words, _Words]]:
    """Return the two key words of every round, each (len(seeds), 1), or () for one seed: numpy is fastest with that."""
    words = np.array([[seed & 0xFFFFFFFF for seed in seeds], [seed >> 32 for seed in seeds]], np.uint64)
    keys = (words + _ROUND_STEPS) & _LOW32
    if len(seeds) == 1:
        return [(key[0, 0, ...], key[1, 0, ...]) for key in keys]
    return [(first, second) for first, second in keys[..., None]]


def _draw(seeds: Sequence[int], steps: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the noise of many samples, (len(steps), len(seeds), *shape)."""
    for step in steps:
        if not 0 <= step < 1 << 32:
            raise ConfigError(f"step is {step}, expected 0 <= step < 2**32, the index of the noise tensor.")
    if any(axis < 1 for axis in shape):
        raise ConfigError(f"shape is {shape}, expected axes of 1 or more, those of one sample.")
    size = math.prod(shape)
    blocks = -(-size // 4)
    if blocks > 1 << 32:
        raise ConfigError(f"shape {shape} holds {size} numbers, expected at most 2**34 in one sample.")
    columns = min(blocks, _CHUNK_BLOCKS)
    at_once = max(1, _CHUNK_BLOCKS // (columns * len(steps)))  # whole small samples, or pieces of a large one
    out = np.empty((len(steps), len(seeds), blocks, 4), np.float32)
    for start in range(0, len(seeds), at_once):
        mine = slice(start, start + at_once)
        keys = round_keys(seeds[mine])
        for column in range(0, blocks, columns):
            _fill(out[:, mine, column : column + columns], column, steps, keys)
    flat = out.reshape(len(steps), len(seeds), blocks * 4)[:, :, :size]
    return np.ascontiguousarray(flat).reshape(len(steps), len(seeds), *shape)


def _fill(out: NDArray[np.float32], first_block: int, steps: Sequence[int], keys: list[tuple[_Words, _Words]]) -> None:
    """Write the numbers of some blocks of some samples, (steps, seeds, blocks, 4): ``philox4x32``, then Box-Muller."""
    words = np.empty((5, 2, *out.shape[:3]), np.uint64)
    even, odd, spare = words[0], words[1], words[2:]
    even[0] = np.arange(first_block, first_block + out.shape[2], dtype=np.uint64)
    even[1], odd[0], odd[1] = 0, np.array(steps, np.uint64)[:, None, None], 0
    philox4x32(even, odd, keys, spare)
    radius, angle = (np.bitwise_or(part, _FLOAT_BITS, out=part).view(np.float64) for part in (even, odd))
    np.subtract(radius, 2.0**52 - 0.5, out=radius)  # word + 0.5, exactly
    np.subtract(angle, 2.0**52 - 0.5, out=angle)
    np.multiply(radius, 2.0**-32, out=radius)
    np.log(radius, out=radius)
    np.multiply(radius, -2.0, out=radius)
    np.sqrt(radius, out=radius)
    np.multiply(angle, 2.0 * np.pi * 2.0**-32, out=angle)  # a power of two changes no digit
    turned = spare[0].view(np.float64)
    for turn, first in ((np.cos, 0), (np.sin, 1)):
        turn(angle, out=turned)
        np.multiply(turned, radius, out=turned)
        out[..., first], out[..., first + 2] = turned
