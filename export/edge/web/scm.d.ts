/**
 * scm.js: make images with a site of `scm-export web`, in a browser or in Node.
 *
 * A seed makes the same noise as in Python, bit for bit (`scm-noise-v1`), and the same image within the bound that the
 * bundle records; `Generator.prove` measures that here. Every file is compared with the sha256 in the site's manifest
 * before it is used. Nothing falls back silently: `Generator.info` and `Samples.info` name what runs, and why.
 */

export type Device = "webgpu" | "wasm";
export type Precision = "fp32" | "fp16";
/** Number, BigInt or decimal string with 0 <= seed < 2^64; from 2^53 on no number. */
export type Seed = number | bigint | string;

/**
 * - `bad-argument`: an argument breaks its contract
 * - `insecure-context`: no WebCrypto, so that files cannot be checked
 * - `network`: a file cannot be fetched: offline, not there, or refused by the server
 * - `integrity`: a file is truncated, changed or damaged; it was not used
 * - `manifest`: the site's manifest is malformed or of another version
 * - `unsupported`: the site was not made for this device or graph
 * - `no-webgpu`, `no-shader-f16`, `no-threads`: what was asked for, this browser does not have
 * - `out-of-memory`: the runtime could not get the memory
 * - `runtime`: ONNX Runtime failed
 * - `worker`: the web worker could not start or ended
 * - `closed`: the generator was closed
 * - `aborted`: the call was cancelled in the worker; a caller sees its own signal's reason instead
 * - `bug`: anything else; please report it
 */
export type ErrorCode =
  | "bad-argument"
  | "insecure-context"
  | "network"
  | "integrity"
  | "manifest"
  | "unsupported"
  | "no-webgpu"
  | "no-shader-f16"
  | "no-threads"
  | "out-of-memory"
  | "runtime"
  | "worker"
  | "closed"
  | "aborted"
  | "bug";

/** An error that this module raises on purpose: what was found, what was expected, what to do. */
export class ScmError extends Error {
  constructor(code: ErrorCode, message: string, cause?: unknown);
  readonly code: ErrorCode;
}

/** Progress of a call. Bytes where `phase` is `download`, images or graphs elsewhere. */
export interface Progress {
  phase: "download" | "open" | "generate" | "prove";
  name: string;
  loaded: number;
  total: number;
}

export interface CallOptions {
  /** Cancels the call, which then rejects with the signal's reason. A batch that runs is finished and dropped. */
  signal?: AbortSignal;
  onProgress?: (event: Progress) => void;
}

export interface LoadOptions extends CallOptions {
  /** `auto` (default) takes WebGPU where the browser has a GPU for it, else WebAssembly. The others are demands. */
  device?: "auto" | Device;
  /** CPU threads of WebAssembly. More than 1 needs a cross-origin isolated page; default: as many as there are, or 1. */
  threads?: number;
  /** Run in a web worker; default: where there are any. */
  worker?: boolean;
  /** sha256 of `scm_site.json`, which `scm-export web` prints. Refuses every other site. */
  manifestSha256?: string;
}

export interface GraphInfo {
  steps: number;
  precision: Precision;
  /** Bytes to fetch. */
  bytes: number;
  /** The same as of the graph in the bundle. */
  sha256: string;
  /** Why it cannot run here; "" if it can. */
  refusal: string;
}

/** 8-bit RGBA pixels, row by row, opaque; an `ImageData` is one. */
export interface StartImage {
  width: number;
  height: number;
  data: Uint8ClampedArray | Uint8Array;
}

/** What was loaded, and what runs. */
export interface Info {
  model: string;
  buildId: string;
  license: string;
  notes: readonly string[];
  device: Device;
  deviceReason: string;
  /** The WebGPU adapter; "" on WebAssembly. */
  adapter: string;
  hasShaderF16: boolean;
  threads: number;
  threadsReason: string;
  runtime: string;
  graphs: readonly GraphInfo[];
  /** (C, H, W). */
  imageShape: readonly number[];
  valueRange: readonly [number, number];
  numClasses: number;
  classNames: readonly string[];
  guidanceRange: readonly [number, number] | null;
  /** Inputs of its own that the model has, such as prompt embeddings. */
  conditioning: readonly { name: string; shape: readonly number[]; dtype: "float32" | "int64" }[];
  /** Prompts that were encoded when the site was made. */
  prompts: readonly string[];
  /** The samplers that start from an image: number of steps, and start time, radians. */
  starts: readonly { steps: number; time: number }[];
  maxBatch: number;
  /** Bytes of the runtime that were fetched. */
  runtimeBytes: number;
}

export interface GenerateRequest {
  /** Seed of the first image, the next ones follow; a random one when absent. */
  seed?: Seed;
  /** Number of images; 1 when absent. */
  numImages?: number;
  /** One seed for each image, instead of `seed` and `numImages`. */
  seeds?: readonly Seed[];
  /** Class name or number for all images, or one for each; drawn from each seed, as in Python, when absent. */
  classLabels?: number | string | (number | string)[] | null;
  /** Number of network calls; 2 where the site has it. */
  steps?: number;
  /** `auto` (default): fp16 on a GPU that computes in it, else fp32. */
  precision?: "auto" | Precision;
  guidanceScale?: number;
  /** Image to start from, of the model's size; a gray one for a gray model. All images start from it. */
  image?: StartImage;
  /** Time, radians, at which noise is added to the image: one of `Info.starts`. A smaller one keeps more of the image. */
  startTime?: number;
  /** One of `Info.prompts`, for all images: it fills the inputs that a text encoder would. */
  prompt?: string;
  /** (N, ...shape) of each of `Info.conditioning` that the prompt does not fill, flat. Masks are all ones when absent. */
  conditioning?: Record<string, Float32Array | BigInt64Array>;
  /** Images of one call; 4 when absent. */
  batchSize?: number;
}

export interface Samples {
  /** (N, C, H, W), data units, not clipped. */
  images: Float32Array;
  shape: readonly number[];
  /** Values that become black and full. */
  valueRange: readonly [number, number];
  seeds: readonly bigint[];
  classLabels: readonly number[] | null;
  info: {
    model: string;
    buildId: string;
    backend: string;
    device: Device;
    /** Whether the CPU ran operators: on WebGPU those for which onnxruntime-web has no WebGPU kernel. */
    usesCpu: boolean;
    precision: Precision;
    precisionReason: string;
    steps: number;
    batchSize: number;
    /** Fetching and opening the graph; about 0 when it was open. */
    openMs: number;
    noiseMs: number;
    /** Mean and median over the batches: milliseconds an image. */
    runMs: number;
    medianMs: number;
    totalMs: number;
  };
}

export interface Difference {
  finite: boolean;
  /** Largest and mean absolute difference, units of sigma_data, the data's standard deviation. */
  maxAbs: number;
  meanAbs: number;
  /** Over all samples, and of the worst one; Infinity where they are equal. */
  psnrDb: number;
  worstPsnrDb: number;
  psnrBySample: readonly number[];
  /** Sample that holds `maxAbs`. */
  worstIndex: number;
}

/** How far samples that were made here are from the recorded ones. */
export interface Proof {
  samples: Samples;
  golden: Samples;
  /** What computed the recorded ones: PyTorch at export, for a bundle that holds them. */
  goldenSource: string;
  difference: Difference;
  gate: "max_abs" | "psnr_p05_db";
  /** Largest `maxAbs` that passes; or the PSNR, dB, that the samples must reach. */
  threshold: number;
  thresholdSource: string;
  passed: boolean;
}

export class Generator {
  private constructor();
  readonly info: Info;

  /**
   * Open a site: its manifest, the device and the runtime.
   *
   * @param url URL of the site's folder; that of scm.js when absent.
   * @throws ScmError
   */
  static load(url?: string | URL, options?: LoadOptions): Promise<Generator>;

  /** Fetch, check and open a graph ahead of `generate`. */
  prepare(
    request?: Pick<GenerateRequest, "steps" | "precision"> & CallOptions,
  ): Promise<{ steps: number; precision: Precision; reason: string; ms: number }>;

  /** Make images. */
  generate(request?: GenerateRequest & CallOptions): Promise<Samples>;

  /** Make the recorded samples here and compare them, for each graph that runs here or for those asked for. */
  prove(request?: Pick<GenerateRequest, "steps" | "precision"> & CallOptions): Promise<Proof[]>;

  /** Release the runtime and end the worker. Calls that run reject with `closed`. */
  close(): Promise<void>;
}

/** Return one sample as 8-bit RGBA, for a canvas. The levels are those of Python's `to_uint8`. */
export function toImageData(samples: Samples, index: number): ImageData;

/**
 * Return samples as one PNG file, a grid if they are several.
 *
 * Its tEXt chunk `scm` says what made it, JSON: build id, seeds, labels, steps, precision and backend.
 *
 * @param options.indices Which samples; all when absent.
 * @param options.columns Pictures in a row; about a square when absent.
 * @param options.scale Each pixel becomes a square of this many pixels a side.
 */
export function toPng(
  samples: Samples,
  options?: { indices?: readonly number[]; columns?: number; scale?: number },
): Promise<Blob>;

/** Return the noise of one sample, `scm-noise-v1`: `size` float32 numbers of a seed and a step. */
export function standardNormal(seed: Seed, step: number, size: number): Float32Array;
