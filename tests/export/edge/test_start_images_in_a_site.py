"""Image-to-image in a site: the first noise has the bits of Python, and the page starts from a chosen file."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.chromium import Browser, Page
from helpers.node import npm_install, run_node
from helpers.servers import running
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.export.edge.site import SITE_NAME, read_site, write_site
from scm_sdk.images import to_uint8
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.sources import open_source
from scm_sdk.inference.start import StartImages
from scm_sdk.spec import SamplerSpec

START = 0.9
OFFSET = """
import { toData, toOffset } from "./scm/start.js";
const hex = (array) => Buffer.from(array.buffer).toString("hex");
done(args[0].map(([spec, rgba]) => {
  const [, height, width] = spec.sample_shape;
  const image = { width, height, data: Uint8Array.from(rgba) };
  return hex(toOffset(toData(image, spec.sample_shape, spec.value_range), spec));
}));
"""
CALL = """
const scm = await import(`${args[0]}/scm.js`);
const gen = await scm.Generator.load(`${args[0]}/`);
const found = [];
for (const { image, ...request } of args[1]) {
  try {
    if (image) request.image = { width: image[0], height: image[1], data: Uint8Array.from(image[2]) };
    const samples = await gen.generate(request);
    found.push({ steps: samples.info.steps, images: Array.from(samples.images) });
  } catch (error) {
    found.push({ error: `${error.code}: ${error.message}` });
  }
}
done({ starts: gen.info.starts, found });
"""

LOAD = """
const { Generator } = await import(`${args[0]}/scm.js`);
done(await Generator.load(`${args[0]}/`).then(() => "", (error) => `${error.code}: ${error.message}`));
"""


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """Return a picture, (H, W, 3), uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rgba(picture: np.ndarray, alpha: int = 255) -> list[Any]:
    """Return width, height and RGBA pixels."""
    height, width = picture.shape[:2]
    whole = np.concatenate([picture, np.full((height, width, 1), alpha, np.uint8)], axis=2)
    return [width, height, whole.ravel().tolist()]


@pytest.fixture(scope="module")
def start_site(start_bundle: Path, onnxruntime_web: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a site of it; read only."""
    folder = tmp_path_factory.mktemp("site") / "site"
    write_site(start_bundle, folder, devices=["wasm"], onnxruntime_web=onnxruntime_web)
    return folder


def test_the_offset_of_the_noise_has_the_bits_of_python(linear_bundle: Callable[..., Path]) -> None:
    cases, wanted = [], []
    for time, sigma, value_range, channels in [
        (0.9, 0.5, (-1.0, 1.0), 3), (1.1, 1.0, (0.0, 1.0), 1), (1.3, 0.37, (-1.7, 2.3), 3),
        (0.001, 2.0, (-3.0, 0.1), 1),
    ]:  # fmt: skip
        spec = SamplerSpec(times=(time,), sample_shape=(channels, 16, 16), sigma_data=sigma, value_range=value_range)
        image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, axis=2)
        if channels == 3:
            image = np.stack([image[..., 0], image[::-1, :, 0], pixels(0, 16, 16)[..., 0]], axis=2)
        source = open_source(linear_bundle(spec, name=f"linear{len(cases)}"))
        wanted.append(StartImages(source, device=None, num_threads=None).offset(spec, 1, image))
        told = {"times": spec.times, "sample_shape": spec.sample_shape, "sigma_data": sigma, "value_range": value_range}
        cases.append((told, rgba(np.broadcast_to(image, (16, 16, 3)))[2]))
    for found, expected in zip(run_node(OFFSET, cases), wanted, strict=True):
        assert expected is not None
        assert bytes.fromhex(found) == np.ascontiguousarray(expected, "<f4").tobytes()


def test_a_seed_and_an_image_give_the_sample_of_python(start_site: Path, start_bundle: Path) -> None:
    image = rgba(pixels(1))
    request = {"seed": 5, "numImages": 3, "classLabels": 1, "image": image, "startTime": START}
    told = run_node(CALL, start_site.as_uri(), [request, request | {"image": rgba(pixels(2)), "steps": 1}])
    assert told["starts"] == [{"steps": 1, "time": START}]
    with Generator.from_pretrained(start_bundle, backend="onnxruntime", num_threads=1) as gen:
        spec = gen.opened(1).spec
        bound = min(graph.bound.threshold for graph in read_site(start_site).graphs)
        found = [np.array(each["images"], np.float32).reshape(3, *spec.image_shape) for each in told["found"]]
        for seed, images in zip((1, 2), found, strict=True):
            expected = gen(3, 1, seed=5, image=pixels(seed), start_time=START, output_type="raw").images
            assert np.abs(images - expected).max() <= bound * spec.sigma_data
    assert np.abs(found[0] - found[1]).max() > 100 * bound


def test_images_that_do_not_fit_are_refused_with_what_was_found(start_site: Path) -> None:
    good = rgba(pixels(1))
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"image": rgba(pixels(1, 8, 9)), "startTime": START}, ["bad-argument", "9x8", "8x8"]),
        ({"image": [8, 8, [0]], "startTime": START}, ["bad-argument", "no ImageData"]),
        ({"image": rgba(pixels(1), alpha=254), "startTime": START}, ["bad-argument", "transparent"]),
        ({"image": good}, ["bad-argument", "startTime is undefined", "0.9 (1 steps)"]),
        ({"image": good, "startTime": 1.1}, ["bad-argument", "startTime is 1.1", "0.9 (1 steps)"]),
        ({"image": good, "startTime": "0.9"}, ["bad-argument", "startTime is 0.9"]),
        ({"image": good, "startTime": START, "steps": 2}, ["bad-argument", "steps is 2", "expected 1"]),
        ({"startTime": START}, ["bad-argument", "without an image"]),
    ]
    told = run_node(CALL, start_site.as_uri(), [request for request, _ in cases])["found"]
    for answer, (_, facts) in zip(told, cases, strict=True):
        assert all(fact in answer["error"] for fact in facts), answer


def test_a_site_that_starts_from_noise_takes_no_image(site: Path) -> None:
    assert (read_site(site).start_steps, read_site(site).encoder) == ((), None)
    told = run_node(CALL, site.as_uri(), [{"image": rgba(pixels(1)), "startTime": START}])
    assert told["starts"] == [] and "unsupported" in told["found"][0]["error"]
    assert "--start-time" in told["found"][0]["error"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"start_steps": [7]}, "start_steps holds 7"),
        ({"start_steps": None}, "start_steps is no list"),
        ({"encoder": {"path": 1, "files": ["x"], "devices": ["wasm"]}}, "encoder.path is no string"),
    ],
)
def test_a_damaged_manifest_is_refused(start_site: Path, tmp_path: Path, change: dict[str, Any], found: str) -> None:
    site = Path(shutil.copytree(start_site, tmp_path / "site"))
    manifest = json.loads((site / SITE_NAME).read_text(encoding="utf-8"))
    (site / SITE_NAME).write_text(json.dumps(manifest | change), encoding="utf-8")
    told = run_node(LOAD, site.as_uri())
    assert told.startswith("manifest: ") and found in told


@pytest.mark.slow
def test_a_model_of_latents_encodes_the_image_in_the_browser(
    sana_image_bundle: Path, onnxruntime_web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    report = write_site(sana_image_bundle, site, devices=["wasm"], precisions=["fp32"], onnxruntime_web=onnxruntime_web)
    manifest = read_site(site)
    assert manifest.start_steps == (1,) and manifest.encoder is not None
    assert not any("encoder" in note for note in report.notes)
    spec = Bundle.open(sana_image_bundle).spec(1)
    rng = np.random.default_rng(3)
    words = {
        tensor.name: np.ones((1, *tensor.shape), np.int64) if tensor.kind == "mask"
        else rng.standard_normal((1, *tensor.shape)).astype(np.float32)
        for tensor in spec.conditioning
    }  # fmt: skip
    size = spec.image_shape[1]
    script = CALL.replace(
        "const samples",
        "request.conditioning = { prompt_embeds: Float32Array.from(request.embeds) }; delete request.embeds;\n"
        "    const samples",
    )
    request = {
        "seed": 4, "image": rgba(pixels(1, size, size)), "startTime": 1.1, "guidanceScale": 4.5,
        "embeds": words["prompt_embeds"].ravel().tolist(),
    }  # fmt: skip
    (answer,) = run_node(script, site.as_uri(), [request])["found"]
    with Generator.from_pretrained(sana_image_bundle, backend="onnxruntime", num_threads=1) as gen:
        wanted = gen(
            1, seed=4, image=pixels(1, size, size), start_time=1.1, guidance_scale=4.5, output_type="raw", **words
        ).images
    found = np.array(answer["images"], np.float32).reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)

    monkeypatch.setattr("scm_sdk.export.edge.site._ADDRESSABLE", 30_000)
    monkeypatch.setattr("scm_sdk.export.edge.site._check_size", lambda *_: None)
    report = write_site(
        sana_image_bundle, tmp_path / "small", devices=["wasm"], precisions=["fp32"], onnxruntime_web=onnxruntime_web
    )
    assert (read_site(tmp_path / "small").start_steps, read_site(tmp_path / "small").encoder) == ((), None)
    assert any("takes no image to start from" in note and "encoder/model.onnx" in note for note in report.notes)


def choose(page: Page, file: Path) -> None:
    """Choose a file as the image to start from."""
    root = page.send("DOM.getDocument")["root"]["nodeId"]
    node = page.send("DOM.querySelector", nodeId=root, selector="#image")["nodeId"]
    page.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])


def test_the_page_starts_from_a_file(
    browser: Browser, start_site: Path, start_bundle: Path, served: Callable[[Path], str], tmp_path: Path
) -> None:
    busy = "document.getElementById('controls').disabled"
    Image.fromarray(pixels(1)).save(tmp_path / "in.png")
    (tmp_path / "no.png").write_text("no picture", encoding="utf-8")
    page = browser.new_page()
    page.resize(1180, 900)
    page.open(served(start_site) + "#seed=3&n=1&label=1")
    page.wait(f"!{busy}")
    choose(page, tmp_path / "no.png")
    page.wait("!document.getElementById('alert').hidden")
    assert (
        "no.png is no picture" in page.text("#alert")
        and page.evaluate("document.getElementById('steps').hidden") is False
    )
    choose(page, tmp_path / "in.png")
    page.wait("document.getElementById('steps').hidden")
    assert page.evaluate("document.getElementById('alert').hidden")
    assert "0.9 rad (62 %), 1 step" in page.text("#start")
    page.click("#generate")
    page.wait(f"!{busy} && document.querySelectorAll('#pictures canvas').length === 1")
    assert page.evaluate("document.getElementById('alert').hidden"), page.text("#alert")
    shown = page.evaluate(
        "Array.from(document.querySelector('#pictures canvas').getContext('2d').getImageData(0, 0, 8, 8).data)"
    )
    with Generator.from_pretrained(start_bundle, backend="onnxruntime", num_threads=1) as gen:
        raw = gen(1, 1, seed=3, image=pixels(1), start_time=START, output_type="raw").images
    wanted = to_uint8(raw, (-1.0, 1.0))[0].astype(int)
    assert np.abs(np.array(shown).reshape(8, 8, 4)[..., :3] - wanted).max() <= 1, (
        "a level, where rounding falls otherwise"
    )
    page.click("#link")
    assert "cannot hold the image" in page.text("#status")
    page.click("#no-image")
    page.wait("!document.getElementById('steps').hidden")
    assert page.evaluate("document.getElementById('start-field').hidden && document.activeElement.id") == "image"
    page.click("#generate")
    page.wait(f"!{busy} && document.getElementById('status').innerText.includes('1 image')")
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#link")
    assert "steps=2" in page.wait("window.copied")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1180, False), (360, True)], ids=["desktop", "dark phone"])
def test_axe_finds_no_obstacle_with_an_image(
    browser: Browser, start_site: Path, served: Callable[[Path], str], tmp_path: Path, width: int, dark: bool
) -> None:
    npm_install(Path(__file__).parent / "axe", tmp_path)
    Image.fromarray(pixels(1, 30, 40)).save(tmp_path / "in.png")
    page = browser.new_page()
    page.resize(width, 900, dark=dark)
    page.open(served(start_site))
    page.wait("!document.getElementById('controls').disabled")
    page.evaluate((tmp_path / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8") + "; 0")
    choose(page, tmp_path / "in.png")
    page.wait("document.getElementById('steps').hidden")
    found = page.evaluate("axe.run().then((found) => [found.violations.map((each) => each.id), found.passes.length])")
    assert found[0] == [] and found[1] > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_the_page_of_a_server_starts_from_a_file(browser: Browser, start_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    Image.fromarray(pixels(1)).save(tmp_path / "in.png")
    with running(start_bundle, "--backend", "onnxruntime") as server:
        page = browser.new_page()
        page.open(server.url + "/")
        page.wait("!document.getElementById('image-field').hidden")
        choose(page, tmp_path / "in.png")
        page.wait("document.getElementById('steps-field').hidden && !document.getElementById('start-field').hidden")
        page.evaluate("document.getElementById('seed').value = '3'; document.getElementById('label').value = '1'")
        page.click("#go")
        page.wait("document.getElementById('state').textContent.includes('4 images, the first')")
        url = page.evaluate("document.querySelector('#pictures img').src")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
    with Generator.from_pretrained(start_bundle, backend="onnxruntime", num_threads=1) as gen:
        wanted = gen(1, 1, seed=3, image=pixels(1), start_time=START, output_type="uint8").images[0]
    np.testing.assert_array_equal(shown, wanted)
