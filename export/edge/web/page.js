/** The page: a form over `Generator`, and the proof. */
import { Generator, ScmError, toImageData, toPng } from "./scm.js";
import { fetchSite } from "./scm/files.js";

/** @typedef {import("./scm.js").Samples} Samples */
/** @typedef {import("./scm.js").Progress} Progress */

const COUNTS = [1, 4, 9, 16];
const SMALL = 128;
/** Largest side, pixels, of a downloaded picture that is enlarged. */
const DOWNLOAD = 512;
const PHASES = { download: "Fetching", open: "Opening", generate: "Generating", prove: "Proving" };
/** Codes of errors after which a generator may be broken: the next action loads another one. */
const FATAL = ["worker", "closed", "out-of-memory", "runtime"];
const NAMES = { auto: "Auto", webgpu: "WebGPU", wasm: "WebAssembly" };

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);

/** @type {import("./scm/types.js").Site} */
let site;
/** @type {{ gen: Generator, device: string, graphs: Set<string> } | undefined} */
let loaded; // `graphs`: those that were fetched
/** @type {AbortController | undefined} */
let running;
/** @type {Samples | undefined} */
let shown;
let shownLink = ""; // "" where an image was started from, which a link cannot hold
/** @type {ImageData | undefined} */
let picked; // the image to start from
let phase = "";

$("facts").textContent = ""; // the hint for a page without this script
$("facts").classList.remove("late");
try {
  await start();
} catch (error) {
  $("model").textContent = "The site cannot be opened";
  showError(error);
}

async function start() {
  site = await fetchSite(new URL("./", import.meta.url), undefined, undefined);
  const spec = site.samplers[0];
  const shape = spec.output_shape.length ? spec.output_shape : spec.sample_shape;
  document.title = `${site.name} in the browser`;
  $("model").textContent = site.name;
  const steps = [...new Set(site.graphs.map((graph) => graph.num_inference_steps))].sort((a, b) => a - b);
  const precisions = [...new Set(site.graphs.map((graph) => graph.precision))];
  const devices = Object.keys(site.runtime.devices);
  $("facts").textContent = [
    `${shape[2]}×${shape[1]} pixels`,
    kindOf(spec),
    `${steps.join(" or ")} ${steps.length === 1 && steps[0] === 1 ? "step" : "steps"}`,
    site.license && `license ${site.license}`,
    `build ${site.build_id.slice(0, 12)}`,
  ]
    .filter(Boolean)
    .join(" · ");
  fill($("notes"), site.notes.map((note) => element("li", note)));
  $("notes").hidden = !site.notes.length;

  if (spec.num_classes) {
    const names = Array.from({ length: spec.num_classes }, (_, i) => spec.class_names[i] ?? `${i}`);
    fill($("label"), [option("", "Drawn from each seed"), ...names.map((name, i) => option(String(i), name))]);
    $("label-field").hidden = false;
  }
  if (site.prompts.length) {
    fill($("prompt"), site.prompts.map(({ text }, i) => option(String(i), text)));
    $("prompt-field").hidden = false;
  }
  if (spec.guidance_range) {
    Object.assign($("guidance"), { min: spec.guidance_range[0], max: spec.guidance_range[1] });
    $("guidance").value = spec.default_guidance ?? spec.guidance_range[0];
    $("guidance-field").hidden = false;
  }
  if (site.start_steps.length) {
    fill($("start"), site.start_steps.map((count) => {
      const time = /** @type {import("./scm/types.js").SamplerSpec} */ (samplerOf(count)).times[0];
      const weight = `${Math.round(100 * Math.cos(time))} %`;
      return option(String(count), `${Number(time.toFixed(4))} rad (${weight}), ${plural(count, "step")}`);
    }));
    $("image-help").textContent = `Its middle is scaled to ${shape[2]}×${shape[1]} pixels. It stays on this device.`;
    $("image-field").hidden = false;
    $("image").addEventListener("change", () => void pick());
    $("no-image").addEventListener("click", () => {
      $("image").value = "";
      void pick();
      $("image").focus();
    });
  }
  addChoice("count", COUNTS.map((n) => [String(n), String(n)]), "4");
  addChoice("steps", steps.map((n) => [String(n), String(n)]), String(steps.includes(2) ? 2 : steps[0]));
  const offered = devices.length > 1 ? ["auto", ...devices] : devices;
  addChoice("device", offered.map((name) => [name, NAMES[/** @type {"auto"} */ (name)]]), offered[0]);
  const kinds = precisions.length > 1 ? ["auto", ...precisions] : precisions;
  addChoice("precision", kinds.map((name) => [name, name === "auto" ? "Auto" : name]), kinds[0]);
  const unfit = readLink();
  addEventListener("hashchange", () => {
    const left = readLink();
    if (running) return;
    status(left);
    showCost();
  });

  $("form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    void run(generate);
  });
  $("form").addEventListener("change", showCost);
  $("random").addEventListener("click", () => {
    $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  });
  $("cancel").addEventListener("click", () => running?.abort());
  $("prove").addEventListener("click", () => void run(prove));
  $("download").addEventListener("click", () => void download());
  $("link").addEventListener("click", () => void copyLink());
  $("controls").disabled = false;
  $("prove").disabled = !site.goldens.length;
  $("prove-text").textContent = site.goldens.length
    ? `Your browser makes samples again that were recorded by ${site.goldens[0].made_by}, and holds the difference against the bound of each graph.`
    : "The site has no recorded samples.";
  if (!canGenerate()) {
    $("generate").disabled = true;
    status("This model takes inputs that the page cannot make. It can be proved here, and scm.js generates with them.");
  }
  if (unfit) status(unfit);
  showCost();
  showWhat();
}

/**
 * Run one action: the controls are off meanwhile, it can be cancelled, and an error is shown.
 * @param {(signal: AbortSignal) => Promise<void>} action
 */
async function run(action) {
  if (running) return;
  running = new AbortController();
  const focused = document.activeElement;
  phase = "";
  $("alert").hidden = true;
  $("cancel").hidden = $("progress").hidden = $("amount").hidden = false;
  $("controls").disabled = $("prove").disabled = true;
  try {
    await action(running.signal);
  } catch (error) {
    if (running.signal.aborted) status("Cancelled.");
    else {
      status("");
      showError(error);
      if (error instanceof ScmError && FATAL.includes(error.code)) await unload();
    }
  } finally {
    running = undefined;
    $("controls").disabled = false;
    $("prove").disabled = !site.goldens.length;
    // What was disabled lost the focus, and what is hidden now loses it.
    const isLost = [document.body, $("cancel")].includes(document.activeElement);
    if (isLost && focused instanceof HTMLElement) focused.focus({ preventScroll: true });
    $("cancel").hidden = $("progress").hidden = $("amount").hidden = true;
    showCost();
    showWhat();
  }
}

/** Read the chosen image; its controls replace the number of steps. */
async function pick() {
  const [file] = $("image").files;
  picked = undefined;
  $("alert").hidden = true;
  if (file) {
    try {
      picked = await pixelsOf(file);
    } catch (error) {
      $("image").value = "";
      showError(error);
    }
  }
  $("no-image").hidden = $("start-field").hidden = !picked;
  $("steps").hidden = Boolean(picked);
  showCost();
}

/**
 * Return the middle of a picture file in the size of the model, on white; gray for a gray model.
 * @param {File} file
 * @returns {Promise<ImageData>}
 */
async function pixelsOf(file) {
  const spec = site.samplers[0];
  const [channels, height, width] = spec.output_shape.length ? spec.output_shape : spec.sample_shape;
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new ScmError("bad-argument", `${file.name} is no picture that this browser reads, expected PNG, JPEG or WebP.`);
  });
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [across, down] = [bitmap.width * scale, bitmap.height * scale];
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - across) / 2, (height - down) / 2, across, down);
  bitmap.close();
  const image = context.getImageData(0, 0, width, height);
  if (channels === 3) return image;
  for (let i = 0; i < image.data.length; i += 4) {
    const gray = (299 * image.data[i] + 587 * image.data[i + 1] + 114 * image.data[i + 2]) / 1000; // ITU-R BT.601
    image.data.fill(Math.round(gray), i, i + 3);
  }
  return image;
}

/**
 * Return the generator for the device that is chosen; another one is closed.
 * @param {AbortSignal} signal
 * @returns {Promise<Generator>}
 */
async function generator(signal) {
  const device = value("device");
  if (loaded?.device !== device) {
    await unload();
    const gen = await Generator.load(new URL("./", import.meta.url), {
      device: /** @type {"auto"} */ (device),
      signal,
      onProgress,
    });
    loaded = { gen, device, graphs: new Set() };
  }
  return loaded.gen;
}

async function unload() {
  const gen = loaded?.gen;
  loaded = undefined;
  await gen?.close().catch(() => {}); // it may have ended by itself
}

/** @param {AbortSignal} signal */
async function generate(signal) {
  const link = linkHash();
  const label = $("label").value;
  const request = {
    seed: $("seed").value.trim(),
    numImages: Number(value("count")),
    classLabels: label === "" ? undefined : Number(label),
    prompt: site.prompts.length ? site.prompts[Number($("prompt").value)].text : undefined,
    guidanceScale: site.samplers[0].guidance_range ? $("guidance").valueAsNumber : undefined,
    steps: chosenSteps(),
    precision: /** @type {"auto"} */ (value("precision")),
    ...(picked ? { image: picked, startTime: samplerOf(chosenSteps())?.times[0] } : {}),
  };
  const gen = await generator(signal);
  const samples = await gen.generate({ ...request, signal, onProgress });
  markFetched(samples);
  if (request.image && site.encoder) loaded?.graphs.add(site.encoder.path);
  show(samples);
  shownLink = request.image ? "" : link;
  const { info } = samples;
  status(`${plural(samples.seeds.length, "image")} by ${NAMES[info.device]} in ${info.precision}, ${duration(info.medianMs)} each.`);
  if (shownLink) history.replaceState(null, "", link);
  $("results").scrollIntoView({ block: "nearest" }); // it is below the form on a phone
}

/** @param {AbortSignal} signal */
async function prove(signal) {
  $("proofs").hidden = true;
  $("verdict").textContent = "";
  const gen = await generator(signal);
  const proofs = await gen.prove({ signal, onProgress });
  for (const proof of proofs) markFetched(proof.samples);
  const refused = gen.info.graphs.filter((graph) => graph.refusal);
  fill($("rows"), [...proofs.map(proofRow), ...refused.map(refusedRow)]);
  $("proofs").hidden = false;
  const failed = proofs.filter((proof) => !proof.passed).length;
  const count = proofs[0].samples.seeds.length;
  $("verdict").className = `verdict ${failed ? "fail" : "pass"}`;
  $("verdict").textContent = failed
    ? `${failed} of ${plural(proofs.length, "graph")} made other samples than the recorded ones on ${NAMES[gen.info.device]}.`
    : `Pass: ${plural(proofs.length, "graph")} made the recorded samples on ${NAMES[gen.info.device]}, ${count} seeds each.`;
  status("");
}

/**
 * @param {import("./scm.js").GraphInfo} graph That cannot run here.
 * @returns {HTMLElement}
 */
function refusedRow(graph) {
  const row = document.createElement("tr");
  const name = element("th", `${graph.precision}, ${plural(graph.steps, "step")}`);
  name.scope = "row";
  const reason = cell(graph.refusal, "Reason");
  reason.colSpan = 4;
  row.append(name, cell("not run", ""), reason);
  return row;
}

/** @returns {number} Of the sampler that the form asks for. */
function chosenSteps() {
  return Number(picked ? $("start").value : value("steps"));
}

/** @param {number} steps */
function samplerOf(steps) {
  return site.samplers.find((each) => each.times.length === steps);
}

/** @param {Samples} samples */
function markFetched({ info }) {
  const graph = graphOf(info.steps, info.precision);
  if (graph) loaded?.graphs.add(graph.path);
}

/**
 * @param {number} steps
 * @param {string} precision
 */
function graphOf(steps, precision) {
  return site.graphs.find((each) => each.num_inference_steps === steps && each.precision === precision);
}

/** @param {Samples} samples */
function show(samples) {
  shown = samples;
  const items = samples.seeds.map((seed, i) => {
    const label = samples.classLabels && className(samples.classLabels[i]);
    const caption = [`seed ${seed}`, label].filter(Boolean).join(" · ");
    const button = element("button", "");
    button.type = "button";
    button.title = "Download PNG";
    const canvas = picture(toImageData(samples, i), `Image of ${caption}`);
    button.append(canvas, element("span", caption, "caption"));
    button.addEventListener("click", () => void download(i));
    const item = element("li", "");
    item.append(button);
    return item;
  });
  fill($("pictures"), items);
  $("pictures").dataset.columns = Math.round(Math.sqrt(items.length));
  const { info } = samples;
  fill($("figures"), [
    figure("Median per image", duration(info.medianMs)),
    figure("Noise, all images", duration(info.noiseMs)),
    figure("Fetch and open graph", info.openMs < 5 ? "was open" : duration(info.openMs)),
    figure("Ran on", `${NAMES[info.device]}${info.device === "webgpu" && info.usesCpu ? " and CPU" : ""}, ${info.precision}`),
  ]);
  $("empty").hidden = true;
  for (const id of ["pictures", "figures", "actions"]) $(id).hidden = false;
}

/**
 * @param {import("./scm.js").Proof} proof
 * @returns {HTMLElement}
 */
function proofRow(proof) {
  const { samples, golden, difference, gate, threshold, thresholdSource } = proof;
  const row = document.createElement("tr");
  const name = element("th", `${samples.info.precision}, ${plural(samples.info.steps, "step")}`);
  name.scope = "row";
  const bound =
    gate === "max_abs" ? `difference at most ${threshold.toExponential(1)}` : `PSNR at least ${threshold.toFixed(0)} dB`;
  const boundCell = cell(bound, "Bound");
  boundCell.append(element("span", thresholdSource, "help"));
  const psnr = Number.isFinite(difference.psnrDb) ? `${difference.psnrDb.toFixed(1)} dB` : "equal";
  const triples = element("div", "", "triples");
  for (let i = 0; i < samples.seeds.length; i += 1) {
    const triple = element("div", "", "triple");
    triple.append(
      picture(toImageData(golden, i), `recorded, seed ${samples.seeds[i]}`),
      picture(toImageData(samples, i), `here, seed ${samples.seeds[i]}`),
      picture(heat(proof, i), `difference, seed ${samples.seeds[i]}`),
    );
    triples.append(triple);
  }
  const pictures = cell("", "Recorded, here, difference");
  pictures.append(triples);
  row.append(
    name,
    cell(proof.passed ? "✓ pass" : "✗ FAIL", "", proof.passed ? "pass" : "fail"),
    cell(difference.finite ? difference.maxAbs.toExponential(2) : "not finite", "Largest difference"),
    cell(psnr, "PSNR"),
    boundCell,
    pictures,
  );
  return row;
}

/**
 * Return the absolute difference of a sample as a gray picture; the largest of all samples is white.
 * @param {import("./scm.js").Proof} proof
 * @param {number} index
 * @returns {ImageData}
 */
function heat({ samples, golden }, index) {
  const [count, channels, height, width] = samples.shape;
  const pixels = height * width;
  const delta = samples.images.map((x, i) => Math.abs(x - golden.images[i]));
  let largest = 0;
  for (const each of delta) largest = Math.max(largest, each);
  const image = new ImageData(width, height);
  const size = delta.length / count;
  for (let i = 0; i < pixels; i += 1) {
    let most = 0;
    for (let c = 0; c < channels; c += 1) most = Math.max(most, delta[index * size + c * pixels + i]);
    const level = largest ? Math.round((255 * most) / largest) : 0;
    image.data.set([level, level, level, 255], i * 4);
  }
  return image;
}

/** @param {number} [index] One image; all when absent. */
async function download(index) {
  if (!shown) return;
  const side = Math.max(shown.shape[2], shown.shape[3]);
  const scale = Math.max(1, Math.floor(DOWNLOAD / side / (index === undefined ? Math.ceil(Math.sqrt(shown.seeds.length)) : 1)));
  const blob = await toPng(shown, { indices: index === undefined ? undefined : [index], scale });
  const first = shown.seeds[index ?? 0];
  const name = site.name.replace(/[^\w.-]+/g, "-");
  const anchor = element("a", "");
  anchor.href = URL.createObjectURL(blob);
  anchor.download = `${name}-${shown.info.steps}step-seed${first}.png`;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

async function copyLink() {
  if (!shownLink) {
    status("A link cannot hold the image that these started from.");
    return;
  }
  const url = new URL(shownLink, location.href).href;
  try {
    await navigator.clipboard.writeText(url);
    status("Link copied. It opens this page with the request of these images.");
  } catch {
    status(`Copy this link: ${url}`);
  }
}

/** @returns {string} The request of the form. */
function linkHash() {
  const fields = {
    seed: $("seed").value.trim(),
    n: value("count"),
    steps: value("steps"),
    label: $("label").value,
    prompt: $("prompt").value,
    guidance: $("guidance").value,
    device: value("device"),
    precision: value("precision"),
  };
  return `#${new URLSearchParams(Object.entries(fields).filter(([, text]) => text !== "" && text !== "auto"))}`;
}

/** @param {import("./scm/types.js").SamplerSpec} spec */
function kindOf(spec) {
  if (spec.num_classes) return spec.num_classes === 1 ? "1 class" : `${spec.num_classes} classes`;
  if (site.prompts.length) return plural(site.prompts.length, "prompt");
  return spec.conditioning.length ? "conditional" : "unconditional";
}

/** Return whether the page has every input of the model. */
function canGenerate() {
  const filled = Object.keys(site.prompts[0]?.conditioning ?? {});
  return site.samplers[0].conditioning.every(({ name, kind }) => kind === "mask" || filled.includes(name));
}

/**
 * Set the controls to what the link asks for.
 * @returns {string} What does not fit and was left out, or "".
 */
function readLink() {
  const unfit = [];
  for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
    if (!setControl(key, text)) unfit.push(`${key}=${text}`);
  }
  return unfit.length ? `The link asks for ${unfit.join(" and ").slice(0, 200)}, which this page does not have.` : "";
}

/**
 * @param {string} key Of a link.
 * @param {string} text
 * @returns {boolean} Whether the page has it.
 */
function setControl(key, text) {
  if (key === "label" || key === "prompt") {
    const has = [...$(key).options].some((each) => each.value === text);
    if (has) $(key).value = text;
    return has;
  }
  if (key === "seed" || key === "guidance") {
    const has = key === "seed" ? /^\d{1,20}$/.test(text) : !$("guidance-field").hidden && Number.isFinite(parseFloat(text));
    if (has) $(key).value = text;
    return has;
  }
  const inputs = [...document.getElementsByName(key === "n" ? "count" : key)];
  const input = inputs.find((each) => each instanceof HTMLInputElement && each.type === "radio" && each.value === text);
  if (input instanceof HTMLInputElement) input.checked = true;
  return Boolean(input);
}

/** Say on the buttons how much is still to be fetched. */
function showCost() {
  const bytes = new Map(site.files.map((file) => [file.path, file.gzip_size || file.size]));
  const sum = (/** @type {string[]} */ paths) => paths.reduce((total, path) => total + (bytes.get(path) ?? 0), 0);
  const info = loaded?.device === value("device") ? loaded.gen.info : undefined;
  const device = info?.device ?? (value("device") === "auto" ? "wasm" : value("device"));
  const files = site.runtime.devices[/** @type {"wasm"} */ (device)];
  const runtime = info || !files ? 0 : sum(Object.values(files));
  const missing = (/** @type {({ path: string, files: string[] } | null | undefined)[]} */ graphs) =>
    graphs.reduce((total, graph) => total + (!graph || (info && loaded?.graphs.has(graph.path)) ? 0 : sum(graph.files)), 0);
  const automatic = info?.device === "webgpu" && info.hasShaderF16 ? "fp16" : "fp32";
  const precision = value("precision") === "auto" ? automatic : value("precision");
  const cost = (/** @type {number} */ total) => (total ? `, loads ${megabytes(total)}` : "");
  $("generate").textContent = `Generate${cost(runtime + missing([graphOf(chosenSteps(), precision), ...(picked ? [site.encoder] : [])]))}`;
  const proved = site.graphs.filter((graph) => !info?.graphs.find((each) => each.sha256 === shaOf(graph))?.refusal);
  $("prove").textContent = `Prove it${cost(runtime + missing(proved))}`;
}

/** @param {import("./scm/types.js").Graph} graph */
function shaOf(graph) {
  return site.files.find((file) => file.path === graph.path)?.sha256;
}

/** Say what runs, and why. */
function showWhat() {
  const stored = site.files.reduce((total, file) => total + (file.gzip_size || file.size), 0);
  /** @type {[string, string][]} */
  const rows = [
    ["Site", `${megabytes(stored)}, made by ${site.made_by}`],
    ["Graphs", site.graphs.map((g) => `${g.precision} ${plural(g.num_inference_steps, "step")}`).join(", ")],
    ["Noise", site.noise_contract],
    ["Runtime", `${site.runtime.name} ${site.runtime.version}`],
  ];
  const info = loaded?.gen.info;
  $("chip").hidden = !info;
  if (info) {
    $("chip").textContent =
      info.device === "webgpu" ? `WebGPU · ${info.adapter}` : `WebAssembly · ${plural(info.threads, "thread")}`;
    rows.push(["Device", `${NAMES[info.device]}: ${info.deviceReason}`]);
    if (info.adapter) rows.push(["Adapter", `${info.adapter}, ${info.hasShaderF16 ? "with" : "without"} shader-f16`]);
    rows.push(["Threads", `${info.threads}: ${info.threadsReason}`]);
    if (info.device === "webgpu" && shown?.info.usesCpu) {
      rows.push(["Operators", "some run on the CPU: onnxruntime-web has no WebGPU kernel for them"]);
    }
    if (shown) rows.push(["Precision", `${shown.info.precision}: ${shown.info.precisionReason}`]);
  } else {
    rows.push(["Device", "chosen when the model is loaded"]);
  }
  fill($("what"), rows.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
}

/** @param {Progress} event */
function onProgress({ phase: kind, name, loaded: done, total }) {
  $("progress").value = total ? done / total : 0;
  $("amount").textContent =
    kind === "download" ? `${megabytes(done)} of ${megabytes(total)}` : kind === "open" ? "" : `${done} of ${total}`;
  const now = `${PHASES[kind]} ${kind === "generate" ? "images" : name}…`;
  if (now !== phase) status(now); // a screen reader says it once, not with each number
  phase = now;
}

/** @param {unknown} error */
function showError(error) {
  const known = error instanceof ScmError;
  const text = error instanceof Error ? error.message : String(error);
  fill($("alert"), [element("strong", known ? `Error: ${error.code}` : "Unexpected error"), document.createTextNode(text)]);
  $("alert").hidden = false;
  $("alert").scrollIntoView({ block: "nearest" });
}

/** @param {string} text */
function status(text) {
  $("status").textContent = text;
}

/**
 * @param {string} id Of a fieldset.
 * @param {string[][]} options Value and text of each.
 * @param {string} chosen
 */
function addChoice(id, options, chosen) {
  for (const [key, text] of options) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: id, value: key });
    input.checked = key === chosen;
    label.append(input, element("span", text));
    $(id).append(label);
  }
}

/**
 * @param {string} name
 * @returns {string}
 */
function value(name) {
  const checked = document.querySelector(`input[name="${name}"]:checked`);
  return /** @type {HTMLInputElement} */ (checked).value;
}

/**
 * @param {ImageData} image
 * @param {string} text For screen readers.
 * @returns {HTMLCanvasElement}
 */
function picture(image, text) {
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  canvas.getContext("2d")?.putImageData(image, 0, 0);
  if (Math.max(image.width, image.height) <= SMALL) canvas.className = "small";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", text);
  return canvas;
}

/**
 * @param {string} name
 * @param {string} text
 * @param {string} [className]
 * @returns {any}
 */
function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

/**
 * @param {string} text
 * @param {string} name Shown before it on a narrow screen.
 * @param {string} [className]
 */
function cell(text, name, className) {
  const made = element("td", text, className);
  if (name) made.dataset.name = name;
  return made;
}

/**
 * @param {string} name
 * @param {string} text
 */
function figure(name, text) {
  const made = document.createElement("div");
  made.append(element("dt", name), element("dd", text));
  return made;
}

/**
 * @param {string} key
 * @param {string} text
 */
function option(key, text) {
  return Object.assign(document.createElement("option"), { value: key, textContent: text });
}

/**
 * @param {Element} parent
 * @param {Node[]} children
 */
function fill(parent, children) {
  parent.replaceChildren(...children);
}

/** @param {number} label */
function className(label) {
  return site.samplers[0].class_names[label] ?? `class ${label}`;
}

/**
 * @param {number} count
 * @param {string} noun
 */
function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** @param {number} bytes */
function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/** @param {number} ms */
function duration(ms) {
  return ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
