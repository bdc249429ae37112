"""A real ``gunicorn --preload``: what workers inherit is refused at once, what they open works, and they end."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from helpers.batching import PLAIN
from helpers.containers import ROOT
from scm_sdk.inference.generator import Generator

pytest.importorskip("gunicorn")
APP = """
import os
from scm_sdk import Generator
from scm_sdk.errors import BackendFailure
inherited = Generator.from_pretrained({path!r}, backend={backend!r}, num_threads=1)
batcher = inherited.batcher()
batcher.submit(seed=0).result()  # its threads have run before the fork
opened = []

def own():
    if not opened:
        opened.append(Generator.from_pretrained({path!r}, backend={backend!r}, num_threads=1))
    return opened[0]

CALLS = {{
    "/call": lambda: inherited(seed=1, output_type="raw"),
    "/batcher": lambda: batcher(seed=1, output_type="raw"),
    "/submit": lambda: batcher.submit(seed=1, output_type="raw").result(),
    "/own": lambda: own()(seed=1, output_type="raw"),
    "/own-batcher": lambda: own().batcher().submit(seed=1, output_type="raw").result(),
}}

def app(environ, start_response):
    try:
        status, body = "200 OK", CALLS[environ["PATH_INFO"]]().images.tobytes()
    except BackendFailure as exc:
        status, body = "503 Service Unavailable", str(exc).encode()
    start_response(status, [("Content-Length", str(len(body))), ("X-Worker", str(os.getpid()))])
    return [body]
"""


@contextmanager
def gunicorn(folder: Path, path: Path, backend: str) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """Run the app behind two preloaded workers; give the process, its address and its log."""
    (folder / "app.py").write_text(APP.format(path=str(path), backend=backend), encoding="utf-8")
    log = folder / "log"
    command = [sys.executable, "-m", "gunicorn", "--preload", "-w", "2", "-b", "127.0.0.1:0", "--timeout", "300"]
    command += ["--graceful-timeout", "300", "--log-file", str(log), "app:app"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, cwd=folder, env=env, encoding="utf-8") as running:
        try:
            yield running, until(lambda: re.search(r"Listening at: http://(\S+)", log.read_text("utf-8")), log)[1], log
        finally:
            running.kill()


def until(found: Callable[[], re.Match[str] | None], log: Path) -> re.Match[str]:
    for _ in range(1200):
        if log.exists() and (match := found()) is not None:
            return match
        time.sleep(0.05)
    pytest.fail(log.read_text(encoding="utf-8") if log.exists() else "gunicorn did not start")


def get(address: str, path: str) -> tuple[int, bytes, int]:
    connection = http.client.HTTPConnection(address, timeout=300)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, int(answer.getheader("X-Worker", "0"))


def exchange(backend: str, path: Path, folder: Path) -> None:
    with Generator.from_pretrained(path, backend=backend, num_threads=1) as gen:
        expected = gen(seed=1, output_type="raw").images
    with gunicorn(folder, path, backend) as (running, address, log):
        for inherited in ("/call", "/batcher", "/submit"):
            status, body, worker = get(address, inherited)
            assert status == 503 and worker != running.pid, body
            assert b"was opened in another process" in body and b"Open it here" in body
        for own in ("/own", "/own-batcher"):
            status, body, worker = get(address, own)
            assert status == 200 and np.array_equal(np.frombuffer(body, np.float32), expected.ravel())
        os.kill(worker, signal.SIGTERM)  # one worker; the master starts another
        until(lambda: re.search(rf"\[{worker}\] \[INFO\] Worker exiting", log.read_text("utf-8")), log)
        assert get(address, "/own")[0] == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(300) == 0, log.read_text("utf-8")
        assert not re.search("SIGKILL|SIGSEGV|TIMEOUT|Traceback", log.read_text("utf-8")), log.read_text("utf-8")


def test_workers_refuse_what_they_inherit_and_run_what_they_open(
    linear_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    exchange("onnxruntime", linear_bundle(PLAIN), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_each_backend_behind_gunicorn(backend: str, unet_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    exchange(backend, unet_bundle, tmp_path)
