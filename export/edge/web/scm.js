/**
 * Make images with a site of `scm-export web`, in a browser or in Node. scm.d.ts documents every name.
 *
 *     import { Generator, toPng } from "./scm.js";
 *     const gen = await Generator.load("./", { device: "auto" });
 *     const samples = await gen.generate({ seed: 7, numImages: 4, classLabels: "red", steps: 2 });
 */
import { Engine } from "./scm/engine.js";
import { ScmError } from "./scm/errors.js";
import { IS_NODE } from "./scm/files.js";
import { standardNormal } from "./scm/noise.js";
import { describe, encodePng, makeGrid, toPicture, toRgba } from "./scm/pictures.js";

export { ScmError, standardNormal };

/** @typedef {import("./scm.js").CallOptions} CallOptions */

export class Generator {
  /** @type {Local | Remote} */
  #engine;

  /**
   * @param {Local | Remote} engine
   * @param {import("./scm.js").Info} info
   */
  constructor(engine, info) {
    this.#engine = engine;
    this.info = info;
  }

  /**
   * @param {string | URL} [url]
   * @param {import("./scm.js").LoadOptions} [options]
   * @returns {Promise<Generator>}
   */
  static async load(url = new URL("./", import.meta.url), options = {}) {
    const { worker = !IS_NODE && typeof Worker !== "undefined", signal, onProgress, ...wanted } = options;
    const place = new URL(url, globalThis.location?.href ?? import.meta.url);
    place.pathname = place.pathname.replace(/[^/]*\.(json|html)$/, "").replace(/([^/])$/, "$1/");
    const engine = worker ? new Remote() : new Local();
    try {
      const info = await engine.call("open", [place.href, wanted], { signal, onProgress });
      return new Generator(engine, info);
    } catch (error) {
      engine.end();
      throw error;
    }
  }

  /** @type {import("./scm.js").Generator["prepare"]} */
  prepare({ signal, onProgress, ...request } = {}) {
    return this.#engine.call("prepare", [request], { signal, onProgress });
  }

  /** @type {import("./scm.js").Generator["generate"]} */
  generate({ signal, onProgress, ...request } = {}) {
    return this.#engine.call("generate", [request], { signal, onProgress });
  }

  /** @type {import("./scm.js").Generator["prove"]} */
  prove({ signal, onProgress, ...request } = {}) {
    return this.#engine.call("prove", [request], { signal, onProgress });
  }

  async close() {
    try {
      await this.#engine.call("close", [], {});
    } finally {
      this.#engine.end();
    }
  }
}

/** An engine in this thread. */
class Local {
  /** @type {Engine | undefined} */
  #engine;

  /**
   * @param {"open" | "prepare" | "generate" | "prove" | "close"} call
   * @param {any[]} args
   * @param {CallOptions} hooks
   * @returns {Promise<any>}
   */
  async call(call, args, hooks) {
    if (call === "open") {
      this.#engine = await Engine.open(args[0], args[1], hooks);
      return this.#engine.info;
    }
    if (!this.#engine) throw closed();
    return call === "close" ? this.#engine.close() : this.#engine[call](args[0], hooks);
  }

  end() {
    this.#engine = undefined;
  }
}

/** An engine in a web worker. */
class Remote {
  /** @type {Map<number, { resolve: (value: any) => void, reject: (error: unknown) => void, hooks: CallOptions }>} */
  #waiting = new Map();
  #next = 0;
  /** @type {ScmError | undefined} */
  #ended;

  constructor() {
    this.worker = new Worker(new URL("./scm/worker.js", import.meta.url), { type: "module", name: "scm" });
    this.worker.addEventListener("message", ({ data }) => this.#receive(data));
    this.worker.addEventListener("error", (event) => {
      const text = event.message || "its script cannot be loaded";
      const hint = "Check that the whole site was copied and that .js files are served as text/javascript.";
      this.#fail(new ScmError("worker", `the web worker ended: ${text}. ${hint}`));
    });
  }

  /**
   * @param {string} call
   * @param {any[]} args
   * @param {CallOptions} hooks
   * @returns {Promise<any>}
   */
  async call(call, args, hooks) {
    hooks.signal?.throwIfAborted();
    if (this.#ended) throw this.#ended;
    const id = (this.#next += 1);
    const stop = () => {
      this.worker.postMessage({ id, abort: true });
      this.#waiting.get(id)?.reject(hooks.signal?.reason);
      this.#waiting.delete(id);
    };
    try {
      return await new Promise((resolve, reject) => {
        this.#waiting.set(id, { resolve, reject, hooks });
        hooks.signal?.addEventListener("abort", stop, { once: true });
        this.worker.postMessage({ id, call, args });
      });
    } finally {
      this.#waiting.delete(id);
      hooks.signal?.removeEventListener("abort", stop);
    }
  }

  end() {
    this.worker.terminate();
    this.#fail(closed());
  }

  /** @param {{ id: number, progress?: any, result?: any, error?: { code: any, message: string } }} message */
  #receive({ id, progress, result, error }) {
    const call = this.#waiting.get(id);
    if (!call) return; // it was aborted
    if (progress) call.hooks.onProgress?.(progress);
    else if (error) call.reject(new ScmError(error.code, error.message));
    else call.resolve(result);
  }

  /** @param {ScmError} error */
  #fail(error) {
    this.#ended ??= error;
    for (const { reject } of this.#waiting.values()) reject(error);
    this.#waiting.clear();
  }
}

/** @returns {ScmError} */
function closed() {
  return new ScmError("closed", "this generator is closed. Load another one.");
}

/** @type {typeof import("./scm.js").toImageData} */
export function toImageData(samples, index) {
  const picture = toPicture(samples, index);
  return new ImageData(toRgba(picture), picture.width, picture.height);
}

/** @type {typeof import("./scm.js").toPng} */
export async function toPng(samples, { indices, columns, scale = 1 } = {}) {
  const chosen = indices ?? samples.seeds.map((_, i) => i);
  if (!chosen.length || !Number.isInteger(scale) || scale < 1 || scale > 64) {
    throw new ScmError(
      "bad-argument",
      `indices holds ${chosen.length} images and scale is ${scale}, expected at least one image and a scale of 1 to 64.`,
    );
  }
  const pictures = chosen.map((index) => toPicture(samples, index));
  const across = columns ?? Math.max(1, Math.round(Math.sqrt(chosen.length)));
  const grid = makeGrid(pictures, across, scale);
  const bytes = await encodePng(grid, { scm: describe(samples, chosen) });
  return new Blob([bytes], { type: "image/png" });
}
