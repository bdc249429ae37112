// Images from a site of `scm-export web`, in Node:
//
//     scm-export web scm-demo/avatars -o site
//     node examples/web/node.mjs site red.png 7 red
//
// Prints what ran and how far the recorded samples are from those that this machine makes.

import { writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { argv, exit } from "node:process";
import { pathToFileURL } from "node:url";

const [site, out, seed = "0", label] = argv.slice(2);
if (!site || !out) {
  console.error("usage: node examples/web/node.mjs SITE OUT.png [SEED] [LABEL]");
  exit(2);
}
const folder = pathToFileURL(resolve(site)).href;
const { Generator, ScmError, toPng } = await import(`${folder}/scm.js`);
try {
  const gen = await Generator.load(`${folder}/`);
  const samples = await gen.generate({ seed, numImages: 4, classLabels: label });
  const png = await toPng(samples, { scale: 8 });
  await writeFile(out, new Uint8Array(await png.arrayBuffer()));
  const { info } = samples;
  console.log(`${out}: 4 images by ${info.backend} ${info.precision}, ${info.steps} steps, ${info.medianMs.toFixed(1)} ms each`);
  for (const { samples: made, difference, passed } of await gen.prove()) {
    const { precision, steps } = made.info;
    const max = difference.maxAbs.toExponential(1);
    console.log(`${passed ? "pass" : "FAIL"}  ${precision}, ${steps} steps: max ${max}, PSNR ${difference.psnrDb.toFixed(1)} dB`);
  }
  await gen.close();
} catch (error) {
  if (!(error instanceof ScmError)) throw error;
  console.error(`${error.code}: ${error.message}`);
  exit(1);
}
