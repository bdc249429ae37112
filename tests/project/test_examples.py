"""The examples run as they are written, each short, each named in the README and run by some test."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name, *arguments, cwd, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        cwd=cwd, capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_each_is_short_and_named(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 130
    assert f"python examples/{path.name}" in text, "its first lines say how to run it"
    assert path.name in (ROOT / "README.md").read_text("utf-8")
    assert any(path.name in test.read_text("utf-8") for test in (ROOT / "tests").rglob("test_*.py")), "no test runs it"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_each_shows_its_usage(path, tmp_path):
    done = run(path.name, "-h", cwd=tmp_path)
    assert done.stdout.startswith("usage: ") and not list(tmp_path.iterdir())
    if path.name[:2] in ("03", "05", "06", "07", "08", "09"):  # the others have defaults, or are services
        done = run(path.name, cwd=tmp_path, code=2)
        assert "usage: " in done.stderr and "Traceback" not in done.stderr


def test_a_missing_demo_is_named(tmp_path):
    done = run("01_generate.py", cwd=tmp_path, code=6)
    assert "scm-demo/avatars does not exist" in done.stderr and "make demo" in done.stderr
    assert "Traceback" not in done.stderr


def test_their_numbers_are_theirs_alone():
    numbers = [path.name[:2] for path in EXAMPLES]
    assert len(set(numbers)) == len(numbers)


def test_generate(newcomer, tmp_path):
    done = run("01_generate.py", newcomer / "scm-demo" / "avatars", cwd=tmp_path)
    assert "seed 1236 alone equals seed 1236 among four: True" in done.stdout
    assert len(list(tmp_path.glob("avatar-*.png"))) == 4


def test_from_training_to_a_proved_bundle(tmp_path):
    run("02_train_and_distill.py", "tiny", cwd=tmp_path)
    done = run("03_export_and_build.py", "tiny/student", "tiny/bundle", cwd=tmp_path)
    assert "passed: True" in done.stdout and "passed: False" not in done.stdout
    assert (tmp_path / "tiny" / "bundle.scmz").exists()
    card = (tmp_path / "tiny" / "bundle" / "README.md").read_text("utf-8")
    assert "| onnx/fp16/1step/model.onnx | onnx | fp16 | 1 | onnxruntime:" in card
    if "no engine:" not in done.stdout:
        assert any(path.suffix == ".engine" for path in (tmp_path / "tiny" / "bundle").rglob("*"))


def test_own_network(tmp_path):
    done = run("04_own_network.py", "own", "sound", cwd=tmp_path)
    assert "sound: (3, 1, 64)" in done.stdout and "model.engine" in done.stdout


def test_validate_in_ci(unet_copy, tmp_path):
    before = (unet_copy / "scm_manifest.json").read_bytes()
    run("05_validate_in_ci.py", unet_copy, "report.json", cwd=tmp_path)
    assert (unet_copy / "scm_manifest.json").read_bytes() == before, "what CI passed is what it was given"
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert all(each["passed"] for each in report["parity"].values()) and "error" not in report
    (unet_copy / "golden" / "golden.safetensors").write_bytes(b"x")
    done = run("05_validate_in_ci.py", unet_copy, "report.json", cwd=tmp_path, code=6)
    assert "IntegrityError" in done.stderr
    assert "golden.safetensors" in json.loads((tmp_path / "report.json").read_text("utf-8"))["error"]


@pytest.mark.skipif(os.name == "nt", reason="the test ends the service with a signal")
def test_serve(newcomer, tmp_path):
    from scm_sdk import Generator

    bundle = newcomer / "scm-demo" / "avatars"
    service = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "07_serve.py"), str(bundle), "0"],
        cwd=tmp_path, stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    try:
        assert service.stdout is not None
        address = service.stdout.readline().partition("?")[0]

        def ask(seed):
            with urllib.request.urlopen(f"{address}?label=red&seed={seed}", timeout=60) as answer:
                return answer.read()

        with ThreadPoolExecutor(8) as threads:
            served = list(threads.map(ask, range(16)))
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{address}?label=pink", timeout=60)
        service.send_signal(signal.SIGTERM)  # a run in the background has SIGINT switched off
        assert service.wait(180) == 0
    finally:
        service.kill()
        service.wait()
        service.stdout.close()
    with Generator.from_pretrained(bundle) as gen:
        alone = gen(16, class_labels="red", seed=0).images
    for number, (png, image) in enumerate(zip(served, alone, strict=True)):
        (tmp_path / "served.png").write_bytes(png)
        from PIL import Image

        with Image.open(tmp_path / "served.png") as found:
            assert found.tobytes() == image.tobytes(), number


@pytest.mark.skipif(os.name == "nt", reason="the test ends the service with a signal")
def test_fastapi(newcomer, tmp_path):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi", reason="the extra test brings it")
    from scm_sdk import Generator
    from scm_sdk.images import encode_picture

    bundle = newcomer / "scm-demo" / "avatars"
    service = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "08_fastapi.py"), str(bundle), "0"],
        cwd=tmp_path, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    try:
        lines = iter(service.stderr)
        address = next(found[1] for line in lines if (found := re.search(r"running on (http://[\d.:]+)", line)))
        with httpx.Client(base_url=address, timeout=600) as http:
            assert "red" in http.get("/classes").json()
            assert http.get("/pictures/readyz").json() == {"ready": True}
            body = {"prompt": "red", "seed": 7}
            served = http.post("/pictures/v1/images/generations", json=body, headers={"Accept": "image/png"})
        service.send_signal(signal.SIGTERM)
        rest = "".join(lines)
        assert service.wait(600) in (0, -signal.SIGTERM) and "Traceback" not in rest
    finally:
        service.kill()
        service.wait()
        service.stderr.close()
    with Generator.from_pretrained(bundle) as gen:
        assert served.content == encode_picture(gen(seed=7, class_labels="red", output_type="uint8").images[0], ".png")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes as Linux shows them")
def test_ray_serve(newcomer, tmp_path):
    """A replica is killed while clients ask: each gets its picture."""
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    from scm_sdk import Client, Generator

    assert run("09_ray_serve.py", newcomer, "1", cwd=tmp_path, code=1).stderr.startswith("set RAY_AUTH_MODE=token")
    bundle = newcomer / "scm-demo" / "avatars"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(ROOT / "examples" / "09_ray_serve.py"), str(bundle), str(port), "--cpus-per-replica", "0.5"]
    service = subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, stdout=subprocess.PIPE, encoding="utf-8",
        env=os.environ | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        assert service.stdout.readline() == f"http://127.0.0.1:{port} serves {bundle}\n"
        killed = []

        def ask(seed):
            if seed == 20:
                replicas = [
                    int(path.parent.name)
                    for path in Path("/proc").glob("[0-9]*/cmdline")
                    if descends(int(path.parent.name), service.pid) and b"ServeReplica" in read(path)
                ]
                killed.append(replicas[0])
                os.kill(replicas[0], signal.SIGKILL)
            with Client(f"http://127.0.0.1:{port}", timeout=600, max_retries=100) as client:
                return client.generate(seed=seed).images[0].tobytes()

        with ThreadPoolExecutor(8) as threads:
            served = list(threads.map(ask, range(60)))
        service.send_signal(signal.SIGTERM)
        assert service.wait(600) == 0 and killed
    finally:
        service.kill()
        service.wait()
        service.stdout.close()
    with Generator.from_pretrained(bundle) as gen:
        assert served == [gen(seed=seed).images[0].tobytes() for seed in range(60)]


def read(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def descends(process, ancestor):
    """Return whether a process was started by another one, or by one of its own."""
    while process > 1:
        if process == ancestor:
            return True
        found = re.search(rb"^PPid:\t(\d+)", read(Path(f"/proc/{process}/status")), re.MULTILINE)
        process = int(found[1]) if found else 0
    return False
