"""Sites as files: what is in them, what is refused, and the server on the loopback interface."""

import gzip
import http.client
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from helpers.node import run_node
from scm_sdk._util.cache_dir import writable_folder
from scm_sdk._util.files import sha256_bytes
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import FileEntry, Manifest, files_of
from scm_sdk.errors import BackendUnavailable, BundleError, ConfigError, IntegrityError, ParityError, SchemaError
from scm_sdk.export.cli import main
from scm_sdk.export.edge import site as site_module
from scm_sdk.export.edge.onnxruntime_web import PACKAGE, RUNTIME_FILES, SHA256, VERSION, cached_files, runtime_files
from scm_sdk.export.edge.site import CSP, HEADERS, SITE_NAME, read_site, write_site
from scm_sdk.export.edge.site_server import open_server

ROOT = Path(__file__).resolve().parents[3]
WEB = ROOT / "export" / "edge" / "web"


def test_a_site_lists_all_its_files_and_the_graphs_are_the_bundles(site: Path, two_precisions: Path) -> None:
    listed = read_site(site)
    stored = {f"{entry.path}.gz" if entry.gzip_size else entry.path for entry in listed.files}
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert found == stored | {SITE_NAME}
    for entry in listed.files:
        data = (site / f"{entry.path}.gz").read_bytes() if entry.gzip_size else (site / entry.path).read_bytes()
        assert len(data) == (entry.gzip_size or entry.size)
        assert sha256_bytes(gzip.decompress(data) if entry.gzip_size else data) == entry.sha256
    hashes = {entry.path: entry.sha256 for entry in listed.files}
    graphs = {a.path for a in Bundle.open(two_precisions).artifacts(format="onnx")}
    assert {graph.path for graph in listed.graphs} == {f"model/{path}" for path in graphs} and len(graphs) == 4
    for entry in Bundle.open(two_precisions).manifest.files:
        if entry.path in graphs:
            assert hashes[f"model/{entry.path}"] == entry.sha256
    for name, digest in SHA256.items():
        assert hashes[f"runtime/{name}"] == digest


def test_recorded_samples_are_those_of_the_bundle(site: Path, two_precisions: Path) -> None:
    for golden in read_site(site).goldens:
        expected = Bundle.open(two_precisions).goldens()[golden.num_inference_steps]
        images = np.frombuffer((site / golden.path).read_bytes(), "<f4").reshape(expected.images.shape)
        np.testing.assert_array_equal(images, expected.images)
        assert golden.seeds == tuple(map(str, expected.seeds)) and golden.class_labels == tuple(expected.class_labels)  # type: ignore[arg-type]


def test_one_device_brings_its_files_alone(two_precisions: Path, onnxruntime_web: Path, tmp_path: Path) -> None:
    report = write_site(
        two_precisions, tmp_path / "site", devices=["wasm"], precisions=["fp16"], steps=[1],
        onnxruntime_web=onnxruntime_web,
    )  # fmt: skip
    names = {path.name.removesuffix(".gz") for path in (tmp_path / "site" / "runtime").iterdir()}
    assert names == set(RUNTIME_FILES["wasm"].names)
    (download,) = report.downloads
    assert (download.device, download.precision, download.num_inference_steps) == ("wasm", "fp16", 1)
    graph = two_precisions / "onnx/fp16/1step/model.onnx"
    assert 3.5e6 < download.bytes - graph.stat().st_size < 4e6, "the runtime packed, and the page"
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "site").rglob("*") if path.is_file())
    assert report.manifest_sha256 == sha256_bytes((tmp_path / "site" / SITE_NAME).read_bytes())


def test_bounds_are_those_that_validate_recorded(two_precisions: Path, onnxruntime_web: Path, tmp_path: Path) -> None:
    from scm_sdk.bundle.manifest import ParityRecord

    path = Path(shutil.copytree(two_precisions, tmp_path / "bundle"))
    fp32, fp16 = (f"onnx/{precision}/1step/model.onnx" for precision in ("fp32", "fp16"))

    def record(artifact: str, backend: str, threshold: float, *, passed: bool = True) -> ParityRecord:
        return ParityRecord(
            artifact=artifact, reference="denoiser", backend=backend, threshold=threshold, noise_floor=1e-6,
            max_abs=0.0, num_samples=32, passed=passed, gate="max_abs" if artifact == fp32 else "psnr_p05_db",
        )  # fmt: skip

    Bundle.open(path).with_parity(
        record(fp32, "onnxruntime", 3e-5), record(fp32, "openvino", 2e-5), record(fp16, "onnxruntime", 55.0),
        record(fp16, "openvino", 57.0),
    )  # fmt: skip
    report = write_site(path, tmp_path / "site", devices=["wasm"], steps=[1], onnxruntime_web=onnxruntime_web)
    bounds = {graph.precision: graph.bound for graph in read_site(tmp_path / "site").graphs}
    assert bounds["fp32"].threshold == 2e-5 and bounds["fp16"].threshold == 57.0, "the stricter of each"
    assert "recorded by scm-export validate, openvino, 32 samples" in bounds["fp32"].source and not report.notes
    Bundle.open(path).with_parity(record(fp16, "onnxruntime", 55.0, passed=False))
    with pytest.raises(ParityError, match=r"onnx/fp16/1step/model\.onnx .* failed its comparison"):
        write_site(path, tmp_path / "other", steps=[1], onnxruntime_web=onnxruntime_web)
    assert not (tmp_path / "other").exists()


def test_what_a_bundle_lacks_is_named(unet_bundle: Path, onnxruntime_web: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp32 1-step, fp32 2-step; expected fp16"):
        write_site(unet_bundle, tmp_path / "a", precisions=["fp16"], onnxruntime_web=onnxruntime_web)
    with pytest.raises(ConfigError, match="expected fp32, fp16 and 4 steps"):
        write_site(unet_bundle, tmp_path / "b", steps=[4], onnxruntime_web=onnxruntime_web)
    with pytest.raises(ConfigError, match="precision is 'int8', expected fp32 or fp16"):
        write_site(unet_bundle, tmp_path / "c", precisions=["int8"], onnxruntime_web=onnxruntime_web)
    report = write_site(unet_bundle, tmp_path / "d", devices=["wasm"], steps=[1], onnxruntime_web=onnxruntime_web)
    assert any("no fp16 graph" in note and "scm-export precision" in note for note in report.notes)
    assert {path.name for path in tmp_path.iterdir()} == {"d"}


def test_graphs_that_webgpu_refuses_run_on_wasm_alone(
    linear_bundle: Callable[..., Path], onnxruntime_web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    from onnx import helper, numpy_helper

    from helpers import toy_bundles
    from scm_sdk.bundle.bundle import publish_bundle, write_bundle
    from scm_sdk.bundle.manifest import Artifact
    from scm_sdk.errors import UnsupportedGraphError
    from scm_sdk.spec import SamplerSpec, default_times

    spec, relative = SamplerSpec(times=default_times(1), sample_shape=(3, 8, 8)), "onnx/fp32/1step/model.onnx"
    with publish_bundle(tmp_path / "bundle") as folder:
        toy_bundles.write_linear_graph(folder / relative, spec)
        model = onnx.load(folder / relative)
        parts = [f"row_{i}" for i in range(8)]
        model.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.int64), "widths"))
        last = model.graph.node[-1]
        at = len(model.graph.node) - 1
        model.graph.node.insert(at, helper.make_node("Split", [last.input[0], "widths"], parts, axis=3, name="wide"))
        model.graph.node.insert(at + 1, helper.make_node("Concat", parts, ["whole"], axis=3))
        last.input[0] = "whole"
        onnx.save(model, folder / relative)
        write_bundle(
            folder, name="wide", samplers=[spec],
            artifacts=[Artifact(path=relative, format="onnx", num_inference_steps=1)],
        )  # fmt: skip
    report = write_site(tmp_path / "bundle", tmp_path / "site", onnxruntime_web=onnxruntime_web)
    assert read_site(tmp_path / "site").graphs[0].devices == ("wasm",)
    assert {each.device for each in report.downloads} == {"wasm"}
    assert any("runs on wasm alone" in note and "storage buffer" in note for note in report.notes)
    with pytest.raises(UnsupportedGraphError, match=r"storage buffer.*wide"):
        write_site(tmp_path / "bundle", tmp_path / "gpu", devices=["webgpu"], onnxruntime_web=onnxruntime_web)


def test_samples_are_recorded_where_the_bundle_has_none(
    linear_bundle: Callable[..., Path], onnxruntime_web: Path, tmp_path: Path
) -> None:
    from scm_sdk.noise import draw_noise
    from scm_sdk.spec import SamplerSpec, default_times

    spec = SamplerSpec(times=default_times(2), sample_shape=(3, 4, 4), num_classes=3)
    write_site(linear_bundle(spec), tmp_path / "site", devices=["wasm"], onnxruntime_web=onnxruntime_web)
    (golden,) = read_site(tmp_path / "site").goldens
    assert golden.made_by.startswith("ONNX Runtime ") and golden.seeds == ("0", "1", "2", "3")
    assert golden.class_labels == (0, 1, 2, 0)
    images = np.frombuffer((tmp_path / "site" / golden.path).read_bytes(), "<f4").reshape(4, 3, 4, 4)
    shift = np.array(golden.class_labels, np.float32).reshape(4, 1, 1, 1) / 10
    np.testing.assert_allclose(images, 0.5 * sum(draw_noise(spec, range(4))) + shift, rtol=0, atol=1e-6)


def test_what_a_page_cannot_show_is_refused(
    linear_bundle: Callable[..., Path], onnxruntime_web: Path, tmp_path: Path
) -> None:
    from scm_sdk.spec import SamplerSpec, default_times

    latents = SamplerSpec(times=default_times(1), sample_shape=(4, 8, 8), output="latents")
    with pytest.raises(ConfigError, match=r"latents of shape \(4, 8, 8\), expected pictures"):
        write_site(linear_bundle(latents), tmp_path / "site", onnxruntime_web=onnxruntime_web)
    assert not (tmp_path / "site").exists()


def test_a_graph_that_no_browser_can_hold_is_refused(
    two_precisions: Path, onnxruntime_web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are listed as 4 GiB."""

    def large(manifest: Manifest, path: str) -> list[FileEntry]:
        return [msgspec.structs.replace(entry, size=4 << 30) for entry in files_of(manifest, path)]

    monkeypatch.setattr(site_module, "files_of", large)
    with pytest.raises(ConfigError, match=r"model\.onnx .* has 4\.0 GiB, expected less than 4 GiB"):
        write_site(two_precisions, tmp_path / "site", onnxruntime_web=onnxruntime_web)
    assert not (tmp_path / "site").exists()


def test_only_a_site_is_replaced(two_precisions: Path, onnxruntime_web: Path, tmp_path: Path) -> None:
    taken = tmp_path / "site"
    taken.mkdir()
    (taken / "diary.txt").write_text("mine", encoding="utf-8")
    for overwrite, fact in [(False, "is not empty"), (True, f"holds no {SITE_NAME}")]:
        with pytest.raises(BundleError, match=fact):
            write_site(
                two_precisions, taken, devices=["wasm"], steps=[1], onnxruntime_web=onnxruntime_web, overwrite=overwrite
            )
    assert [path.name for path in taken.iterdir()] == ["diary.txt"]


class TestRuntime:
    """onnxruntime-web, from any source."""

    @pytest.fixture
    def package(self, onnxruntime_web: Path, tmp_path: Path) -> Path:
        """Return the package as npm lays it out."""
        dist = tmp_path / "package" / "dist"
        dist.mkdir(parents=True)
        for device in RUNTIME_FILES:
            for name, data in runtime_files([device], onnxruntime_web).items():
                (dist / name).write_bytes(data)
        return dist.parent

    def test_a_folder_and_an_archive_are_the_same(self, package: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "package.tgz", "w:gz", compresslevel=1) as archive:
            archive.add(package, "package")
        found = runtime_files(["wasm"], tmp_path / "package.tgz")
        assert found == runtime_files(["wasm"], package) and set(found) == set(RUNTIME_FILES["wasm"].names)

    def test_other_content_is_refused(self, package: Path, tmp_path: Path) -> None:
        glue = package / "dist" / "ort-wasm-simd-threaded.mjs"
        glue.write_bytes(glue.read_bytes() + b"\nfetch('//elsewhere')")
        with pytest.raises(IntegrityError, match=rf"{glue.name} .* expected {SHA256[glue.name][:16]}"):
            runtime_files(["wasm"], package)
        glue.unlink()
        with pytest.raises(ConfigError, match=f"not the npm package {PACKAGE}.*npm pack {PACKAGE}@{VERSION}"):
            runtime_files(["wasm"], package)
        (tmp_path / "no.tgz").write_bytes(b"no archive")
        with pytest.raises(ConfigError, match=f"not the npm package {PACKAGE}"):
            runtime_files(["wasm"], tmp_path / "no.tgz")

    def test_without_npm_and_network_the_error_names_the_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(BackendUnavailable, match=r"npm, which fetches it, is not installed.*--onnxruntime-web"):
            runtime_files(["wasm"])
        npm = tmp_path / "npm"
        npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n", encoding="utf-8")
        npm.chmod(0o755)
        with pytest.raises(BackendUnavailable, match=r"ENOTFOUND.*--onnxruntime-web"):
            runtime_files(["wasm"])

    def test_the_cache_is_used_only_where_it_is_whole(self, package: Path) -> None:
        cache = writable_folder(f"{PACKAGE}-{VERSION}", purpose="test")
        assert cache is not None and cached_files() is None
        for path in (package / "dist").iterdir():
            shutil.copy(path, cache / path.name)
        found = cached_files()
        assert found is not None and set(found) == set(SHA256)
        (cache / "ort.wasm.min.mjs").write_bytes(b"other")
        assert cached_files() is None

    @pytest.mark.slow
    def test_npm_fetches_the_pinned_files(self) -> None:
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        try:
            found = runtime_files(["wasm", "webgpu"])
        except BackendUnavailable as exc:
            pytest.skip(f"the npm registry is unreachable: {exc}")
        assert {name: sha256_bytes(data) for name, data in found.items()} == SHA256
        assert cached_files() == found


class TestServer:
    """The server of ``--serve``."""

    def get(self, url: str, path: str, *, host: str | None = None) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(url)
        with closing(http.client.HTTPConnection("127.0.0.1", parts.port or 80, timeout=1800)) as connection:
            connection.request("GET", path, headers={"Host": host or parts.netloc})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def test_headers_and_types(self, site: Path, served: Callable[[Path], str]) -> None:
        url = served(site)
        kinds = {
            "/": "text/html", "/page.js": "text/javascript", "/scm/noise.js": "text/javascript",
            "/runtime/ort.wasm.min.mjs": "text/javascript", "/page.css": "text/css",
            f"/{SITE_NAME}": "application/json",
            "/runtime/ort-wasm-simd-threaded.wasm.gz": "application/octet-stream", "/icon.svg": "image/svg+xml",
        }  # fmt: skip
        for path, kind in kinds.items():
            status, headers, body = self.get(url, path)
            assert status == 200 and headers["Content-Type"].startswith(kind) and body
            assert all(headers[name] == value for name, value in HEADERS.items())
            assert "Content-Encoding" not in headers

    def test_only_listed_files_under_a_local_name(self, site_copy: Path, served: Callable[[Path], str]) -> None:
        (site_copy / "secret.txt").write_text("mine", encoding="utf-8")
        (site_copy.parent / "above.txt").write_text("mine", encoding="utf-8")
        url = served(site_copy)
        for path in ("/secret.txt", "/../above.txt", "/%2e%2e/above.txt", "/scm", "/scm/", "//etc/passwd", "/page.js/"):
            assert self.get(url, path)[0] == 404, path
        assert self.get(url, "/", host="attacker.example")[0] == 403
        assert self.get(url, "/", host="attacker.example:80")[0] == 403

    def test_a_port_that_is_taken_and_a_folder_that_is_no_site(self, site: Path, tmp_path: Path) -> None:
        with open_server(site) as server, pytest.raises(ConfigError, match=r"cannot be opened.*0 is a free one"):
            assert server.server_address[0] == "127.0.0.1"
            open_server(site, server.server_address[1])
        with pytest.raises(BundleError, match="is no site"):
            open_server(tmp_path)
        (tmp_path / SITE_NAME).write_text('{"files": [{"path": "../x"}]}', encoding="utf-8")
        with pytest.raises(SchemaError, match="cannot be read"):
            open_server(tmp_path)


def test_the_page_repeats_the_policy_and_loads_only_its_own_files() -> None:
    html = (WEB / "index.html").read_text(encoding="utf-8")
    assert f'content="{CSP}"' in html
    assert "unsafe-inline" not in CSP and "unsafe-eval" not in CSP.replace("wasm-unsafe-eval", "")
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", html), "nothing inline"
    for path in WEB.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
            assert not re.search(r"""["'(](https?:)?//\w""", text), f"{path.name} names another host"


def test_the_command_writes_and_serves(two_precisions: Path, onnxruntime_web: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    arguments = ["web", str(two_precisions), "-o", str(out), "--device", "wasm", "--steps", "1",
                 "--onnxruntime-web", str(onnxruntime_web)]  # fmt: skip
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {(each["device"], each["precision"]) for each in told["downloads"]} == {("wasm", "fp32"), ("wasm", "fp16")}
    assert told["manifest_sha256"] == sha256_bytes((out / SITE_NAME).read_bytes())
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == BundleError.exit_code and "--overwrite" in again.output
    command = [sys.executable, "-m", "scm_sdk.export.cli", *arguments, "--overwrite", "--serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://localhost:\d+/", line)))
            assert TestServer().get(url, f"/{SITE_NAME}")[2] == (out / SITE_NAME).read_bytes()
            process.send_signal(2)
            assert process.wait(1800) == 0
        finally:
            process.kill()


def test_the_module_takes_the_pinned_manifest_alone(site: Path) -> None:
    script = """
    const { Generator } = await import(`${args[0]}/scm.js`);
    const gen = await Generator.load(`${args[0]}/`, { manifestSha256: args[1] });
    done(gen.info.model);
    """
    digest = sha256_bytes((site / SITE_NAME).read_bytes())
    assert run_node(script, site.as_uri(), digest) == read_site(site).name
