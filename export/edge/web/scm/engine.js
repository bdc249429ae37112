/**
 * Runs a site: checks its files, chooses device and precision, draws noise and calls ONNX Runtime.
 *
 * It runs where it is imported: in the web worker of a `Generator`, or in the caller's own thread.
 */
import { difference, passes } from "./compare.js";
import { ScmError, fromRuntime, messageOf } from "./errors.js";
import { IS_NODE, fetchFile, fetchSite, sha256Of } from "./files.js";
import { checkSeed, standardNormal } from "./noise.js";
import { startSteps, toData, toOffset } from "./start.js";

/** @typedef {import("../scm.js").Device} Device */
/** @typedef {import("../scm.js").Precision} Precision */
/** @typedef {import("../scm.js").GenerateRequest} GenerateRequest */
/** @typedef {import("./types.js").Graph} Graph */
/** @typedef {import("./types.js").Encoder} Encoder */
/** @typedef {import("./types.js").SamplerSpec} SamplerSpec */
/** @typedef {{ signal?: AbortSignal, onProgress?: (event: import("../scm.js").Progress) => void }} Hooks */
/** @typedef {{ session: import("./types.js").OrtSession, usesCpu: boolean }} Opened */
/** @typedef {{ device: Device, reason: string, adapter: string, hasHalf: boolean }} Choice */

const DEVICES = ["wasm", "webgpu"];
const DEFAULT_BATCH = 4;
const MOST_IMAGES = 4096;
const MOST_THREADS = 8;

export class Engine {
  /**
   * @param {URL} base
   * @param {import("./types.js").Site} site
   * @param {Choice} choice
   * @param {{ count: number, reason: string }} threads
   * @param {import("./types.js").Ort} ort
   * @param {number} downloaded
   */
  constructor(base, site, choice, threads, ort, downloaded) {
    this.base = base;
    this.site = site;
    this.choice = choice;
    this.threads = threads;
    this.ort = ort;
    this.downloaded = downloaded;
    /** @type {Map<string, Promise<Opened>>} */
    this.sessions = new Map();
  }

  /**
   * Open a site: fetch its manifest, choose the device, fetch and start the runtime.
   * @param {string} url URL of the site's folder.
   * @param {{ device?: string, threads?: number, manifestSha256?: string }} options
   * @param {Hooks} hooks
   * @returns {Promise<Engine>}
   */
  static async open(url, options, hooks) {
    const base = new URL(url);
    const site = await fetchSite(base, options.manifestSha256, hooks.signal);
    const choice = await chooseDevice(site, options.device ?? "auto");
    const threads = chooseThreads(choice.device, options.threads);
    const paths = /** @type {NonNullable<import("./types.js").Site["runtime"]["devices"][Device]>} */ (
      site.runtime.devices[choice.device]
    );
    const loader = new Loader(base, site, "runtime", [paths.module, paths.glue, paths.binary], hooks);
    const files = await loader.fetchAll();
    /** @type {import("./types.js").Ort} */
    let ort;
    try {
      ort = await import(new URL(paths.module, base).href);
    } catch (error) {
      throw new ScmError(
        "network",
        `${paths.module} cannot be loaded: ${messageOf(error)}. Serve .mjs files as text/javascript, and allow ` +
          "'wasm-unsafe-eval' in script-src of the Content-Security-Policy.",
        error,
      );
    }
    ort.env.logLevel = "error";
    Object.assign(ort.env.wasm, {
      numThreads: threads.count,
      proxy: false,
      wasmPaths: { mjs: new URL(paths.glue, base).href },
      wasmBinary: files.get(paths.binary)?.buffer,
    });
    return new Engine(base, site, choice, threads, ort, loader.bytes);
  }

  /** @returns {import("../scm.js").Info} */
  get info() {
    const { site, choice, threads } = this;
    const spec = site.samplers[0];
    return {
      model: site.name,
      buildId: site.build_id,
      license: site.license,
      notes: site.notes,
      device: choice.device,
      deviceReason: choice.reason,
      adapter: choice.adapter,
      hasShaderF16: choice.hasHalf,
      threads: threads.count,
      threadsReason: threads.reason,
      runtime: `${site.runtime.name} ${site.runtime.version}`,
      graphs: site.graphs.map((graph) => ({
        steps: graph.num_inference_steps,
        precision: graph.precision,
        bytes: graph.files.reduce((sum, path) => sum + entryOf(site, path).size, 0),
        sha256: entryOf(site, graph.path).sha256,
        refusal: this.#refusal(graph)?.message ?? "",
      })),
      imageShape: imageShape(spec),
      valueRange: spec.value_range,
      numClasses: spec.num_classes,
      classNames: spec.class_names,
      guidanceRange: spec.guidance_range,
      prompts: site.prompts.map((prompt) => prompt.text),
      starts: site.start_steps.map((steps) => ({ steps, time: specOf(site, steps).times[0] })),
      conditioning: spec.conditioning.map(({ name, shape, dtype }) => ({ name, shape, dtype })),
      maxBatch: spec.max_batch,
      runtimeBytes: this.downloaded,
    };
  }

  /**
   * Fetch, check and open the graph of a request, so that `generate` need not.
   * @param {{ steps?: number, precision?: string }} request
   * @param {Hooks} hooks
   * @returns {Promise<{ steps: number, precision: Precision, reason: string, ms: number }>}
   */
  async prepare(request, hooks) {
    const start = performance.now();
    const { graph, reason } = this.#choose(request);
    await this.#session(graph, hooks);
    return {
      steps: graph.num_inference_steps,
      precision: graph.precision,
      reason,
      ms: performance.now() - start,
    };
  }

  /**
   * Make images.
   * @param {GenerateRequest} request
   * @param {Hooks} hooks
   * @returns {Promise<import("../scm.js").Samples>}
   */
  async generate(request, hooks) {
    const start = performance.now();
    const { graph, reason } = this.#choose({ ...request, steps: startSteps(request, this.info.starts) });
    const spec = specOf(this.site, graph.num_inference_steps);
    const seeds = seedsOf(request);
    const pixels = request.image && toData(request.image, imageShape(spec), spec.value_range);
    const conditioning = await this.#promptInputs(spec, request, seeds.length, hooks);
    const inputs = await conditioningOf(spec, { ...request, conditioning }, seeds);
    const batch = batchOf(request.batchSize, spec);
    const offset = pixels && (await this.#offset(spec, pixels, hooks));
    const { session, usesCpu } = await this.#session(graph, hooks);
    const opened = performance.now();
    const size = imageShape(spec).reduce((a, b) => a * b, 1);
    const images = allocate(seeds.length * size);
    const runs = [];
    let noiseMs = 0;
    for (let at = 0; at < seeds.length; at += batch) {
      // A turn of the event loop, in which an abort that was posted to the worker arrives.
      await new Promise((resolve) => setTimeout(resolve));
      hooks.signal?.throwIfAborted();
      hooks.onProgress?.({ phase: "generate", name: graph.path, loaded: at, total: seeds.length });
      const count = Math.min(batch, seeds.length - at);
      const before = performance.now();
      const feeds = this.#feeds(spec, seeds.slice(at, at + count), inputs, at, offset);
      const drawn = performance.now();
      const found = await this.#run(session, graph.path, spec.output === "pixels" ? "images" : "latents", feeds, count * size);
      images.set(found, at * size);
      noiseMs += drawn - before;
      runs.push((performance.now() - drawn) / count);
    }
    hooks.onProgress?.({ phase: "generate", name: graph.path, loaded: seeds.length, total: seeds.length });
    const labels = inputs.get("class_labels");
    return {
      images,
      shape: [seeds.length, ...imageShape(spec)],
      valueRange: spec.value_range,
      seeds,
      classLabels: labels ? Array.from(labels.data, Number) : null,
      info: {
        model: this.site.name,
        buildId: this.site.build_id,
        backend: `${this.site.runtime.name} ${this.choice.device}`,
        device: this.choice.device,
        usesCpu,
        precision: graph.precision,
        precisionReason: reason,
        steps: graph.num_inference_steps,
        batchSize: batch,
        openMs: opened - start,
        noiseMs,
        runMs: runs.reduce((a, b) => a + b, 0) / runs.length,
        medianMs: [...runs].sort((a, b) => a - b)[Math.floor(runs.length / 2)],
        totalMs: performance.now() - start,
      },
    };
  }

  /**
   * Make the bundle's recorded samples here and compare them.
   * @param {{ steps?: number, precision?: string }} request What to compare; all that runs here when absent.
   * @param {Hooks} hooks
   * @returns {Promise<import("../scm.js").Proof[]>}
   */
  async prove(request, hooks) {
    const graphs = this.site.graphs.filter(
      (graph) =>
        (request.steps === undefined || graph.num_inference_steps === request.steps) &&
        (request.precision === undefined || request.precision === "auto" || graph.precision === request.precision) &&
        (request.precision !== undefined || !this.#refusal(graph)) &&
        this.site.goldens.some((golden) => golden.num_inference_steps === graph.num_inference_steps),
    );
    if (!graphs.length) {
      throw new ScmError(
        "bad-argument",
        `no recorded samples for ${request.precision ?? "any precision"} and ${request.steps ?? "any number of"} ` +
          `steps on ${this.choice.device}, expected some of the site. See info.graphs.`,
      );
    }
    const proofs = [];
    for (const graph of graphs) {
      hooks.onProgress?.({ phase: "prove", name: graph.path, loaded: proofs.length, total: graphs.length });
      proofs.push(await this.#proof(graph, hooks));
    }
    return proofs;
  }

  /** Release the sessions. */
  async close() {
    const sessions = [...this.sessions.values()];
    this.sessions.clear();
    for (const opening of sessions) await opening.then(({ session }) => session.release()).catch(() => {});
  }

  /**
   * @param {Graph} graph
   * @param {Hooks} hooks
   * @returns {Promise<import("../scm.js").Proof>}
   */
  async #proof(graph, hooks) {
    const spec = specOf(this.site, graph.num_inference_steps);
    const golden = this.site.goldens.find(
      ({ num_inference_steps }) => num_inference_steps === graph.num_inference_steps,
    );
    if (!golden) throw new ScmError("manifest", `${graph.path} has no recorded samples.`);
    const paths = [golden.path, ...Object.values(golden.conditioning)];
    const files = await new Loader(this.base, this.site, "goldens", paths, hooks).fetchAll();
    const expected = new Float32Array(bytesOf(files, golden.path).buffer);
    const conditioning = tensorsOf(spec, golden.conditioning, files);
    const samples = await this.generate(
      {
        seeds: golden.seeds,
        classLabels: golden.class_labels ?? undefined,
        guidanceScale: golden.guidance_scale ?? undefined,
        conditioning,
        steps: graph.num_inference_steps,
        precision: graph.precision,
      },
      { signal: hooks.signal },
    );
    const found = difference(samples.images, expected, golden.seeds.length, spec.sigma_data, spec.value_range);
    return {
      samples,
      golden: { ...samples, images: expected },
      goldenSource: golden.made_by,
      difference: found,
      gate: graph.bound.gate,
      threshold: graph.bound.threshold,
      thresholdSource: graph.bound.source,
      passed: passes(found, graph.bound),
    };
  }

  /**
   * Return the conditioning of a request with what its prompt fills.
   * @param {SamplerSpec} spec
   * @param {GenerateRequest} request
   * @param {number} count
   * @param {Hooks} hooks
   * @returns {Promise<GenerateRequest["conditioning"]>}
   */
  async #promptInputs(spec, { prompt, conditioning = {} }, count, hooks) {
    if (prompt === undefined) return conditioning;
    const found = this.site.prompts.find(({ text }) => text === prompt);
    if (!found) {
      const known = this.site.prompts.map(({ text }) => JSON.stringify(text)).join(", ") || "none";
      throw new ScmError(
        "bad-argument",
        `prompt is ${JSON.stringify(prompt)}, expected one that was encoded when the site was made: ${known}. Add it: ` +
          "scm-export web --prompts FILE",
      );
    }
    const files = await new Loader(this.base, this.site, "prompts", Object.values(found.conditioning), hooks).fetchAll();
    const filled = { ...conditioning };
    for (const [name, one] of Object.entries(tensorsOf(spec, found.conditioning, files))) {
      if (name in conditioning) {
        throw new ScmError("bad-argument", `prompt and conditioning.${name} are both given, expected one of them.`);
      }
      const all = one instanceof Float32Array ? new Float32Array(one.length * count) : new BigInt64Array(one.length * count);
      for (let i = 0; i < count; i += 1) all.set(/** @type {any} */ (one), i * one.length);
      filled[name] = all;
    }
    return filled;
  }

  /**
   * Return the graph for a request, and why its precision was taken.
   * @param {{ steps?: number, precision?: string }} request
   * @returns {{ graph: Graph, reason: string }}
   */
  #choose({ steps, precision = "auto" }) {
    const counts = [...new Set(this.site.graphs.map((graph) => graph.num_inference_steps))];
    const wanted = steps ?? (counts.includes(2) ? 2 : counts[0]);
    const graphs = this.site.graphs.filter((graph) => graph.num_inference_steps === wanted);
    if (!graphs.length) {
      throw new ScmError("bad-argument", `steps is ${steps}, expected one of ${counts.join(", ")}.`);
    }
    if (precision !== "auto") {
      const graph = graphs.find((each) => each.precision === precision);
      if (!graph) {
        const there = graphs.map((each) => each.precision).join(", ");
        throw new ScmError(
          "bad-argument",
          `precision is ${JSON.stringify(precision)}, expected auto or one of ${there}, which the site has.`,
        );
      }
      const refusal = this.#refusal(graph);
      if (refusal) throw refusal;
      return { graph, reason: "asked for" };
    }
    const usable = graphs.filter((graph) => !this.#refusal(graph));
    if (!usable.length) throw this.#refusal(graphs[0]);
    const preferred = this.choice.device === "webgpu" ? "fp16" : "fp32";
    const graph = usable.find((each) => each.precision === preferred) ?? usable[0];
    if (graph.precision === preferred) {
      const why = preferred === "fp16" ? "the GPU computes in it" : "on a CPU fp16 is no faster";
      return { graph, reason: usable.length > 1 ? why : "the only one of the site that runs here" };
    }
    const left = graphs.find((each) => each.precision === preferred);
    return { graph, reason: (left && this.#refusal(left)?.message) || `the site has no ${preferred} graph` };
  }

  /**
   * Return why a graph cannot run here, or null.
   * @param {Graph} graph
   * @returns {ScmError | null}
   */
  #refusal(graph) {
    const { device, hasHalf } = this.choice;
    if (!graph.devices.includes(device)) {
      return new ScmError(
        "unsupported",
        `${graph.path} cannot run on ${device}, as its export found. Take device ${graph.devices.join(" or ")}.`,
      );
    }
    if (device === "webgpu" && graph.precision === "fp16" && !hasHalf) {
      return new ScmError(
        "no-shader-f16",
        "this GPU or browser has no shader-f16, which fp16 needs on WebGPU. Take precision fp32, or device wasm.",
      );
    }
    return null;
  }

  /**
   * Return what an image adds to the first noise of a sample.
   * @param {SamplerSpec} spec
   * @param {Float32Array<ArrayBuffer>} pixels Data units.
   * @param {Hooks} hooks
   * @returns {Promise<Float32Array>}
   */
  async #offset(spec, pixels, hooks) {
    if (!spec.output_shape.length) return toOffset(pixels, spec);
    const { encoder } = this.site;
    if (!encoder) throw new ScmError("manifest", "the site has no encoder. Make it again.");
    const { session } = await this.#session(encoder, hooks);
    const feeds = { images: new this.ort.Tensor("float32", pixels, [1, ...imageShape(spec)]) };
    const size = spec.sample_shape.reduce((a, b) => a * b, 1);
    return toOffset(await this.#run(session, encoder.path, "latents", feeds, size), spec);
  }

  /**
   * @param {Graph | Encoder} graph
   * @param {Hooks} hooks
   * @returns {Promise<Opened>}
   */
  #session(graph, hooks) {
    const found = this.sessions.get(graph.path);
    if (found) return found;
    const opening = this.#openSession(graph, hooks);
    this.sessions.set(graph.path, opening);
    opening.catch(() => this.sessions.delete(graph.path)); // the next call tries again
    return opening;
  }

  /**
   * @param {Graph | Encoder} graph
   * @param {Hooks} hooks
   * @returns {Promise<Opened>}
   */
  async #openSession(graph, hooks) {
    const device = graph.devices.includes(this.choice.device) ? this.choice.device : graph.devices[0];
    const files = await new Loader(this.base, this.site, "model", graph.files, hooks).fetchAll();
    hooks.onProgress?.({ phase: "open", name: graph.path, loaded: 0, total: 1 });
    const folder = graph.path.slice(0, graph.path.lastIndexOf("/") + 1);
    const externalData = graph.files
      .filter((path) => path !== graph.path)
      .map((path) => ({ path: path.slice(folder.length), data: files.get(path) }));
    const options = {
      executionProviders: [device],
      graphOptimizationLevel: "all",
      ...(externalData.length ? { externalData } : {}),
    };
    const model = bytesOf(files, graph.path);
    try {
      const opened = await this.#create(model, options, device);
      hooks.onProgress?.({ phase: "open", name: graph.path, loaded: 1, total: 1 });
      return opened;
    } catch (error) {
      throw fromRuntime(error, `opening ${graph.path} on ${device}`);
    }
  }

  /**
   * Create a session. For WebGPU at first with no operator on the CPU; where that fails, with some there.
   * @param {Uint8Array} model
   * @param {Record<string, unknown>} options
   * @param {Device} device
   * @returns {Promise<Opened>}
   */
  async #create(model, options, device) {
    const { InferenceSession } = this.ort;
    if (device === "webgpu") {
      const strict = { ...options, logSeverityLevel: 4, extra: { session: { disable_cpu_ep_fallback: "1" } } };
      try {
        return { session: await InferenceSession.create(model, strict), usesCpu: false };
      } catch {
        return { session: await InferenceSession.create(model, options), usesCpu: true };
      }
    }
    return { session: await InferenceSession.create(model, options), usesCpu: true };
  }

  /**
   * @param {SamplerSpec} spec
   * @param {bigint[]} seeds
   * @param {Map<string, Input>} inputs
   * @param {number} at Index of the first of them in the request.
   * @param {Float32Array} [offset] Added to the first noise of each.
   * @returns {Record<string, import("./types.js").OrtTensor>}
   */
  #feeds(spec, seeds, inputs, at, offset) {
    const { Tensor } = this.ort;
    /** @type {Record<string, import("./types.js").OrtTensor>} */
    const feeds = {};
    const size = spec.sample_shape.reduce((a, b) => a * b, 1);
    const inputsOfNoise = spec.renoise === "fresh" ? spec.times.length : 1;
    for (let step = 0; step < inputsOfNoise; step += 1) {
      const noise = allocate(seeds.length * size);
      seeds.forEach((seed, i) => noise.set(standardNormal(seed, step, size), i * size));
      if (offset && step === 0) for (let i = 0; i < noise.length; i += 1) noise[i] += offset[i % size];
      feeds[`noise_${step}`] = new Tensor("float32", noise, [seeds.length, ...spec.sample_shape]);
    }
    for (const [name, { data, shape, size: each }] of inputs) {
      const part = data.slice(at * each, (at + seeds.length) * each);
      feeds[name] = new Tensor(part instanceof Float32Array ? "float32" : "int64", part, [seeds.length, ...shape]);
    }
    return feeds;
  }

  /**
   * @param {import("./types.js").OrtSession} session
   * @param {string} path Of its graph.
   * @param {string} name Of the output.
   * @param {Record<string, import("./types.js").OrtTensor>} feeds
   * @param {number} size Numbers that must come back.
   * @returns {Promise<Float32Array>}
   */
  async #run(session, path, name, feeds, size) {
    try {
      const outputs = await session.run(feeds);
      const output = outputs[name];
      if (!(output?.data instanceof Float32Array) || output.data.length !== size) {
        throw new Error(`it returned ${output?.data.length ?? "no"} numbers, expected ${size}`);
      }
      const data = output.data.slice();
      for (const tensor of [...Object.values(feeds), ...Object.values(outputs)]) tensor.dispose();
      return data;
    } catch (error) {
      throw fromRuntime(error, `running ${path}`);
    }
  }
}

/** Fetches several files of a site and reports their progress as one. */
class Loader {
  /**
   * @param {URL} base
   * @param {import("./types.js").Site} site
   * @param {"runtime" | "model" | "goldens" | "prompts"} name
   * @param {string[]} paths
   * @param {Hooks} hooks
   */
  constructor(base, site, name, paths, hooks) {
    this.base = base;
    this.name = name;
    this.hooks = hooks;
    this.entries = paths.map((path) => entryOf(site, path));
    this.bytes = this.entries.reduce((sum, entry) => sum + (entry.gzip_size || entry.size), 0);
  }

  /** @returns {Promise<Map<string, Uint8Array<ArrayBuffer>>>} */
  async fetchAll() {
    const loaded = this.entries.map(() => 0);
    const fetched = this.entries.map(async (entry, i) => {
      const report = (/** @type {number} */ now) => {
        loaded[i] = now;
        const sum = loaded.reduce((a, b) => a + b, 0);
        this.hooks.onProgress?.({ phase: "download", name: this.name, loaded: sum, total: this.bytes });
      };
      const bytes = await fetchFile(this.base, entry, report, this.hooks.signal);
      return /** @type {[string, Uint8Array<ArrayBuffer>]} */ ([entry.path, bytes]);
    });
    return new Map(await Promise.all(fetched));
  }
}

/** @typedef {{ data: Float32Array | BigInt64Array, shape: number[], size: number }} Input */

/**
 * Return files as the inputs that they hold.
 * @param {SamplerSpec} spec
 * @param {Record<string, string>} paths
 * @param {Map<string, Uint8Array<ArrayBuffer>>} files
 * @returns {Record<string, Float32Array | BigInt64Array>}
 */
function tensorsOf(spec, paths, files) {
  /** @type {Record<string, Float32Array | BigInt64Array>} */
  const tensors = {};
  for (const [name, path] of Object.entries(paths)) {
    const { buffer } = bytesOf(files, path);
    const isFloat = spec.conditioning.find((tensor) => tensor.name === name)?.dtype === "float32";
    tensors[name] = isFloat ? new Float32Array(buffer) : new BigInt64Array(buffer);
  }
  return tensors;
}

/**
 * @param {import("./types.js").Site} site
 * @param {string} wanted
 * @returns {Promise<Choice>}
 */
async function chooseDevice(site, wanted) {
  const there = DEVICES.filter((name) => name in site.runtime.devices);
  if (wanted !== "auto" && !DEVICES.includes(wanted)) {
    throw new ScmError("bad-argument", `device is ${JSON.stringify(wanted)}, expected auto, webgpu or wasm.`);
  }
  if (wanted !== "auto" && !there.includes(wanted)) {
    throw new ScmError(
      "unsupported",
      `device is ${wanted}, but this site was made for ${there.join(" and ")}. Make it again: scm-export web --device all`,
    );
  }
  /** @param {string} reason @returns {Choice} */
  const wasm = (reason) => ({ device: "wasm", reason, adapter: "", hasHalf: false });
  if (wanted === "wasm") return wasm("asked for");
  if (!there.includes("webgpu")) return wasm("the site was made for WebAssembly alone");
  const { adapter, problem } = await findAdapter();
  if (!adapter) {
    if (wanted === "auto" && there.includes("wasm")) return wasm(problem);
    throw new ScmError("no-webgpu", `device webgpu cannot run here: ${problem}. Take device wasm, or another browser.`);
  }
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info;
  const named = description || [vendor, architecture].filter(Boolean).join(" ") || "unnamed";
  const isSoftware = Boolean(isFallbackAdapter) || /swiftshader|llvmpipe|basic render/i.test(`${named} ${architecture}`);
  if (wanted === "auto" && isSoftware && there.includes("wasm")) {
    return wasm(`the WebGPU adapter (${named}) computes on the CPU, which WebAssembly does faster`);
  }
  return {
    device: "webgpu",
    reason: wanted === "auto" ? "the browser has a WebGPU adapter" : "asked for",
    adapter: isSoftware ? `${named} (software)` : named,
    hasHalf: adapter.features.has("shader-f16"),
  };
}

/** @returns {Promise<{ adapter: any, problem: string }>} */
async function findAdapter() {
  const gpu = /** @type {any} */ (globalThis.navigator)?.gpu;
  if (!gpu) return { adapter: null, problem: "this browser has no WebGPU, or the page is not on https:// or localhost" };
  try {
    const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
    return { adapter, problem: adapter ? "" : "the browser offers no WebGPU adapter: no GPU, or its driver is blocked" };
  } catch (error) {
    return { adapter: null, problem: `WebGPU failed: ${messageOf(error)}` };
  }
}

/**
 * @param {Device} device
 * @param {number | undefined} wanted
 * @returns {{ count: number, reason: string }}
 */
function chooseThreads(device, wanted) {
  if (wanted !== undefined && (!Number.isInteger(wanted) || wanted < 1 || wanted > 64)) {
    throw new ScmError("bad-argument", `threads is ${wanted}, expected a whole number from 1 to 64.`);
  }
  const isShared = typeof SharedArrayBuffer !== "undefined" && globalThis.crossOriginIsolated === true;
  if (wanted !== undefined) {
    if (wanted > 1 && !isShared) {
      const why = IS_NODE
        ? "onnxruntime-web has no threads in Node. Take threads 1, or Python."
        : "this page has no SharedArrayBuffer, which several threads need. Serve it with the headers " +
          "Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp, or take threads 1.";
      throw new ScmError("no-threads", `threads is ${wanted}, but ${why}`);
    }
    return { count: wanted, reason: "asked for" };
  }
  if (device === "webgpu") return { count: 1, reason: "the GPU computes" };
  if (IS_NODE) return { count: 1, reason: "onnxruntime-web has no threads in Node" };
  if (!isShared) {
    return { count: 1, reason: "the page is not cross-origin isolated (no COOP and COEP headers), so there is one" };
  }
  const processors = globalThis.navigator?.hardwareConcurrency || 1;
  return { count: Math.min(processors, MOST_THREADS), reason: `${processors} processors` };
}

/**
 * @param {GenerateRequest} request
 * @returns {bigint[]}
 */
function seedsOf({ seed, seeds, numImages }) {
  if (seeds !== undefined && (seed !== undefined || numImages !== undefined)) {
    throw new ScmError("bad-argument", "seeds is given with seed or numImages, expected seeds alone: one for each image.");
  }
  if (seeds !== undefined) {
    const list = Array.from(seeds, checkSeed);
    if (!list.length || list.length > MOST_IMAGES) {
      throw new ScmError("bad-argument", `seeds holds ${list.length} seeds, expected 1 to ${MOST_IMAGES}.`);
    }
    return list;
  }
  const count = numImages ?? 1;
  if (!Number.isInteger(count) || count < 1 || count > MOST_IMAGES) {
    throw new ScmError("bad-argument", `numImages is ${count}, expected a whole number from 1 to ${MOST_IMAGES}.`);
  }
  const first = seed === undefined ? freshSeed() : checkSeed(seed);
  return Array.from({ length: count }, (_, i) => checkSeed(first + BigInt(i)));
}

/**
 * Return a random seed below 2^53 - 2^13, so that it and those after it survive JSON.
 * @returns {bigint}
 */
function freshSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (BigInt(high & 0x1fffff) << 32n | BigInt(low)) % (2n ** 53n - 8192n);
}

/**
 * Check and complete the inputs that are not noise.
 * @param {SamplerSpec} spec
 * @param {GenerateRequest} request
 * @param {bigint[]} seeds
 * @returns {Promise<Map<string, Input>>}
 */
async function conditioningOf(spec, request, seeds) {
  /** @type {Map<string, Input>} */
  const inputs = new Map();
  const labels = await labelsOf(spec, request.classLabels, seeds);
  if (labels) inputs.set("class_labels", { data: BigInt64Array.from(labels, BigInt), shape: [], size: 1 });
  const scale = guidanceOf(spec, request.guidanceScale);
  if (scale !== null) {
    inputs.set("guidance_scale", { data: new Float32Array(seeds.length).fill(scale), shape: [], size: 1 });
  }
  const given = request.conditioning ?? {};
  for (const name of Object.keys(given)) {
    if (!spec.conditioning.some((tensor) => tensor.name === name)) {
      const known = spec.conditioning.map((tensor) => tensor.name).join(", ") || "none";
      throw new ScmError("bad-argument", `conditioning holds ${JSON.stringify(name)}, expected: ${known}.`);
    }
  }
  for (const { name, shape, dtype, kind } of spec.conditioning) {
    const size = shape.reduce((a, b) => a * b, 1);
    const length = seeds.length * size;
    const Type = dtype === "float32" ? Float32Array : BigInt64Array;
    const data = given[name] ?? (kind === "mask" ? new BigInt64Array(length).fill(1n) : undefined);
    if (!(data instanceof Type) || data.length !== length) {
      throw new ScmError(
        "bad-argument",
        `conditioning.${name} is ${data ? `a ${data.constructor.name} of ${data.length} numbers` : "missing"}, expected ` +
          `a ${Type.name} of ${length}, (${[seeds.length, ...shape].join(", ")}).`,
      );
    }
    inputs.set(name, { data, shape, size });
  }
  return inputs;
}

/**
 * @param {SamplerSpec} spec
 * @param {GenerateRequest["classLabels"]} wanted
 * @param {bigint[]} seeds
 * @returns {Promise<number[] | null>}
 */
async function labelsOf(spec, wanted, seeds) {
  if (!spec.num_classes) {
    if (wanted === undefined || wanted === null) return null;
    throw new ScmError("bad-argument", "classLabels are given, but this model is unconditional. Leave them out.");
  }
  if (wanted === undefined || wanted === null) {
    return Promise.all(seeds.map((seed) => drawLabel(seed, spec.num_classes)));
  }
  if (!Array.isArray(wanted)) return new Array(seeds.length).fill(labelOf(spec, wanted));
  if (wanted.length !== seeds.length) {
    throw new ScmError(
      "bad-argument",
      `classLabels holds ${wanted.length} labels for ${seeds.length} images, expected one for each, or one for all.`,
    );
  }
  return wanted.map((label) => labelOf(spec, label));
}

/**
 * @param {SamplerSpec} spec
 * @param {number | string} label
 * @returns {number}
 */
function labelOf(spec, label) {
  const named = typeof label === "string" ? spec.class_names.indexOf(label) : -1;
  if (named >= 0) return named;
  if (Number.isInteger(label) && Number(label) >= 0 && Number(label) < spec.num_classes) return Number(label);
  const names = spec.class_names.slice(0, 12).join(", ") + (spec.class_names.length > 12 ? ", …" : "");
  throw new ScmError(
    "bad-argument",
    `class label is ${JSON.stringify(label)}, expected 0 to ${spec.num_classes - 1}${names ? ` or a name: ${names}` : ""}.`,
  );
}

/**
 * Return the label that an image gets when none is asked for; docs/noise.md defines it.
 * @param {bigint} seed
 * @param {number} numClasses
 * @returns {Promise<number>}
 */
async function drawLabel(seed, numClasses) {
  const digest = await sha256Of(new TextEncoder().encode(`scm-label-v1:${seed}`));
  const bytes = digest.slice(0, 16).match(/../g) ?? [];
  return Number(BigInt(`0x${bytes.reverse().join("")}`) % BigInt(numClasses));
}

/**
 * @param {SamplerSpec} spec
 * @param {number | undefined} wanted
 * @returns {number | null}
 */
function guidanceOf(spec, wanted) {
  if (!spec.guidance_range) {
    if (wanted === undefined) return null;
    throw new ScmError("bad-argument", "guidanceScale is given, but this model has no such input. Leave it out.");
  }
  const [low, high] = spec.guidance_range;
  const scale = wanted ?? spec.default_guidance;
  if (typeof scale !== "number" || !(scale >= low && scale <= high)) {
    throw new ScmError("bad-argument", `guidanceScale is ${scale ?? "missing"}, expected a number in ${low} to ${high}.`);
  }
  return scale;
}

/**
 * @param {number | undefined} wanted
 * @param {SamplerSpec} spec
 * @returns {number}
 */
function batchOf(wanted, spec) {
  if (wanted === undefined) return Math.min(DEFAULT_BATCH, spec.max_batch);
  if (Number.isInteger(wanted) && wanted >= 1 && wanted <= spec.max_batch) return wanted;
  throw new ScmError("bad-argument", `batchSize is ${wanted}, expected a whole number from 1 to ${spec.max_batch}.`);
}

/**
 * @param {import("./types.js").Site} site
 * @param {number} steps
 * @returns {SamplerSpec}
 */
function specOf(site, steps) {
  const spec = site.samplers.find((each) => each.times.length === steps);
  if (!spec) throw new ScmError("manifest", `the site has no sampler of ${steps} steps. Make it again.`);
  return spec;
}

/**
 * @param {SamplerSpec} spec
 * @returns {number[]}
 */
function imageShape(spec) {
  return spec.output_shape.length ? spec.output_shape : spec.sample_shape;
}

/**
 * @param {import("./types.js").Site} site
 * @param {string} path
 * @returns {import("./types.js").SiteFile}
 */
function entryOf(site, path) {
  const entry = site.files.find((file) => file.path === path);
  if (!entry) throw new ScmError("manifest", `the site's manifest lists no ${path}. Make the site again.`);
  return entry;
}

/**
 * @param {Map<string, Uint8Array<ArrayBuffer>>} files
 * @param {string} path
 * @returns {Uint8Array<ArrayBuffer>}
 */
function bytesOf(files, path) {
  const bytes = files.get(path);
  if (!bytes) throw new ScmError("manifest", `${path} was not fetched.`);
  return bytes;
}

/**
 * @param {number} length
 * @returns {Float32Array<ArrayBuffer>}
 */
function allocate(length) {
  try {
    return new Float32Array(length);
  } catch (error) {
    throw fromRuntime(error, `making room for ${length} numbers`);
  }
}
