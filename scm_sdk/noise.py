"""The noise contract ``scm-noise-v1``: how a seed becomes the noise of an image, for ever.

Noise is a pure function of (seed, step, element). Nothing else enters: not the batch, not the
position in it, no backend, no device, no state. Another language can repeat it from this page:

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

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .spec import SamplerSpec

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_CHUNK_BLOCKS = 1 << 13
"""Blocks worked on at a time: the temporaries (64 KiB each) stay in the processor's cache."""

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
    return _draw([check_seed(seed)], step, shape).reshape(shape)


def draw_noise(spec: SamplerSpec, seeds: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return what the noise inputs of a sampler need, ``noise_0`` first.

    Args:
        spec: The sampler.
        seeds: One seed for each sample, 0 <= seed < 2**64. Equal seeds give equal noise.

    Returns:
        One array for each step of the sampler, (B, *spec.sample_shape), float32.

    Raises:
        ConfigError: If there is no seed or one is out of range.
    """
    if len(seeds) == 0:
        raise ConfigError("seeds is empty, expected one seed for each image. Give at least one.")
    checked = [check_seed(seed) for seed in seeds]
    return [_draw(checked, step, spec.sample_shape) for step in range(spec.num_inference_steps)]


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


def philox4x32(counter: Sequence[Any], key: Sequence[Any]) -> tuple[_Words, _Words, _Words, _Words]:
    """Encrypt counters with Philox4x32-10.

    Args:
        counter: Four words, each a uint64 array or number below 2**32; they broadcast.
        key: Two words of the same kind.

    Returns:
        Four words, uint64 arrays with values below 2**32.

    Source: Random123 1.14, ``philox.h``; its known answers are in the tests.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for i in range(_ROUNDS):
        if i:
            k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW32, (k1 + _KEY_STEPS[1]) & _LOW32
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> _SHIFT32) ^ c1 ^ k0, p1 & _LOW32
        c2, c3 = (p0 >> _SHIFT32) ^ c3 ^ k1, p0 & _LOW32
    return c0, c1, c2, c3


def _draw(seeds: Sequence[int], step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the noise of many samples, (len(seeds), *shape)."""
    if not 0 <= step < 1 << 32:
        raise ConfigError(f"step is {step}, expected 0 <= step < 2**32, the index of the noise tensor.")
    if any(axis < 1 for axis in shape):
        raise ConfigError(f"shape is {shape}, expected axes of 1 or more, those of one sample.")
    size = int(np.prod(shape, dtype=object))
    blocks = -(-size // 4)
    if blocks > 1 << 32:
        raise ConfigError(f"shape {shape} holds {size} numbers, expected at most 2**34 in one sample.")
    low = np.array([seed & 0xFFFFFFFF for seed in seeds], np.uint64)
    high = np.array([seed >> 32 for seed in seeds], np.uint64)
    out = np.empty((len(seeds) * blocks, 4), np.float32)
    # One flat run over (sample, block) pairs is fast for many small samples and for few large ones.
    for start in range(0, len(out), _CHUNK_BLOCKS):
        pair = np.arange(start, min(start + _CHUNK_BLOCKS, len(out)), dtype=np.int64)
        sample, block = np.divmod(pair, blocks)
        words = philox4x32((block, np.uint64(step), np.uint64(0), np.uint64(0)), (low[sample], high[sample]))
        for i in (0, 2):
            u_0, u_1 = ((word.astype(np.float64) + 0.5) / 2.0**32 for word in words[i : i + 2])
            radius, angle = np.sqrt(-2.0 * np.log(u_0)), (2.0 * np.pi) * u_1
            out[pair[0] : pair[-1] + 1, i] = radius * np.cos(angle)
            out[pair[0] : pair[-1] + 1, i + 1] = radius * np.sin(angle)
    flat = out.reshape(len(seeds), blocks * 4)[:, :size]
    return np.ascontiguousarray(flat).reshape(len(seeds), *shape)
