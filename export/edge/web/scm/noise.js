/**
 * The noise contract `scm-noise-v1`: how a seed becomes the noise of an image. docs/noise.md of scm-sdk defines it.
 *
 * Every number is the one that the contract defines, whatever the engine's Math.log, Math.cos and Math.sin round to.
 * They are taken at first; where an error of `DOUBT` could change the float32 number (about one in a million), it is
 * computed again in integer arithmetic.
 */
import { ScmError } from "./errors.js";

const ROUNDS = 10;
const DOUBT = 2 ** -46;
/** Fraction bits of the integer arithmetic. */
const BITS = 192n;
const ONE = 1n << BITS;

/**
 * Return a seed as a BigInt.
 * @param {unknown} seed Number, BigInt or decimal string, 0 <= seed < 2^64.
 * @returns {bigint}
 */
export function checkSeed(seed) {
  let value = -1n;
  if (typeof seed === "bigint") value = seed;
  else if (typeof seed === "number" && Number.isSafeInteger(seed)) value = BigInt(seed);
  else if (typeof seed === "string" && /^\d{1,20}$/.test(seed)) value = BigInt(seed);
  if (value >= 0n && value < 1n << 64n) return value;
  const shown = typeof seed === "string" ? JSON.stringify(seed) : String(seed);
  throw new ScmError(
    "bad-argument",
    `seed is ${shown}, expected a whole number with 0 <= seed < 2^64. Give one from 2^53 on as a BigInt or a string.`,
  );
}

/**
 * Return the standard normal noise of one sample.
 * @param {number | bigint | string} seed The sample's seed, 0 <= seed < 2^64.
 * @param {number} step Which noise tensor of the sampler, 0 for the first network call.
 * @param {number} size Numbers in one sample: the product of its shape.
 * @returns {Float32Array}
 */
export function standardNormal(seed, step, size) {
  const key = checkSeed(seed);
  if (!Number.isInteger(step) || step < 0 || step >= 2 ** 32) {
    throw new ScmError("bad-argument", `step is ${step}, expected 0 <= step < 2^32, the index of the noise tensor.`);
  }
  if (!Number.isInteger(size) || size < 1 || size > 2 ** 34) {
    throw new ScmError("bad-argument", `size is ${size}, expected 1 to 2^34 numbers in one sample.`);
  }
  const out = new Float32Array(size);
  const words = new Uint32Array(4);
  const pair = new Float32Array(2);
  const low = Number(key & 0xffffffffn);
  const high = Number(key >> 32n);
  for (let start = 0, block = 0; start < size; start += 4, block += 1) {
    words[0] = block;
    words[1] = step;
    words[2] = words[3] = 0;
    philox4x32(words, low, high);
    for (let i = 0; i < 4 && start + i < size; i += 2) {
      boxMuller(words[i], words[i + 1], pair);
      out[start + i] = pair[0];
      if (start + i + 1 < size) out[start + i + 1] = pair[1];
    }
  }
  return out;
}

/**
 * Encrypt a counter with Philox4x32-10, in place.
 * @param {Uint32Array} words The counter's four words.
 * @param {number} key0 Low word of the key.
 * @param {number} key1 High word of the key.
 */
export function philox4x32(words, key0, key1) {
  let [a, b, c, d] = words;
  for (let round = 0; round < ROUNDS; round += 1) {
    const highA = multiplyHigh(0xd2511f53, a);
    const lowA = Math.imul(0xd2511f53, a);
    const highC = multiplyHigh(0xcd9e8d57, c);
    const lowC = Math.imul(0xcd9e8d57, c);
    a = (highC ^ b ^ key0) >>> 0;
    c = (highA ^ d ^ key1) >>> 0;
    b = lowC >>> 0;
    d = lowA >>> 0;
    key0 = (key0 + 0x9e3779b9) >>> 0;
    key1 = (key1 + 0xbb67ae85) >>> 0;
  }
  words[0] = a;
  words[1] = b;
  words[2] = c;
  words[3] = d;
}

/**
 * Return the high 32 bits of the product of two 32-bit words.
 * @param {number} x
 * @param {number} y
 * @returns {number}
 */
function multiplyHigh(x, y) {
  const [xLow, xHigh, yLow, yHigh] = [x & 0xffff, x >>> 16, y & 0xffff, y >>> 16];
  const middle = xHigh * yLow + ((xLow * yLow) >>> 16); // below 2^32, as each sum here
  const other = xLow * yHigh + (middle % 65536);
  return (xHigh * yHigh + Math.floor(middle / 65536) + Math.floor(other / 65536)) >>> 0;
}

/**
 * Turn two 32-bit words into two normal numbers.
 * @param {number} word0
 * @param {number} word1
 * @param {Float32Array} out Takes the two numbers.
 */
export function boxMuller(word0, word1, out) {
  const radius = Math.sqrt(-2 * Math.log((word0 + 0.5) * 2 ** -32));
  const angle = (word1 + 0.5) * (2 * Math.PI * 2 ** -32);
  const x = radius * Math.cos(angle);
  const y = radius * Math.sin(angle);
  out[0] = x;
  out[1] = y;
  if (isDoubtful(x) || isDoubtful(y)) boxMullerExact(word0, word1, out);
}

/**
 * Return whether a relative error of `DOUBT` could change how a number rounds to float32.
 * @param {number} x
 * @returns {boolean}
 */
function isDoubtful(x) {
  return Math.fround(x * (1 - DOUBT)) !== Math.fround(x * (1 + DOUBT));
}

/**
 * `boxMuller` with logarithm, cosine and sine rounded correctly to float64, as the contract defines them.
 * @param {number} word0
 * @param {number} word1
 * @param {Float32Array} out
 */
export function boxMullerExact(word0, word1, out) {
  const radius = Math.sqrt(-2 * toNumber(logarithm((BigInt(word0) << 1n) + 1n)));
  const angle = fromNumber((word1 + 0.5) * (2 * Math.PI * 2 ** -32));
  out[0] = radius * toNumber(series(angle, 0n));
  out[1] = radius * toNumber(series(angle, 1n));
}

/**
 * Return ln(odd / 2^33) with `BITS` fraction bits.
 * @param {bigint} odd Below 2^33.
 * @returns {bigint}
 */
function logarithm(odd) {
  let mantissa = (odd << BITS) >> 33n;
  let exponent = 0n;
  while (3n * mantissa < 2n * ONE) {
    mantissa <<= 1n;
    exponent -= 1n;
  }
  // The shift right above drops no bit, and ln 2 = ln((1 + 1/3) / (1 - 1/3)).
  return logOfRatio(mantissa - ONE, mantissa + ONE) + exponent * LN2;
}

/**
 * Return ln((1 + z) / (1 - z)) of z = numerator / denominator, |z| <= 1/3: 2 (z + z^3 / 3 + z^5 / 5 + ...).
 * @param {bigint} numerator
 * @param {bigint} denominator
 * @returns {bigint}
 */
function logOfRatio(numerator, denominator) {
  const z = (numerator << BITS) / denominator;
  const square = (z * z) >> BITS;
  let [sum, power] = [0n, z];
  for (let n = 1n; power !== 0n && power !== -1n; n += 2n) {
    sum += power / n;
    power = (power * square) >> BITS;
  }
  return 2n * sum;
}

const LN2 = logOfRatio(1n, 3n);

/**
 * Return the cosine (start 0) or the sine (start 1) of an angle: x^s / s! - x^(s+2) / (s+2)! + ...
 * @param {bigint} angle Radians, 0 to 2 pi, with `BITS` fraction bits.
 * @param {bigint} start
 * @returns {bigint}
 */
function series(angle, start) {
  const square = (angle * angle) >> BITS;
  let [sum, term] = [0n, start === 0n ? ONE : angle];
  for (let n = start; term !== 0n; n += 2n) {
    sum += term;
    const next = ((term < 0n ? -term : term) * square >> BITS) / ((n + 1n) * (n + 2n));
    term = term < 0n ? next : -next;
  }
  return sum;
}

/**
 * Return the float64 number that is nearest to a number with `BITS` fraction bits; BigInts round to nearest even.
 * @param {bigint} value
 * @returns {number}
 */
function toNumber(value) {
  return Number(value) * 2 ** -Number(BITS);
}

/**
 * Return a float64 number of at least 2^-100, exactly, with `BITS` fraction bits.
 * @param {number} value
 * @returns {bigint}
 */
function fromNumber(value) {
  return BigInt(value * 2 ** 156) << (BITS - 156n);
}
