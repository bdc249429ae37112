/** Differences of samples from recorded ones, and the gates of scm-sdk: the bundle's own bounds, in its own units. */

/** @typedef {import("../scm.js").Difference} Difference */

/**
 * Measure how far samples are from recorded ones, in float64.
 * @param {Float32Array} candidate (N, ...shape), data units.
 * @param {Float32Array} golden The same.
 * @param {number} count N.
 * @param {number} sigmaData Standard deviation of the training data, data units: the unit of differences.
 * @param {readonly [number, number]} valueRange The peak of the PSNR is its width.
 * @returns {Difference}
 */
export function difference(candidate, golden, count, sigmaData, valueRange) {
  const size = golden.length / count;
  const width = valueRange[1] - valueRange[0];
  const squares = new Float64Array(count);
  let [largest, total, worst] = [0, 0, 0];
  let finite = candidate.length === golden.length;
  for (let i = 0; i < golden.length; i += 1) {
    const delta = Math.abs(candidate[i] - golden[i]);
    if (!Number.isFinite(delta)) finite = false;
    if (delta > largest) [largest, worst] = [delta, Math.floor(i / size)];
    squares[Math.floor(i / size)] += delta * delta;
    total += delta;
  }
  const psnr = (/** @type {number} */ square) => (square > 0 ? 10 * Math.log10((width * width) / square) : Infinity);
  const bySample = Array.from(squares, (sum) => psnr(sum / size));
  return {
    finite,
    maxAbs: finite ? largest / sigmaData : NaN,
    meanAbs: finite ? total / golden.length / sigmaData : NaN,
    psnrDb: finite ? psnr(squares.reduce((a, b) => a + b, 0) / golden.length) : NaN,
    worstPsnrDb: finite ? Math.min(...bySample) : NaN,
    psnrBySample: bySample,
    worstIndex: worst,
  };
}

/**
 * Return whether a difference meets the gate of its precision.
 * @param {Difference} found
 * @param {import("./types.js").Bound} bound
 * @returns {boolean}
 */
export function passes(found, bound) {
  if (!found.finite) return false;
  if (bound.gate === "max_abs") return found.maxAbs <= bound.threshold;
  const ordered = [...found.psnrBySample].sort((a, b) => a - b);
  return ordered[bound.rank] >= bound.threshold;
}
