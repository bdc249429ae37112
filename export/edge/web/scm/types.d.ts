/** The manifest of a site, `scm_site.json`, as `scm-export web` writes it. Internal: read `Generator.info` instead. */
import type { Device, Precision } from "../scm.js";

export interface SiteFile {
  /** Relative path. */
  path: string;
  /** Bytes. */
  size: number;
  /** Of the content, 64 hex digits. */
  sha256: string;
  /** Bytes of `path.gz`, which holds the content; 0: the file lies under its own path. */
  gzip_size: number;
}

export interface TensorSpec {
  name: string;
  shape: number[];
  dtype: "float32" | "int64";
  kind: "values" | "mask";
}

export interface SamplerSpec {
  times: number[];
  sample_shape: number[];
  sigma_data: number;
  output: "pixels" | "latents";
  output_shape: number[];
  value_range: [number, number];
  num_classes: number;
  class_names: string[];
  guidance_range: [number, number] | null;
  default_guidance: number | null;
  conditioning: TensorSpec[];
  max_batch: number;
  /** `fresh`: one noise input for each step, else one in all. */
  renoise: "fresh" | "same" | "ode";
}

/** What decides whether samples equal the recorded ones. */
export interface Bound {
  gate: "max_abs" | "psnr_p05_db";
  /** Largest `maxAbs`, units of sigma_data; or the PSNR to reach, dB. */
  threshold: number;
  /** Which sample's PSNR must reach it, counted from the lowest. */
  rank: number;
  /** Where the threshold is from. */
  source: string;
}

export interface Graph {
  path: string;
  /** The graph and its external data. */
  files: string[];
  num_inference_steps: number;
  precision: Precision;
  /** Devices that can run it. */
  devices: Device[];
  bound: Bound;
}

export interface GoldenSamples {
  num_inference_steps: number;
  /** float32, little-endian, (N, ...shape), data units. */
  path: string;
  seeds: string[];
  class_labels: number[] | null;
  guidance_scale: number | null;
  /** Path of each input of its own that the model has, little-endian. */
  conditioning: Record<string, string>;
  made_by: string;
}

/** A prompt that was encoded when the site was made. */
export interface Prompt {
  text: string;
  /** Path of each input that it fills: one sample, little-endian. */
  conditioning: Record<string, string>;
}

/** The graph that turns the pixels of an image to latents. */
export interface Encoder {
  path: string;
  files: string[];
  devices: Device[];
}

export interface Site {
  schema_version: number;
  name: string;
  build_id: string;
  noise_contract: string;
  made_by: string;
  license: string;
  notes: string[];
  samplers: SamplerSpec[];
  graphs: Graph[];
  goldens: GoldenSamples[];
  prompts: Prompt[];
  /** Numbers of steps of the samplers that can start from an image, at their own first time. */
  start_steps: number[];
  /** What they need for it, of a model of latents. */
  encoder: Encoder | null;
  runtime: {
    name: string;
    version: string;
    license: string;
    devices: Partial<Record<Device, { module: string; glue: string; binary: string }>>;
  };
  files: SiteFile[];
}

/** The parts of onnxruntime-web that are used. */
export interface OrtTensor {
  data: Float32Array | BigInt64Array;
  dims: readonly number[];
  dispose(): void;
}
export interface OrtSession {
  run(feeds: Record<string, OrtTensor>): Promise<Record<string, OrtTensor>>;
  release(): Promise<void>;
}
export interface Ort {
  env: { logLevel: string; wasm: Record<string, unknown>; webgpu: Record<string, unknown> };
  Tensor: new (type: string, data: Float32Array | BigInt64Array, dims: number[]) => OrtTensor;
  InferenceSession: { create(model: Uint8Array, options: Record<string, unknown>): Promise<OrtSession> };
}
