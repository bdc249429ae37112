"""``scm-noise-v1`` in JavaScript and on its page: the bits of NumPy, and where NumPy may differ, the contract's."""

import hashlib
import re
from pathlib import Path

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from helpers.node import run_node
from scm_sdk.inference.request import draw_label
from scm_sdk.noise import philox4x32, round_keys, standard_normal

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "noise.md").read_text(encoding="utf-8")
WORD = "[0-9a-f]{8}"
VECTORS = [
    (int(seed), int(step), words.split(), bits.split(), digest)
    for seed, step, words, bits, digest in re.findall(
        rf"^\| (\d+) \| (\d+) \| ((?:{WORD} ?){{4}}) \| ((?:{WORD} ?){{4}}) \| ([0-9a-f]{{64}}) \|$", PAGE, re.MULTILINE
    )
]
LABELS = [tuple(map(int, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)]
DRAW = """
import { standardNormal } from "./scm/noise.js";
const hex = (array) => Buffer.from(array.buffer).toString("hex");
done(args[0].map(([seed, step, size]) => hex(standardNormal(seed, step, size))));
"""


def in_javascript(wanted: list[tuple[int, int, int]]) -> list[NDArray[np.float32]]:
    """Draw noise of seed, step and size in Node."""
    found = run_node(DRAW, [(str(seed), step, size) for seed, step, size in wanted])
    return [np.frombuffer(bytes.fromhex(text), "<f4") for text in found]


def words_of(seed: int, step: int, block: int) -> list[int]:
    even, odd = np.array([[block], [0]], np.uint64), np.array([[step], [0]], np.uint64)
    philox4x32(even, odd, round_keys([seed]), np.empty((3, 2, 1), np.uint64))
    return [int(array[i, 0]) for i in range(2) for array in (even, odd)]


def contract(seed: int, step: int, element: int, *, error: float = 0.0) -> np.float32:
    """Step 2 of the page in arithmetic of 200 bits; ``error`` moves the result, relatively."""
    pair = element % 4 // 2 * 2
    x_0, x_1 = words_of(seed, step, element // 4)[pair : pair + 2]
    with mpmath.workprec(200):
        angle = mpmath.mpf(2 * np.pi * ((x_1 + 0.5) / 2**32))
        logarithm = float(mpmath.log(mpmath.mpf(x_0 + 0.5) / 2**32))
        turned = float(mpmath.cos(angle) if element % 2 == 0 else mpmath.sin(angle))
    return np.float32(np.sqrt(-2.0 * logarithm) * turned * (1 + error))


def test_javascript_gives_the_bits_of_numpy() -> None:
    """A million numbers of many seeds, steps and sizes."""
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**53, 2**64 - 1, *map(int, rng.integers(0, 2**63, 60))]
    steps = [0, 1, 2**31, 2**32 - 1]
    sizes = [1, 2, 3, 4, 5, 768, 12_288, 16_385, 65_536]
    wanted = [(seed, steps[i % 4], sizes[i % 9]) for i, seed in enumerate(seeds)]
    for (seed, step, size), found in zip(wanted, in_javascript(wanted), strict=True):
        expected = standard_normal(seed, step, (size,))
        # NumPy may be one unit off, in about one number of 10^8; then the page decides.
        for element in np.flatnonzero(found.view(np.uint32) != expected.view(np.uint32)):
            assert found[element] == contract(seed, step, int(element)), (seed, step, element)
        np.testing.assert_array_max_ulp(found, expected, maxulp=1)


def test_the_exact_path_gives_what_the_contract_says() -> None:
    """Words at the ends of their range, at multiples of a quarter turn and at random: integers against 200 bits."""
    script = """
    import { boxMuller, boxMullerExact } from "./scm/noise.js";
    const [fast, exact] = [new Float32Array(2), new Float32Array(2)];
    done(args[0].map(([a, b]) => {
      boxMuller(a, b, fast);
      boxMullerExact(a, b, exact);
      return [...fast, ...exact];
    }));
    """
    ends = [0, 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1]
    rng = np.random.default_rng(1)
    pairs = [(a, b) for a in ends for b in ends] + rng.integers(0, 2**32, (2000, 2)).tolist()
    for (x_0, x_1), found in zip(pairs, run_node(script, pairs), strict=True):
        with mpmath.workprec(200):
            angle = mpmath.mpf(2 * np.pi * ((x_1 + 0.5) / 2**32))
            radius = np.sqrt(-2.0 * float(mpmath.log(mpmath.mpf(x_0 + 0.5) / 2**32)))
            expected = [np.float32(radius * float(turn(angle))) for turn in (mpmath.cos, mpmath.sin)]
        assert [np.float32(x) for x in found] == expected * 2, (x_0, x_1)


def test_an_engine_with_other_mathematics_gives_the_same_bits() -> None:
    """Logarithm, cosine and sine off by a relative 2**-47, one way or the other: 16 million numbers."""
    script = """
    const [log, cos, sin] = [Math.log, Math.cos, Math.sin];
    let calls = 0;
    const moved = (f) => (x) => f(x) * (1 + ((calls = (calls * 5 + 3) % 1024) < 512 ? args[0] : -args[0]));
    Object.assign(Math, { log: moved(log), cos: moved(cos), sin: moved(sin) });
    const { standardNormal } = await import("./scm/noise.js");
    const { createHash } = await import("node:crypto");
    done(createHash("sha256").update(standardNormal(3, 0, 1 << 24)).digest("hex"));
    """
    assert run_node(script, 2.0**-47) == run_node(script, 0)


def test_the_page_has_its_vectors() -> None:
    assert len(VECTORS) == 7 and len(LABELS) == 5
    assert {seed for seed, *_ in VECTORS} >= {0, 2**32, 2**53 + 1, 2**64 - 1}


@pytest.mark.parametrize("seed, step, words, bits, digest", VECTORS)
def test_vectors_in_python(seed: int, step: int, words: list[str], bits: list[str], digest: str) -> None:
    noise = standard_normal(seed, step, (3, 32, 32))
    assert [f"{word:08x}" for word in words_of(seed, step, 0)] == words
    assert [f"{word:08x}" for word in noise.ravel()[:4].view(np.uint32)] == bits
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == digest


def test_vectors_are_the_contracts_and_safe_from_rounding() -> None:
    """A relative error of 2**-48, of 32 units in the last place of float64, changes none of the numbers shown."""
    for seed, step, _, bits, _ in VECTORS:
        for element, expected in enumerate(bits):
            for error in (-(2.0**-48), 0.0, 2.0**-48):
                assert f"{contract(seed, step, element, error=error).view(np.uint32):08x}" == expected


def test_vectors_in_javascript() -> None:
    found = in_javascript([(seed, step, 3072) for seed, step, *_ in VECTORS])
    for (_, _, _, bits, digest), noise in zip(VECTORS, found, strict=True):
        assert [f"{word:08x}" for word in noise[:4].view(np.uint32)] == bits
        assert hashlib.sha256(noise.tobytes()).hexdigest() == digest


def test_labels_of_the_page() -> None:
    for seed, *expected in LABELS:
        assert [draw_label(seed, n) for n in (2, 11, 1000)] == expected


def test_javascript_refuses_what_is_no_seed() -> None:
    script = """
    import { checkSeed } from "./scm/noise.js";
    const tried = [-1, 1.5, 2 ** 53, NaN, "", "x", "-1", "18446744073709551616", null, undefined, true, 1n << 64n, [1]];
    done(tried.map((seed) => {
      try { checkSeed(seed); return "taken"; } catch (error) { return `${error.name} ${error.code}: ${error.message}`; }
    }));
    """
    for text in run_node(script):
        assert re.match(r"ScmError bad-argument: seed is .*, expected a whole number with 0 <= seed < 2\^64", text)
