"""``examples/web``: run as their first lines say, equal to the recorded samples."""

import functools
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.chromium import Browser
from scm_sdk.images import make_grid, to_uint8
from scm_sdk.inference.generator import Generator

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "web"


def test_node(site: Path, two_precisions: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    out = tmp_path / "dog.png"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [node, EXAMPLES / "node.mjs", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1800, check=False)

    done = run(site, out, 7, "dog")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pass  ") == 4 and "FAIL" not in done.stdout
    with Generator.from_pretrained(two_precisions, backend="onnxruntime", precision="fp32") as gen:
        expected = to_uint8(gen(4, seed=7, class_labels="dog", output_type="raw").images, (-1.0, 1.0))
    with Image.open(out) as picture:
        assert np.abs(np.asarray(picture).astype(int) - make_grid(expected, 2, scale=8)).max() <= 1
        assert json.loads(picture.text["scm"])["seeds"] == ["7", "8", "9", "10"]  # type: ignore[attr-defined]
    wrong = run(site, tmp_path / "no.png", 7, "dgo")
    assert wrong.returncode == 1 and 'class label is "dgo"' in wrong.stderr and not (tmp_path / "no.png").exists()
    assert run().returncode == 2


def test_page(browser: Browser, site_copy: Path, two_precisions: Path) -> None:
    shutil.copy(EXAMPLES / "index.html", site_copy / "own.html")
    shutil.copy(EXAMPLES / "app.js", site_copy)
    handler = functools.partial(QuietHandler, directory=str(site_copy))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.open(f"http://localhost:{server.server_address[1]}/own.html")
        page.wait("document.getElementById('status').textContent.startsWith('seed 7 by onnxruntime-web wasm')")
        pixels = page.evaluate(
            "(() => { const c = document.getElementById('canvas');"
            "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
        )
        server.shutdown()
    with Generator.from_pretrained(two_precisions, backend="onnxruntime", precision="fp32") as gen:
        expected = gen(1, seed=7, output_type="uint8").images[0]
    got = np.array(pixels).reshape(*expected.shape[:2], 4)
    assert (got[..., 3] == 255).all()
    assert np.abs(got[..., :3] - expected.astype(int)).max() <= 1


class QuietHandler(SimpleHTTPRequestHandler):
    """The standard library's server, which the example names, without its log."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
