/** Files of a site: fetched, unpacked, and compared with the sha256 of the site's manifest before anyone reads them. */
import { ScmError, fromRuntime, messageOf } from "./errors.js";

/** Whether this is Node, which reads files of the disk and has no web workers. */
export const IS_NODE = Boolean(/** @type {any} */ (globalThis).process?.versions?.node);
/** Name of the site's manifest. */
export const SITE_NAME = "scm_site.json";
const SCHEMA_VERSION = 1;

/** @typedef {import("./types.js").Site} Site */
/** @typedef {import("./types.js").SiteFile} SiteFile */
/** @typedef {(loaded: number, total: number) => void} OnBytes */

/**
 * Fetch and check the manifest of a site.
 * @param {URL} base URL of the site's folder, ends with "/".
 * @param {string | undefined} sha256 What the manifest must have, 64 hex digits; undefined accepts any.
 * @param {AbortSignal | undefined} signal
 * @returns {Promise<Site>}
 */
export async function fetchSite(base, sha256, signal) {
  const url = new URL(SITE_NAME, base);
  const bytes = await download(url, undefined, undefined, signal);
  if (sha256 !== undefined) await checkDigest(SITE_NAME, bytes, sha256);
  /** @type {Site} */
  let site;
  try {
    site = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new ScmError("manifest", `${url} is no JSON: ${messageOf(error)}. ${REPAIR}`, error);
  }
  const version = site?.schema_version;
  if (version !== SCHEMA_VERSION) {
    throw new ScmError(
      "manifest",
      `${url} has schema version ${version}, this scm.js reads ${SCHEMA_VERSION}. Take scm.js and the site from one ` +
        "version of scm-sdk.",
    );
  }
  if (site.noise_contract !== "scm-noise-v1") {
    throw new ScmError(
      "manifest",
      `${url} needs the noise contract ${site.noise_contract}, this scm.js has scm-noise-v1. Take a newer scm.js.`,
    );
  }
  const problem = problemOf(site, SHAPE, "") || (site.encoder ? problemOf(site.encoder, ENCODER, "encoder") : "");
  if (problem) throw new ScmError("manifest", `${url} is damaged: ${problem}. ${REPAIR}`);
  const lost = site.start_steps.find((steps) => !site.samplers.some(({ times }) => times.length === steps));
  if (lost !== undefined) throw new ScmError("manifest", `${url} is damaged: start_steps holds ${lost}. ${REPAIR}`);
  return site;
}

/** In a list of `SHAPE`: it has at least one element. */
const MANY = true;
const ENTRY = { path: "string", size: "number", sha256: "string", gzip_size: "number" };
const SAMPLER = {
  times: ["number", MANY], sample_shape: ["number", MANY], sigma_data: "number", output: "string",
  output_shape: ["number"], value_range: ["number", MANY], num_classes: "number", class_names: ["string"],
  conditioning: [{ name: "string", shape: ["number"], dtype: "string", kind: "string" }], max_batch: "number",
};
const GRAPH = {
  path: "string", files: ["string", MANY], num_inference_steps: "number", precision: "string",
  devices: ["string", MANY], bound: { gate: "string", threshold: "number", rank: "number", source: "string" },
};
const ENCODER = { path: "string", files: ["string", MANY], devices: ["string", MANY] };
/** Types of what is read of a manifest. The elements of a list have the type of the first one here. */
const SHAPE = {
  name: "string", build_id: "string", made_by: "string", license: "string", notes: ["string"],
  samplers: [SAMPLER, MANY], graphs: [GRAPH, MANY], files: [ENTRY, MANY],
  goldens: [{ num_inference_steps: "number", path: "string", seeds: ["string", MANY], made_by: "string", conditioning: {} }],
  prompts: [{ text: "string", conditioning: {} }], start_steps: ["number"],
  runtime: { name: "string", version: "string", devices: {} },
};

/**
 * Return what is wrong with a value, or "".
 * @param {any} value
 * @param {any} shape
 * @param {string} name
 * @returns {string}
 */
function problemOf(value, shape, name) {
  if (Array.isArray(shape)) {
    if (!Array.isArray(value)) return `${name} is no list`;
    if (shape[1] === MANY && !value.length) return `${name} is empty`;
    return value.map((each, i) => problemOf(each, shape[0], `${name}[${i}]`)).find(Boolean) ?? "";
  }
  if (typeof shape === "string") return typeof value === shape ? "" : `${name} is no ${shape}`;
  if (typeof value !== "object" || value === null || Array.isArray(value)) return `${name} is no object`;
  const inside = Object.entries(shape).map(([key, part]) => problemOf(value[key], part, name ? `${name}.${key}` : key));
  return inside.find(Boolean) ?? "";
}

/**
 * Fetch one listed file and check its size and sha256.
 * @param {URL} base
 * @param {SiteFile} file
 * @param {OnBytes} [onBytes]
 * @param {AbortSignal} [signal]
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export async function fetchFile(base, file, onBytes, signal) {
  const url = new URL(file.gzip_size ? `${file.path}.gz` : file.path, base);
  let bytes = await download(url, file.gzip_size || file.size, onBytes, signal, Math.max(file.size, file.gzip_size));
  // A server may unpack .gz files itself, which it says in a header that only the browser sees.
  if (file.gzip_size && bytes[0] === 0x1f && bytes[1] === 0x8b) bytes = await unpack(url, bytes, file.size);
  if (bytes.length !== file.size) {
    throw new ScmError(
      "integrity",
      `${file.path} has ${bytes.length} bytes, expected ${file.size}: it is truncated or another file. ${REPAIR}`,
    );
  }
  await checkDigest(file.path, bytes, file.sha256);
  return bytes;
}

/**
 * Return the sha256 of bytes as 64 hex digits.
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @returns {Promise<string>}
 */
export async function sha256Of(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new ScmError(
      "insecure-context",
      "this page has no WebCrypto, which checks the files: browsers give it only to pages of https:// and of " +
        "localhost. Open the page under one of these.",
    );
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const REPAIR = "Reload the page without the cache; if that does not help, copy the site to the server again.";

/**
 * @param {string} name
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @param {string} expected
 */
async function checkDigest(name, bytes, expected) {
  const found = await sha256Of(bytes);
  if (found !== expected) {
    throw new ScmError(
      "integrity",
      `${name} has sha256 ${found.slice(0, 16)}…, expected ${expected.slice(0, 16)}…: it was changed or damaged, and ` +
        `is not used. ${REPAIR}`,
    );
  }
}

/**
 * @param {URL} url
 * @param {number | undefined} size Expected bytes, for progress; undefined is unknown.
 * @param {OnBytes} [onBytes]
 * @param {AbortSignal} [signal]
 * @param {number} [most] Largest number of bytes that is read; undefined is any.
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
async function download(url, size, onBytes, signal, most) {
  signal?.throwIfAborted();
  if (url.protocol === "file:") {
    const bytes = await readLocal(url);
    onBytes?.(bytes.length, size ?? bytes.length);
    return bytes;
  }
  let response;
  try {
    response = await fetch(url, { signal, credentials: "same-origin" });
  } catch (error) {
    signal?.throwIfAborted();
    throw new ScmError(
      "network",
      `${url} cannot be fetched: ${messageOf(error)}. Check the connection and that the server allows this page to ` +
        "read the file, then try again.",
      error,
    );
  }
  if (!response.ok) {
    throw new ScmError(
      "network",
      `${url} cannot be fetched: the server answered ${response.status} ${response.statusText}`.trim() +
        ". Check that the whole site was copied to the server.",
    );
  }
  try {
    if (!response.body || most === undefined) return new Uint8Array(await response.arrayBuffer());
    return await readAll(response.body, most, url.pathname, (loaded) => onBytes?.(Math.min(loaded, size ?? most), size ?? most));
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof ScmError) throw error;
    throw new ScmError(
      "network",
      `${url} ended early: ${messageOf(error)}. Check the connection, then try again.`,
      error,
    );
  }
}

/**
 * Read a stream into one buffer, so that a large file is in memory once.
 * @param {ReadableStream<Uint8Array>} stream
 * @param {number} most Bytes; more are refused at once.
 * @param {string} name Whose content it is.
 * @param {(loaded: number) => void} [onBytes]
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
async function readAll(stream, most, name, onBytes) {
  const bytes = allocate(most, name);
  let at = 0;
  onBytes?.(0);
  for (const reader = stream.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > most) {
      void reader.cancel().catch(() => {});
      throw new ScmError("integrity", `${name} has more than the expected ${most} bytes: it is another file. ${REPAIR}`);
    }
    bytes.set(value, at);
    at += value.length;
    onBytes?.(at);
  }
  return at === most ? bytes : bytes.slice(0, at);
}

/**
 * @param {number} size Bytes.
 * @param {string} name For what.
 * @returns {Uint8Array<ArrayBuffer>}
 */
function allocate(size, name) {
  try {
    return new Uint8Array(size);
  } catch (error) {
    throw fromRuntime(error, `making room for the ${size} bytes of ${name}`);
  }
}

/**
 * Read a file of the disk, in Node.
 * @param {URL} url
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
async function readLocal(url) {
  if (!IS_NODE) {
    throw new ScmError(
      "network",
      `${url} cannot be fetched: browsers read no files of the disk. Serve the folder: scm-export web --serve, or any ` +
        "static server.",
    );
  }
  const { readFile } = await import("node:fs/promises");
  try {
    return new Uint8Array(await readFile(url));
  } catch (error) {
    throw new ScmError("network", `${url} cannot be read: ${messageOf(error)}. Copy the site again.`, error);
  }
}

/**
 * Unpack gzip.
 * @param {URL} url
 * @param {Uint8Array<ArrayBuffer>} packed
 * @param {number} size Bytes that it must have; more are refused at once.
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
async function unpack(url, packed, size) {
  try {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return await readAll(stream, size, url.pathname);
  } catch (error) {
    if (error instanceof ScmError) throw error;
    throw new ScmError("integrity", `${url} cannot be unpacked: ${messageOf(error)}. ${REPAIR}`, error);
  }
}
