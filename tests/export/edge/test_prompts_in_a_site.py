"""A text-to-image pipeline in a site: its prompts are encoded when the site is made."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.chromium import Browser
from helpers.node import run_node
from helpers.sana_fixtures import PROMPTS
from scm_sdk.errors import ConfigError
from scm_sdk.export.edge.site import SITE_NAME, read_site, write_site
from scm_sdk.inference.generator import Generator

SCRIPT = """
const { Generator } = await import(`${args[0]}/scm.js`);
const gen = await Generator.load(`${args[0]}/`);
const proofs = await gen.prove();
const samples = await gen.generate({ prompt: args[1], seed: 5, numImages: 2, steps: 2, guidanceScale: 4 });
const wrong = [];
const conditioning = { prompt_embeds: new Float32Array(1) };
for (const request of [{ prompt: "a fox" }, {}, { prompt: args[1], conditioning }]) {
  wrong.push(await gen.generate(request).then(() => "", (error) => `${error.code}: ${error.message}`));
}
done({
  prompts: gen.info.prompts, images: Array.from(samples.images), wrong,
  proofs: proofs.map(({ difference, passed, goldenSource, samples }) =>
    [samples.info.steps, difference.maxAbs, difference.psnrDb, passed, goldenSource]),
});
"""


@pytest.mark.slow
def test_prompts_and_recorded_samples(sana_bundle: Path, onnxruntime_web: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    site = tmp_path / "site"
    report = write_site(
        sana_bundle, site, devices=["wasm"], precisions=["fp32"], steps=[1, 2], prompts=tmp_path / "prompts.txt",
        onnxruntime_web=onnxruntime_web,
    )  # fmt: skip
    assert not any("--prompts" in note for note in report.notes)
    assert [prompt.text for prompt in read_site(site).prompts] == PROMPTS
    told = run_node(SCRIPT, site.as_uri(), PROMPTS[1])
    assert told["prompts"] == PROMPTS
    assert [(steps, passed) for steps, _, _, passed, _ in told["proofs"]] == [(1, True), (2, True)]
    assert all(max_abs > 0 and maker == "PyTorch at export" for _, max_abs, _, _, maker in told["proofs"])
    with Generator.from_pretrained(sana_bundle, backend="onnxruntime", precision="fp32") as gen:
        expected = gen(
            2, prompt=PROMPTS[1], seed=5, num_inference_steps=2, guidance_scale=4.0, output_type="raw"
        ).images
    images = np.array(told["images"], np.float32).reshape(expected.shape)
    bound = max(graph.bound.threshold for graph in read_site(site).graphs)
    assert np.abs(images - expected).max() <= bound * gen_sigma(site)
    fox, nothing, both = told["wrong"]
    assert fox.startswith("bad-argument: ") and "a fox" in fox and json.dumps(PROMPTS[0]) in fox
    assert nothing.startswith("bad-argument: ") and "prompt_embeds is missing" in nothing
    assert both.startswith("bad-argument: ") and "are both given" in both


def gen_sigma(site: Path) -> float:
    """Return the unit of the bounds."""
    return float(json.loads((site / SITE_NAME).read_text("utf-8"))["samplers"][0]["sigma_data"])


def test_prompts_for_a_model_without_are_refused(unet_bundle: Path, onnxruntime_web: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat", encoding="utf-8")
    for name, fact in [("prompts.txt", "takes no prompt"), ("x.safetensors", "expected a text file")]:
        with pytest.raises(ConfigError, match=fact):
            write_site(unet_bundle, tmp_path / "site", prompts=tmp_path / name, onnxruntime_web=onnxruntime_web)
    assert not (tmp_path / "site").exists()


@pytest.mark.slow
def test_operators_without_a_webgpu_kernel_are_told(
    software_gpu: Browser, sana_bundle: Path, onnxruntime_web: Path, tmp_path: Path, served: Callable[[Path], str]
) -> None:
    """The pipeline has such operators; the page generates from a prompt, proves, and names where it ran."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    site = tmp_path / "site"
    write_site(
        sana_bundle, site, precisions=["fp32"], steps=[1], prompts=tmp_path / "prompts.txt",
        onnxruntime_web=onnxruntime_web,
    )  # fmt: skip
    page = software_gpu.new_page()
    page.open(served(site))
    page.wait("!document.getElementById('controls').disabled")
    page.evaluate("document.querySelector('#device input[value=webgpu]').click()")
    page.evaluate("document.getElementById('prompt').value = '1'")
    for button in ("generate", "prove"):
        page.evaluate(f"document.getElementById('{button}').click()")
        page.wait("document.getElementById('cancel').hidden", timeout=300)
    assert page.evaluate("document.getElementById('alert').hidden"), page.evaluate(
        "document.getElementById('alert').innerText"
    )
    assert "WebGPU and CPU, fp32" in page.text("#figures") and "some run on the CPU" in page.text("#what")
    assert page.text("#verdict").startswith("Pass: 1 graph ")
