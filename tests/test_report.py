"""The report: one page that loads nothing, tells what was recorded and measured, and cannot be written into."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from scm_sdk.bundle import Bundle
from scm_sdk.errors import BackendUnavailable, ConfigError
from scm_sdk.evaluate.gate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.precision import default_plan
from scm_sdk.export.variants import add_precision
from scm_sdk.report import render
from scm_sdk.report.collect import Report, collect
from scm_sdk.report.figures import provenance
from scm_sdk.report.render import write_report


@pytest.fixture(scope="module")
def validated(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("report") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[1], num_samples=1)
    validate_bundle(path, num_seeds=5)
    return path


@pytest.fixture(scope="module")
def pages(validated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "report.html"
    arguments = ["report", str(validated), "-o", str(out), "--num-images", "6", "--rounds", "3"]
    run = CliRunner().invoke(main, [*arguments, "--batch", "1", "--batch", "4", "--batch", "99", "--json"])
    assert run.exit_code == 0, run.output
    assert [Path(p).suffix for p in json.loads(run.stdout)["files"]] == [".html", ".md", ".json"]
    return out


def test_the_page_holds_everything_and_loads_nothing(pages: Path) -> None:
    html = pages.read_text()
    assert "validated: 3 of 3 comparisons passed" in html
    for part in ("onnxruntime fp16, 1 step", "derived from the noise floor", "the gate&#39;s least PSNR", "Throughput"):
        assert part in html, part
    assert html.count("<svg") == 6  # bars, a histogram for each of two samplers, two of speed, provenance
    assert html.count("data:image/png;base64,") == 3 * 3
    loads = re.findall(
        r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import|<link""", html.partition("<script>")[0]
    )
    assert all(a.startswith("#") or b.startswith("#") for a, b in loads), loads
    json_form = json.loads(pages.with_suffix(".json").read_text())
    assert [latency["batch"] for latency in json_form["latency"]] == [1, 4], "99 is above the largest batch"
    assert {m["name"] for m in json_form["measured_here"]} == {"torch fp32", "onnxruntime fp32", "onnxruntime fp16"}
    table = pages.with_suffix(".md").read_text()
    assert "| `onnx/fp16/1step/model.onnx` | onnxruntime | pass |" in table and "| 4 | torch fp32 |" in table


def test_the_page_works_in_a_browser(pages: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Debian's chromium is not installed")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1180,2400",
         f"--screenshot={picture}", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", pages.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r'id="said">[\d.]+ dB, largest error', done.stdout), "the script ran"
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (1180, 2400) and len(image.convert("RGB").getcolors(1 << 24) or []) > 200


def test_a_bundle_that_was_never_validated_says_so(unet_bundle: Path, tmp_path: Path) -> None:
    write_report(collect(unet_bundle, num_images=2, rounds=0), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "not validated" in html and "Nothing is recorded" in html and "How fast, here" not in html


def with_manifest(report: Report, **changes: object) -> Report:
    return Report(**{**vars(report), "manifest": msgspec.structs.replace(report.manifest, **changes)})


def test_text_of_a_bundle_cannot_become_code(validated: Path, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    report = collect(validated, num_images=2, rounds=0)
    record = msgspec.structs.replace(report.manifest.parity[0], reason=evil, passed=False)
    write_report(with_manifest(report, name=evil, provenance={"data": evil}, parity=(record,)), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "1 of 1 comparisons failed" in html and "set by hand" in html


def test_the_graph_of_files_survives_odd_manifests(validated: Path) -> None:
    manifest = Bundle.open(validated).manifest
    first, *rest = manifest.files
    odd = msgspec.structs.replace(first, path="a$b^{<x>", built_from=("a$b^{<x>", "missing"))
    svg = provenance(msgspec.structs.replace(manifest, files=(odd, *rest)))
    assert "a$b^{&lt;x&gt;" in svg and "missing" not in svg


def test_what_cannot_be_reported(validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(main, ["report", str(validated), "--rounds", "1"])
    assert run.exit_code == 2 and "1 round has no spread" in run.stderr
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="holds no checkpoint to compare with"):
        patch.setattr(Bundle, "artifacts", lambda self, **_: [])
        collect(validated)

    def absent(module: str, **_: object) -> None:
        raise BackendUnavailable(f"a report needs {module}")

    monkeypatch.setattr(render, "require", absent)
    with pytest.raises(BackendUnavailable, match="needs jinja2"):
        write_report(collect(validated, num_images=2, rounds=0), tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
