"""The page in headless Chromium, used as a person uses it: mouse, keyboard, every error, and WebGPU in software."""

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from PIL import Image

from helpers.chromium import DEADLINE, Browser, Page
from helpers.node import npm_install
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.export.edge.site import SITE_NAME, read_site, write_site
from scm_sdk.images import make_grid, to_uint8
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec, default_times

Serve = Callable[[Path], str]
BUSY = "document.getElementById('controls').disabled"
ALERT = "document.getElementById('alert')"


def opened(browser: Browser, url: str, downloads: Path | None = None) -> Page:
    """Open the page and wait for its form."""
    page = browser.new_page(downloads)
    page.resize(1180, 900)
    page.open(url)
    page.wait(f"!{BUSY} || !{ALERT}.hidden")
    return page


def finish(page: Page, button: str) -> None:
    """Press a button and wait until its work ended, whichever way."""
    page.evaluate(f"{ALERT}.hidden = true")
    page.click(button)
    page.wait(f"!{BUSY} && document.getElementById('cancel').hidden")


def downloaded(path: Path) -> bytes:
    """Return a file that the browser saves, when it is whole."""
    end = monotonic() + DEADLINE
    while not path.is_file():
        assert monotonic() < end, f"{path.name} was not saved; found {[each.name for each in path.parent.iterdir()]}"
        sleep(0.05)
    return path.read_bytes()


def loaded(page: Page, options: str) -> str:
    """Load the generator in the page's own context; return its error, or "" if there is none."""
    return str(page.evaluate(
        f"import('./scm.js').then(({{ Generator }}) => Generator.load('./', {options}))"
        ".then((gen) => gen.generate({ seed: 1, steps: 1 }), (error) => { throw error; })"
        ".then(() => '', (error) => `${error.name} ${error.code}: ${error.message}`)"
    ))  # fmt: skip


def test_the_page_generates_downloads_and_proves(
    browser: Browser, site: Path, two_precisions: Path, served: Serve, tmp_path: Path
) -> None:
    page = opened(browser, served(site) + "#seed=18446744073709551609&label=2&n=4&steps=1", tmp_path)
    assert page.evaluate("crossOriginIsolated") is True
    assert page.evaluate("document.getElementById('seed').value") == "18446744073709551609"
    assert "loads" in page.text("#generate"), "the size is shown before anything is fetched"
    requests = "performance.getEntriesByType('resource').filter((e) => /model|runtime/.test(e.name)).length"
    assert page.evaluate(requests) == 0
    finish(page, "#generate")
    assert page.evaluate(f"{ALERT}.hidden"), page.evaluate(f"{ALERT}.innerText")
    assert "4 images by WebAssembly in fp32" in page.text("#status")
    captions = page.evaluate("[...document.querySelectorAll('.caption')].map((e) => e.innerText)")
    assert captions == [f"seed {2**64 - 7 + i} · robot" for i in range(4)]
    assert page.text("#generate") == "Generate", "nothing is left to be fetched"
    assert "chosen" not in page.text("#what") and "the browser offers no WebGPU" in page.text("#what")

    first, third = (
        tmp_path / f"{Bundle.open(two_precisions).manifest.name}-1step-seed{2**64 - 7 + i}.png" for i in (0, 2)
    )
    page.click("#download")
    grid = downloaded(first)
    page.click("#pictures li:nth-child(3) button")
    single = downloaded(third)
    with Generator.from_pretrained(two_precisions, backend="onnxruntime", precision="fp32") as gen:
        expected = gen(4, seed=2**64 - 7, class_labels=2, num_inference_steps=1, output_type="raw")
    levels = to_uint8(expected.images, (-1.0, 1.0))
    files = [
        (grid, make_grid(levels, 2, scale=32), expected.seeds),
        (single, make_grid(levels[2:3], 1, scale=64), [2**64 - 5]),
    ]
    for data, wanted, seeds in files:
        with Image.open(io.BytesIO(data)) as picture:
            told = json.loads(picture.text["scm"])  # type: ignore[attr-defined]
            got = np.asarray(picture).astype(int)
        assert np.abs(got - wanted).max() <= 1, "a level, where rounding falls otherwise"
        assert told["seeds"] == list(map(str, seeds)) and told["class_labels"] == [2] * len(seeds)
        assert told["build_id"] == expected.info.build_id

    finish(page, "#prove")
    assert page.text("#verdict").startswith("Pass: 4 graphs"), page.text("#verdict")
    rows = page.evaluate("[...document.querySelectorAll('#rows tr')].map((e) => e.innerText)")
    graphs = [f"{precision}, {steps}" for precision in ("fp32", "fp16") for steps in ("1 step", "2 steps")]
    assert [row.split("\t")[0] for row in rows] == graphs
    bound = next(graph.bound for graph in read_site(site).graphs if graph.precision == "fp32")
    assert f"difference at most {bound.threshold:.1e}".replace("e-0", "e-") in rows[0]
    assert page.messages == [m for m in page.messages if "No available adapters" in m], "no error, nothing blocked"


def test_the_page_by_keyboard_and_for_screen_readers(browser: Browser, site: Path, served: Serve) -> None:
    page = opened(browser, served(site))
    focused = "[document.activeElement.id || document.activeElement.name || document.activeElement.className]"
    order = []
    for _ in range(12):
        page.press("Tab")
        order.append(page.evaluate(focused)[0])
    assert order[:5] == ["skip", "label", "seed", "random", "count"]
    assert order[5:10] == ["steps", "device", "precision", "generate", "prove"]
    page.evaluate("document.querySelector('#steps input:checked').focus()")
    before = page.evaluate("document.querySelector('#steps input:checked').value")
    page.press("ArrowRight")
    assert page.evaluate("document.querySelector('#steps input:checked').value") != before
    page.evaluate("document.getElementById('seed').focus()")
    page.press("Enter", "\r")
    page.wait("document.querySelectorAll('#pictures button').length === 4")
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    names = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    assert ("textbox", "Seed") in names and ("combobox", "Class") in names and ("radio", "WebAssembly") in names
    assert any(role == "image" and name.startswith("Image of seed 0") for role, name in names)
    unnamed = [role for role, name in names if role in ("button", "image", "textbox", "combobox", "radio") and not name]
    assert unnamed == []
    assert page.evaluate("document.getElementById('status').getAttribute('aria-live')") == "polite"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_a_phone(browser: Browser, site: Path, served: Serve, dark: bool) -> None:
    page = opened(browser, served(site))
    page.resize(360, 740, dark=dark)
    finish(page, "#generate")
    finish(page, "#prove")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "no sideways scrolling"
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input[type=text]')].filter((e) => e.offsetParent)"
        ".filter((e) => e.getBoundingClientRect().height < 40).map((e) => e.id)"
    )
    assert small == [], "large enough for a finger"
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert color == ("rgb(15, 18, 23)" if dark else "rgb(244, 245, 247)")
    contrast = page.evaluate(CONTRAST)
    assert contrast >= 4.5, "of the faintest text with its background (WCAG AA)"


def test_the_keyboards_place_is_kept_and_progress_is_said_once(browser: Browser, site: Path, served: Serve) -> None:
    """Controls are off while a call runs, which takes the focus from them; a screen reader reads each status."""
    page = opened(browser, served(site))
    page.evaluate(
        "window.said = []; new MutationObserver(() => said.push(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), { childList: true, characterData: true, subtree: true })"
    )
    for button in ("generate", "prove"):
        page.evaluate(f"document.getElementById('{button}').focus()")
        page.press("Enter", "\r")
        page.wait("!document.getElementById('cancel').hidden || said.length > 0")
        page.wait(f"!{BUSY} && document.getElementById('cancel').hidden")
        assert page.evaluate("document.activeElement.id") == button
    said = page.evaluate("said")
    assert "Fetching runtime…" in said and not [text for text in said if " MB" in text], said


def test_a_link_holds_the_whole_request(browser: Browser, site: Path, served: Serve) -> None:
    """Also one that is opened in a tab that has the page; what the page does not have is said."""
    page = opened(browser, served(site) + "#seed=9&n=1&steps=1&label=2&device=wasm&precision=fp16")
    chosen = "[...document.querySelectorAll('input:checked')].map((e) => e.value).join()"
    assert page.evaluate(chosen) == "1,1,wasm,fp16"
    finish(page, "#generate")
    hash_ = page.evaluate("location.hash")
    assert hash_ == "#seed=9&n=1&steps=1&label=2&device=wasm&precision=fp16"
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#random")
    page.click("#link")
    assert page.wait("window.copied").endswith(hash_), "of the images that are shown"
    page.evaluate("location.hash = '#seed=3&n=9&steps=7&label=99&precision=fp32&color=red'")
    page.wait("document.getElementById('seed').value === '3'")
    assert page.evaluate(chosen) == "9,1,wasm,fp32"
    assert "steps=7 and label=99 and color=red, which this page does not have" in page.text("#status")


def test_a_generator_that_ended_is_replaced(browser: Browser, site: Path, served: Serve) -> None:
    page = browser.new_page()
    page.resize(1180, 900)
    kept = "class extends Worker { constructor(...a) { super(...a); made.push(this); } }"
    page.send("Page.addScriptToEvaluateOnNewDocument", source=f"window.made = []; window.Worker = {kept};")
    page.open(served(site))
    page.wait(f"!{BUSY}")
    finish(page, "#generate")
    page.evaluate("made[0].terminate(); made[0].dispatchEvent(new ErrorEvent('error', { message: 'no memory' }))")
    finish(page, "#generate")
    assert "the web worker ended: no memory" in page.text("#alert")
    finish(page, "#generate")
    assert page.evaluate(f"{ALERT}.hidden") and "4 images by WebAssembly" in page.text("#status")
    assert page.evaluate("made.length") == 2


def test_a_page_that_cannot_start_says_why(browser: Browser, site_copy: Path, served: Serve) -> None:
    page = browser.new_page()
    page.open((site_copy / "index.html").as_uri())
    page.wait("document.getElementById('facts').innerText.includes('only from a server, not from a file')")
    url, manifest = served(site_copy), json.loads((site_copy / SITE_NAME).read_text("utf-8"))
    for name in ("samplers", "graphs", "files", "runtime"):
        (site_copy / SITE_NAME).write_text(json.dumps(manifest | {name: None}), encoding="utf-8")
        page = opened(browser, url)
        assert "The site cannot be opened" in page.text("#model") and f"damaged: {name} is no" in page.text("#alert")


HOSTILE = "<img src=x onerror='window.injected=1'></option></script><script>window.injected=1</script>"


def test_texts_of_a_bundle_are_shown_as_text(
    browser: Browser, linear_bundle: Callable[..., Path], onnxruntime_web: Path, served: Serve, tmp_path: Path
) -> None:
    spec = SamplerSpec(
        times=default_times(1), sample_shape=(3, 4, 4), num_classes=2, class_names=(HOSTILE, f"b{HOSTILE}")
    )
    bundle = linear_bundle(spec, provenance={"license": HOSTILE, "training_warnings": [HOSTILE]})
    write_site(bundle, tmp_path / "site", devices=["wasm"], onnxruntime_web=onnxruntime_web)
    manifest = tmp_path / "site" / SITE_NAME
    told = json.loads(manifest.read_text("utf-8"))
    assert told["license"] == HOSTILE
    told |= {"name": HOSTILE, "notes": [HOSTILE]}  # which bundles refuse, and a changed site does not
    manifest.write_text(json.dumps(told), encoding="utf-8")
    page = opened(browser, served(tmp_path / "site"), tmp_path)
    finish(page, "#generate")
    finish(page, "#prove")
    page.evaluate("location.hash = '#' + encodeURIComponent(\"<img src=x onerror='window.injected=1'>\") + '=1'")
    page.wait("document.getElementById('status').innerText.includes('onerror')")
    assert page.evaluate("window.injected") is None and page.evaluate("document.images.length") == 0
    assert HOSTILE in page.text("#facts") and HOSTILE in page.text("#notes") and HOSTILE in page.text("#pictures")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1180, False), (360, True)], ids=["desktop", "dark phone"])
def test_axe_finds_no_obstacle(
    browser: Browser, site: Path, served: Serve, tmp_path: Path, width: int, dark: bool
) -> None:
    """WCAG 2.2 A and AA, and good practice, at the start, with images and a proof, and with an error."""
    npm_install(Path(__file__).parent / "axe", tmp_path)
    page = opened(browser, served(site))
    page.resize(width, 900, dark=dark)
    page.evaluate((tmp_path / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8") + "; 0")

    def obstacles() -> list[str]:
        found = page.evaluate("axe.run().then((found) => [found.violations, found.passes.length])")
        assert found[1] > 20, "rules were applied"
        return [f"{each['id']}: {node['html']}" for each in found[0] for node in each["nodes"]]

    assert obstacles() == []
    finish(page, "#generate")
    finish(page, "#prove")
    assert obstacles() == []
    page.evaluate("document.getElementById('seed').value = 'x'")
    finish(page, "#generate")
    assert not page.evaluate(f"{ALERT}.hidden") and obstacles() == []
    page.evaluate("document.querySelector('label[for=seed]').remove()")
    assert [each for each in obstacles() if each.startswith("label: ")], "an obstacle would be found"


CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = parse(c).map((v) => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  const texts = [...document.querySelectorAll("p, dt, dd, th, td, label, legend, button, span, h1, h2")]
    .filter((e) => e.offsetParent && e.innerText.trim() && !e.closest(":disabled"));
  return Math.min(...texts.map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
})()"""


def test_the_page_computes_nothing_itself_and_calls_end_when_asked(browser: Browser, site: Path, served: Serve) -> None:
    """The work is in a worker, so that the page stays responsive; an aborted or closed call ends without images."""
    page = opened(browser, served(site))
    told = page.evaluate(
        """(async () => {
          let here = 0;
          for (const name of ["compile", "instantiate", "compileStreaming", "instantiateStreaming"]) {
            WebAssembly[name] = () => { here += 1; throw new Error("in the page"); };
          }
          const { Generator } = await import("./scm.js");
          const gen = await Generator.load("./");
          await gen.prepare({ steps: 2 });
          const controller = new AbortController();
          const events = [];
          const call = gen.generate({ seed: 1, numImages: 2000, batchSize: 5, signal: controller.signal,
            onProgress: (e) => { events.push(e.loaded); if (e.loaded >= 20) controller.abort(); } });
          const ended = await call.then(() => "done", (error) => error.name);
          const after = await gen.generate({ seed: 1 });
          const closing = gen.generate({ seed: 1, numImages: 2000, onProgress: (e) => e.loaded || gen.close() });
          return [ended, here, events.at(-1), after.shape[0], await closing.catch((error) => error.code)];
        })()"""
    )
    assert told == ["AbortError", 0, 20, 1, "closed"]


def test_the_page_can_be_cancelled(
    browser: Browser, site: Path, served: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server holds a graph back until the button was pressed."""
    from scm_sdk.export.edge import site_server

    asked, go_on, read = threading.Event(), threading.Event(), site_server.read_regular

    def held(path: Path, *, most: int) -> bytes:
        if path.suffix == ".onnx":
            asked.set()
            go_on.wait(DEADLINE)
        return read(path, most=most)

    monkeypatch.setattr(site_server, "read_regular", held)
    page = opened(browser, served(site))
    page.click("#generate")
    assert asked.wait(DEADLINE)
    page.click("#cancel")
    page.wait(f"!{BUSY}")
    assert page.text("#status") == "Cancelled." and page.evaluate(f"{ALERT}.hidden")
    go_on.set()
    finish(page, "#generate")
    assert "4 images by WebAssembly" in page.text("#status")


def test_what_was_asked_for_and_is_not_there_is_an_error(browser: Browser, site: Path, served: Serve) -> None:
    page = opened(browser, served(site))
    page.click("#device label:last-of-type")
    assert page.evaluate("document.querySelector('#device input:checked').value") == "webgpu"
    finish(page, "#generate")
    alert = page.text("#alert")
    assert "no-webgpu" in alert and "Take device wasm" in alert
    page.evaluate("document.getElementById('seed').value = 'x'")
    page.click("#device label:nth-of-type(2)")
    finish(page, "#generate")
    alert = page.text("#alert")
    assert "bad-argument" in alert and 'seed is "x"' in alert


def test_a_page_without_shared_memory_runs_one_thread_and_says_so(
    browser: Browser, site_copy: Path, served: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scm_sdk.export.edge import site_server

    monkeypatch.setattr(site_server, "HEADERS", {})
    page = opened(browser, served(site_copy))
    assert page.evaluate("crossOriginIsolated") is False
    finish(page, "#generate")
    assert "1: the page is not cross-origin isolated (no COOP and COEP headers)" in page.text("#what")
    error = loaded(page, "{ threads: 2 }")
    assert error.startswith("ScmError no-threads: ") and "Cross-Origin-Opener-Policy" in error


def test_damaged_files_and_lost_connections_are_named(browser: Browser, site_copy: Path, served: Serve) -> None:
    url = served(site_copy)
    model = site_copy / "model/onnx/fp32/2step/model.onnx"
    whole = model.read_bytes()
    for damaged, fact in [
        (whole[:-9], f"has {len(whole) - 9} bytes, expected {len(whole)}"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "changed or damaged"),
    ]:
        model.write_bytes(damaged)
        page = opened(browser, url)
        finish(page, "#generate")
        alert = page.text("#alert")
        assert "integrity" in alert and fact in alert, alert
    model.unlink()
    finish(page, "#generate")
    assert "the server answered 404" in page.text("#alert")
    model.write_bytes(whole)
    page.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    worker = "import('./scm.js').then(({ Generator }) => Generator.load('./', { worker: false }))"
    text = page.evaluate(f"{worker}.then(() => '', (error) => `${{error.code}}: ${{error.message}}`)")
    assert text.startswith("network: ") and "Check the connection" in text
    (site_copy / SITE_NAME).unlink()
    page = opened(browser, url)
    assert "The site cannot be opened" in page.text("#model") and "network" in page.text("#alert")


def test_nothing_leaves_the_origin_and_the_policy_holds(browser: Browser, site: Path, served: Serve) -> None:
    page = opened(browser, served(site))
    finish(page, "#generate")
    hosts = page.evaluate(
        "[...new Set(performance.getEntriesByType('resource').map((e) => new URL(e.name).origin))].join()"
        " === location.origin"
    )
    assert hosts
    inline = "Object.assign(document.createElement('script'), { textContent: 'window.injected = 1' })"
    page.evaluate(f"document.body.append({inline})")
    assert page.evaluate("window.injected") is None
    refused = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    assert refused == "refused" and any("Content Security Policy" in message for message in page.messages)


@pytest.mark.slow
def test_webgpu_in_software_makes_the_recorded_samples(software_gpu: Browser, site: Path, served: Serve) -> None:
    """fp32 alone: SwiftShader has no shader-f16, and the page says that."""
    page = opened(software_gpu, served(site))
    finish(page, "#generate")
    assert "WebAssembly" in page.text("#status") and "computes on the CPU" in page.text("#what")
    page.click("#device input[value=webgpu] + span")
    finish(page, "#generate")
    assert "by WebGPU in fp32" in page.text("#status"), page.text("#alert")
    assert "without shader-f16" in page.text("#what") and "run on the CPU" not in page.text("#what")
    finish(page, "#prove")
    assert page.text("#verdict").startswith("Pass: 2 graphs made the recorded samples on WebGPU")
    rows = page.evaluate("[...document.querySelectorAll('#rows tr')].map((e) => e.innerText)")
    assert len(rows) == 4 and all("not run" in row and "no shader-f16" in row for row in rows[2:])
    error = str(page.evaluate(
        "import('./scm.js').then(({ Generator }) => Generator.load('./', { device: 'webgpu' }))"
        ".then((gen) => gen.generate({ precision: 'fp16' }))"
        ".then(() => '', (error) => `${error.code}: ${error.message}`)"
    ))  # fmt: skip
    assert error.startswith("no-shader-f16: ") and "Take precision fp32" in error
