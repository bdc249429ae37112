// One image from a seed: everything runs in a web worker of scm.js, which checks every file before it uses it.
import { Generator, ScmError, toImageData } from "./scm.js";

const [form, seed, status, canvas] = ["form", "seed", "status", "canvas"].map((id) => document.getElementById(id));
const loading = Generator.load(new URL("./", import.meta.url), {
  onProgress: ({ phase, name, loaded, total }) => (status.textContent = `${phase} ${name}: ${loaded} of ${total}`),
});

async function generate() {
  try {
    const gen = await loading;
    const samples = await gen.generate({ seed: seed.value });
    const image = toImageData(samples, 0);
    [canvas.width, canvas.height] = [image.width, image.height];
    Object.assign(canvas.style, { width: "16rem", imageRendering: "pixelated" }); // the shipped model makes 16x16 pixels
    canvas.getContext("2d").putImageData(image, 0, 0);
    status.textContent = `seed ${samples.seeds[0]} by ${samples.info.backend}: ${gen.info.deviceReason}`;
  } catch (error) {
    status.textContent = error instanceof ScmError ? `${error.code}: ${error.message}` : String(error);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void generate();
});
await generate();
