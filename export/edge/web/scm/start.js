/** Image-to-image: what an image adds to the first noise, as `docs/noise.md` says it, in float32. */
import { ScmError } from "./errors.js";

/** @typedef {import("../scm.js").StartImage} StartImage */
/** @typedef {import("./types.js").SamplerSpec} SamplerSpec */

/** Times that differ by less are one, radians. */
const SAME_TIME = 1e-5;

/**
 * Return the number of steps of the sampler that starts at a time; `steps` without an image.
 * @param {{ image?: unknown, startTime?: number, steps?: number }} request
 * @param {readonly { steps: number, time: number }[]} starts
 * @returns {number | undefined}
 */
export function startSteps({ image, startTime, steps }, starts) {
  if (image === undefined && startTime === undefined) return steps;
  if (image === undefined) {
    throw new ScmError("bad-argument", `startTime is ${startTime} without an image, expected both or neither.`);
  }
  const known = starts.map((each) => `${each.time} (${each.steps} steps)`).join(", ");
  if (!known) {
    throw new ScmError(
      "unsupported",
      "an image is given, but no sampler of this site starts from an image. Add one to the bundle: scm-export onnx or " +
        "import with --start-time, of a latent model with --encoder.",
    );
  }
  const found = starts.filter((each) => Math.abs(each.time - Number(startTime)) <= SAME_TIME);
  if (typeof startTime !== "number" || !found.length) {
    throw new ScmError("bad-argument", `startTime is ${startTime}, expected one of ${known}.`);
  }
  const chosen = found.find((each) => steps === undefined || each.steps === steps);
  if (!chosen) {
    const there = found.map((each) => each.steps).join(" or ");
    throw new ScmError("bad-argument", `steps is ${steps} with startTime ${startTime}, expected ${there}.`);
  }
  return chosen.steps;
}

/**
 * Return an image in data units, (C, H, W).
 * @param {StartImage} image
 * @param {readonly number[]} shape C, H, W.
 * @param {readonly [number, number]} valueRange
 * @returns {Float32Array<ArrayBuffer>}
 */
export function toData(image, [channels, height, width], [low, high]) {
  const size = height * width;
  const { data } = image ?? {};
  if (!(data instanceof Uint8ClampedArray || data instanceof Uint8Array) || data.length !== 4 * image.width * image.height) {
    throw new ScmError("bad-argument", "image is no ImageData, expected { width, height, data } with 8-bit RGBA pixels.");
  }
  if (image.width !== width || image.height !== height) {
    throw new ScmError(
      "bad-argument",
      `image is ${image.width}x${image.height}, expected ${width}x${height}, the size of the model. Resize it first.`,
    );
  }
  const [range, lowest] = [Math.fround(high - low), Math.fround(low)];
  const levels = Float32Array.from({ length: 256 }, (_, level) =>
    Math.fround(Math.fround(Math.fround(level / 255) * range) + lowest),
  );
  const found = new Float32Array(channels * size);
  for (let i = 0; i < size; i += 1) {
    const [red, green, blue] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (data[4 * i + 3] !== 255) {
      throw new ScmError("bad-argument", "image has transparent pixels, expected opaque ones. Draw it on a background.");
    }
    if (channels === 1 && (red !== green || red !== blue)) {
      throw new ScmError("bad-argument", "image has colors, expected a gray one: the model has one channel.");
    }
    found[i] = levels[red];
    if (channels === 3) [found[size + i], found[2 * size + i]] = [levels[green], levels[blue]];
  }
  return found;
}

/**
 * Scale data to what is added to the first noise, in place.
 * @template {Float32Array} T
 * @param {T} data Of a model of latents the latents.
 * @param {SamplerSpec} spec
 * @returns {T}
 */
export function toOffset(data, { times: [time], sigma_data: sigma }) {
  const factor = Math.fround(Math.cos(time) / (Math.sin(time) * sigma));
  for (let i = 0; i < data.length; i += 1) data[i] *= factor;
  return data;
}
