"""The report: one page that loads nothing, shows what was recorded and measured, and cannot be written into."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from helpers.chromium import chromium
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import Artifact, EngineFacts
from scm_sdk.bundle.status import ModelStatus
from scm_sdk.errors import BackendUnavailable, ConfigError, SchemaError
from scm_sdk.evaluate.stored_budgets import keep_budgets
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.report import render
from scm_sdk.report.collect import Report, collect
from scm_sdk.report.figures import error_histogram, provenance
from scm_sdk.report.render import verdict, write_report


@pytest.fixture(scope="module")
def validated(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("report") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[1], num_samples=1)
    validate_bundle(path, backends=["onnxruntime"], num_seeds=5)
    return path


@pytest.fixture(scope="module")
def pages(validated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "report.html"
    arguments = ["report", str(validated), "-o", str(out), "--num-images", "6", "--rounds", "3"]
    arguments += ["--backend", "onnxruntime"]
    run = CliRunner().invoke(main, [*arguments, "--batch", "1", "--batch", "4", "--batch", "99", "--json"])
    assert run.exit_code == 0, run.output
    assert [Path(p).suffix for p in json.loads(run.stdout)["files"]] == [".html", ".md", ".json"]
    return out


def test_the_page_holds_everything_and_loads_nothing(pages: Path) -> None:
    html = pages.read_text(encoding="utf-8")
    assert "validated: 3 of 3 artifacts passed" in html
    for part in (
        "onnxruntime fp16, 1 step",
        "derived from the noise floor",
        "at most 4 noise floors",
        "reruns on noise",
        "permutation",
        "minimum PSNR of this precision",
        "Throughput",
    ):
        assert part in html, part
    assert html.count("<svg") == 6  # bars, a histogram for each of two samplers, two of speed, provenance
    loads = re.findall(
        r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import|<link""", html.partition("<script>")[0]
    )
    assert all(a.startswith("#") or b.startswith("#") for a, b in loads), loads
    json_form = json.loads(pages.with_suffix(".json").read_text("utf-8"))
    assert html.count("data:image/png;base64,") == 3 * 3  # the reference, the artifact, the difference
    assert [latency["batch"] for latency in json_form["latency"]] == [1, 4], "99 is above the largest batch"
    assert {m["name"] for m in json_form["measured_here"]} == {"torch fp32", "onnxruntime fp32", "onnxruntime fp16"}
    table = pages.with_suffix(".md").read_text("utf-8")
    assert "| `onnx/fp16/1step/model.onnx` | onnxruntime | pass |" in table and "| 4 | torch fp32 |" in table


def test_the_page_works_in_a_browser(pages: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Debian's chromium is not installed")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1180,2400",
         f"--screenshot={picture}", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", pages.as_uri()],
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r'id="said">[\d.]+ dB, largest error', done.stdout), "the script ran"
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (1180, 2400) and len(image.convert("RGB").getcolors(1 << 24) or []) > 200


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_read_on_any_screen_and_by_keyboard(pages: Path, width: int) -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.resize(width, 800)
        page.open(pages.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling of the page"
        boxes = "[...document.querySelectorAll('.scroll, pre')]"
        hidden = f"{boxes}.filter((e) => e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight)"
        assert page.evaluate(f"{hidden}.every((e) => e.tabIndex === 0 && e.ariaLabel)"), "arrow keys reach what is cut"
        lines = (
            "(e) => { const r = document.createRange(); r.selectNodeContents(e); return r.getClientRects().length; }"
        )
        assert page.evaluate(f"Math.max(...[...document.querySelectorAll('td.n')].map({lines}))") == 1, "whole numbers"
        cut = page.evaluate(
            "[...document.querySelectorAll('svg text')].filter((e) => e.getBoundingClientRect().right"
            " > e.ownerSVGElement.getBoundingClientRect().right + 1).map((e) => e.textContent)"
        )
        assert cut == []
        assert page.evaluate("[...document.querySelectorAll('th')].every((e) => e.innerText)")
        assert page.evaluate("document.querySelectorAll('main').length") == 1 and page.messages == []


def test_a_bundle_that_was_never_validated_says_so(unet_bundle: Path, tmp_path: Path) -> None:
    write_report(collect(unet_bundle, num_images=2, rounds=0), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text("utf-8")
    assert "not validated" in html and "Nothing is recorded" in html and "Speed on this machine" not in html
    assert "quality: not measured" in html and "<p>Not measured." in html


def test_a_page_says_what_the_model_is_and_what_made_the_page(pages: Path) -> None:
    json_form = json.loads(pages.with_suffix(".json").read_text("utf-8"))
    assert json_form["status"]["quality_measured"] is False and json_form["status"]["kind"] == "unknown"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", json_form["date"])
    assert set(json_form["versions"]) == {"scm_sdk", "torch", "onnxruntime"} and "unknown" not in json_form["versions"]
    for form in (pages, pages.with_suffix(".md")):
        text = form.read_text("utf-8")
        assert "objective not on record" in text and "training: length not on record" in text
        assert "quality: not measured" in text and json_form["date"] in text and "ladder" not in text
        assert f"onnxruntime {json_form['versions']['onnxruntime']}" in text


def test_the_card_on_a_page_agrees_with_the_page(pages: Path) -> None:
    """The bundle was validated before: its card, which is shown on the page, says so."""
    assert "| not compared |" not in pages.read_text(encoding="utf-8")


def test_a_page_says_what_to_do_next(pages: Path, unet_bundle: Path, tmp_path: Path) -> None:
    for form in (pages, pages.with_suffix(".md")):
        text = form.read_text("utf-8")
        assert "What to do next" in text and "scm-export evaluate" in text and "--keep-budget" in text
        assert "scm-export bundle pack" in text, "everything was validated"
    bare = collect(unet_bundle, backends=["onnxruntime"], num_images=1, rounds=0, checks=False)
    commands = [step["command"] for step in render.next_steps(bare)]
    assert commands[0] == f"scm-export validate {unet_bundle}" and not any("pack" in each for each in commands)
    assert render.next_steps(replace(bare, status=ModelStatus.of({"objective": "diffusion"})))[0]["text"].startswith(
        "this is a diffusion model"
    )
    write_report(bare, tmp_path / "r.html")
    assert "Self-checks</h2>" not in (tmp_path / "r.html").read_text("utf-8")
    assert "## Self-checks" not in (tmp_path / "r.md").read_text("utf-8")


def test_a_teacher_is_warned_of_on_its_page(validated: Path, tmp_path: Path) -> None:
    report = collect(validated, backends=["onnxruntime"], num_images=2, rounds=0)
    teacher = ModelStatus.of({"objective": "diffusion", "iteration": "20", "num_iterations": "60"})
    write_report(Report(**{**vars(report), "status": teacher}), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "<b>Warning:</b> this is a diffusion model (a teacher)" in text
    assert "training is unfinished: 20 of 60 iterations" in text


def with_manifest(report: Report, **changes: object) -> Report:
    return Report(**{**vars(report), "manifest": msgspec.structs.replace(report.manifest, **changes)})


def test_text_of_a_bundle_cannot_become_code(validated: Path, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    report = collect(validated, backends=["onnxruntime"], num_images=2, rounds=0)
    record = msgspec.structs.replace(report.manifest.parity[0], reason=evil, passed=False)
    write_report(with_manifest(report, name=evil, provenance={"data": evil}, parity=(record,)), tmp_path / "r.html")
    html, markdown = (tmp_path / "r.html").read_text("utf-8"), (tmp_path / "r.md").read_text("utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "<script>" not in markdown and "&lt;script>alert" in markdown
    evil = "<img src=x> ![x](http://x) [x](http://x)\x1b[2J|\n# x"
    record = msgspec.structs.replace(record, fault=evil)
    write_report(with_manifest(report, name=evil, provenance={"data": evil}, parity=(record,)), tmp_path / "r.html")
    text = (tmp_path / "r.md").read_text("utf-8")
    assert "<img" not in text and "![x](" not in text and " [x](" not in text and "\x1b" not in text
    assert text.startswith("# &lt;img src=x> !\\[x](http://x)") and "\n# x" not in text
    assert "1 of 1 comparisons failed" in html and "set manually" in html


def test_the_graph_of_files_survives_odd_manifests(validated: Path) -> None:
    manifest = Bundle.open(validated).manifest
    first, *rest = manifest.files
    odd = msgspec.structs.replace(first, path="a$b^{<x>", built_from=("a$b^{<x>", "missing"))
    svg = provenance(msgspec.structs.replace(manifest, files=(odd, *rest)))
    assert "a$b^{&lt;x&gt;" in svg and "missing" not in svg


def test_what_cannot_be_reported(validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(main, ["report", str(validated), "-o", str(tmp_path / "r.html"), "--rounds", "1"])
    assert run.exit_code == 2 and "1 round has no variance" in run.stderr
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="holds no checkpoint to compare with"):
        patch.setattr(Bundle, "artifacts", lambda self, **_: [])
        collect(validated)

    def absent(module: str, **_: object) -> None:
        raise BackendUnavailable(f"a report needs {module}")

    monkeypatch.setattr(render, "require", absent)
    with pytest.raises(BackendUnavailable, match="needs jinja2"):
        write_report(collect(validated, backends=["onnxruntime"], num_images=2, rounds=0), tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_badge_claims_no_more_than_is_on_record(validated: Path) -> None:
    manifest = Bundle.open(validated).manifest
    assert verdict(manifest) == {"kind": "pass", "text": "validated: 3 of 3 artifacts passed"}
    facts = EngineFacts(
        library_version="1.0.0.0", compute_capabilities=("8.0",), platform="linux-x86_64", batch=(1, 1, 1)
    )
    engine = Artifact(path="engines/a/model.engine", format="tensorrt_rtx", num_inference_steps=1, engine=facts)
    more = msgspec.structs.replace(manifest, artifacts=(*manifest.artifacts, engine), parity=manifest.parity[:2])
    found = verdict(more)
    assert found["kind"] == "none" and found["text"].startswith("validated: 2 of 4 artifacts passed; 2 never compared")
    assert found["text"].endswith("(1 of them engines that never ran)")
    loose = tuple(msgspec.structs.replace(record, reason="a test") for record in manifest.parity)
    found = verdict(msgspec.structs.replace(manifest, parity=loose))
    assert found["kind"] == "none" and "3 by a gate that was loosened manually" in found["text"]
    gone = msgspec.structs.replace(manifest.parity[0], artifact="onnx/gone.onnx", passed=False)
    assert verdict(msgspec.structs.replace(manifest, parity=(*manifest.parity, gone)))["kind"] == "pass"


def test_a_candidate_that_gives_nan_is_shown_and_not_fatal(
    validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scm_sdk.runtimes.ort_backend import OrtBackend

    right = OrtBackend.sample

    def broken(self: OrtBackend, noise: Any, conditioning: Any) -> np.ndarray:
        images = right(self, noise, conditioning)
        images[0, 0, 0, 0] = np.nan
        images[-1, 0, 0, 1] = 1e6
        return images

    monkeypatch.setattr(OrtBackend, "sample", broken)
    report = collect(validated, backends=["onnxruntime"], num_images=3, rounds=0)
    write_report(report, tmp_path / "r.html")
    assert "NaN" in (tmp_path / "r.html").read_text("utf-8")
    assert any(check.passed is False for check in report.checks["onnxruntime fp32"]), "the self-checks notice"
    json.dumps(report.to_dict(), allow_nan=False)


def test_every_error_is_in_some_bin(validated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, seen = collect(validated, backends=["onnxruntime"], num_images=2, rounds=0), []
    far = [replace(p, images=p.images + np.float32(1e4)) if p.difference else p for p in report.pictures]
    right = np.histogram
    monkeypatch.setattr(np, "histogram", lambda *a, **k: seen.append(right(*a, **k)) or seen[-1])
    error_histogram(replace(report, pictures=tuple(far)), 1)
    assert seen and all(counts[-1] == counts.sum() == 2 * 3 * 8 * 8 for counts, _ in seen)
    monkeypatch.setattr("scm_sdk.report.figures.COLORS", ("#000000",))
    names = [p.name for p in report.pictures if p.difference and p.steps == 1]
    assert all(name in error_histogram(report, 1) for name in names), "colors come again before a curve is left out"


def test_kept_scores_are_shown(unet_copy: Path, tmp_path: Path) -> None:
    from scm_sdk.bundle.edit import extend_bundle

    against = "avatars, label hairColor: real rows 0..9999, held-out rows 10000..19999"
    quality = {"metric": "FID (inception-2015-12-05, N=64)", "fd": 12.5, "num_generated": 64, "num_reference": 0}
    with extend_bundle(unet_copy) as draft:
        draft.path("reports/quality.json").write_text(
            json.dumps([{"sampler": "sCM, 2 steps", "quality": quality, "against": against}]), encoding="utf-8"
        )
    keep_budgets(unet_copy, "p95=60s@b1")
    write_report(collect(unet_copy, backends=["onnxruntime"], num_images=2, rounds=2, batches=[1]), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text("utf-8")
    for part in ("FID (inception-2015-12-05, N=64)", "12.50", "64 against statistics", against, "Model card",
                 "p95=60s@b1", "Peak memory", "permutation", "No comparison on record"):  # fmt: skip
        assert part in html, part
    with extend_bundle(unet_copy) as draft:
        draft.path("reports/quality.json").write_text("{", encoding="utf-8")
    with pytest.raises(SchemaError, match=r"reports/quality.json of .* cannot be read"):
        collect(unet_copy, backends=["onnxruntime"], num_images=2, rounds=0)
