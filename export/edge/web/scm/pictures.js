/** Samples as pictures: 8-bit levels as scm-sdk computes them, grids, and PNG files that name what made them. */
import { ScmError } from "./errors.js";

/** @typedef {import("../scm.js").Samples} Samples */
/** @typedef {{ width: number, height: number, channels: number, data: Uint8Array }} Picture */

/**
 * Return one sample as a picture. A value x becomes (x - low) / (high - low) * 255, rounded half to even and clipped.
 * @param {Samples} samples
 * @param {number} index
 * @returns {Picture} `data` is (height, width, channels).
 */
export function toPicture(samples, index) {
  const [count, channels, height, width] = samples.shape;
  if (samples.shape.length !== 4 || (channels !== 1 && channels !== 3)) {
    throw new ScmError(
      "bad-argument",
      `samples have shape [${samples.shape}], expected [N, C, H, W] with C = 1 (gray) or 3 (RGB). Read samples.images.`,
    );
  }
  if (!Number.isInteger(index) || index < 0 || index >= count) {
    throw new ScmError("bad-argument", `index is ${index}, expected 0 to ${count - 1}, the number of an image.`);
  }
  const [low, high] = samples.valueRange;
  const [scale, pixels] = [255 / (high - low), height * width];
  const data = new Uint8Array(pixels * channels);
  for (let channel = 0; channel < channels; channel += 1) {
    const start = (index * channels + channel) * pixels;
    for (let i = 0; i < pixels; i += 1) data[i * channels + channel] = level((samples.images[start + i] - low) * scale);
  }
  return { width, height, channels, data };
}

/**
 * @param {number} value
 * @returns {number}
 */
function level(value) {
  if (!Number.isFinite(value)) {
    throw new ScmError("runtime", "a sample holds NaN or infinity, expected finite numbers. Try the other device or precision.");
  }
  const clipped = Math.min(255, Math.max(0, value));
  const floor = Math.floor(clipped);
  const rest = clipped - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

/**
 * Lay pictures side by side, row by row, without gaps; places left over are white.
 * @param {Picture[]} pictures All of one size.
 * @param {number} columns
 * @param {number} scale Each pixel becomes a square of this many pixels a side.
 * @returns {Picture}
 */
export function makeGrid(pictures, columns, scale) {
  const { width, height, channels } = pictures[0];
  const across = Math.min(columns, pictures.length);
  const sheet = {
    width: across * width * scale,
    height: Math.ceil(pictures.length / columns) * height * scale,
    channels,
    data: new Uint8Array(0),
  };
  sheet.data = new Uint8Array(sheet.width * sheet.height * channels).fill(255);
  pictures.forEach((picture, index) => {
    const [left, top] = [(index % columns) * width * scale, Math.floor(index / columns) * height * scale];
    for (let y = 0; y < height * scale; y += 1) {
      for (let x = 0; x < width * scale; x += 1) {
        const from = (Math.floor(y / scale) * width + Math.floor(x / scale)) * channels;
        const to = ((top + y) * sheet.width + left + x) * channels;
        for (let channel = 0; channel < channels; channel += 1) sheet.data[to + channel] = picture.data[from + channel];
      }
    }
  });
  return sheet;
}

/**
 * Return the RGBA values of a picture, for `new ImageData(values, width, height)`.
 * @param {Picture} picture
 * @returns {Uint8ClampedArray<ArrayBuffer>}
 */
export function toRgba({ width, height, channels, data }) {
  const rgba = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let i = 0; i < width * height; i += 1) {
    for (let channel = 0; channel < 3; channel += 1) {
      rgba[i * 4 + channel] = data[i * channels + (channels === 1 ? 0 : channel)];
    }
  }
  return rgba;
}

/**
 * Return what a PNG file says about the images in it: the text under the keyword `scm`, which `scm-export generate`
 * writes, too. It holds no names, so that it is ASCII.
 * @param {Samples} samples
 * @param {readonly number[]} indices Which images the file holds.
 * @returns {string}
 */
export function describe(samples, indices) {
  const { info } = samples;
  return JSON.stringify({
    build_id: info.buildId,
    seeds: indices.map((index) => samples.seeds[index].toString()),
    class_labels: samples.classLabels && indices.map((index) => samples.classLabels?.[index]),
    num_inference_steps: info.steps,
    precision: info.precision,
    backend: info.backend,
  });
}

/**
 * Return a picture as a PNG file.
 * @param {Picture} picture
 * @param {Record<string, string>} texts tEXt chunks: keyword and text, both ASCII.
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export async function encodePng({ width, height, channels, data }, texts = {}) {
  const row = width * channels;
  const filtered = new Uint8Array((row + 1) * height); // each row after a 0: no filter
  for (let y = 0; y < height; y += 1) filtered.set(data.subarray(y * row, (y + 1) * row), y * (row + 1) + 1);
  const packed = new Blob([filtered]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([8, channels === 1 ? 0 : 2], 8); // bits a channel; gray or RGB
  const ascii = new TextEncoder();
  const chunks = [
    chunk("IHDR", header),
    ...Object.entries(texts).map(([keyword, text]) => chunk("tEXt", ascii.encode(`${keyword}\0${text}`))),
    chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
    chunk("IEND", new Uint8Array(0)),
  ];
  const signature = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
  return new Uint8Array(await new Blob([signature, ...chunks]).arrayBuffer());
}

/**
 * @param {string} type
 * @param {Uint8Array} content
 * @returns {Uint8Array<ArrayBuffer>}
 */
function chunk(type, content) {
  const bytes = new Uint8Array(content.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(content, 8);
  view.setUint32(content.length + 8, crc32(bytes.subarray(4, content.length + 8)));
  return bytes;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k += 1) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

/**
 * @param {Uint8Array} bytes
 * @returns {number}
 */
function crc32(bytes) {
  let c = 0xffffffff;
  for (const byte of bytes) c = CRC_TABLE[(c ^ byte) & 0xff] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}
