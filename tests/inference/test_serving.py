"""``examples/07_serve.py`` as a service: health, keep-alive, refusals, and its end."""

import http.client
import importlib.util
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from scm_sdk.inference.generator import Generator

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "07_serve.py"


@pytest.fixture
def service(unet_bundle: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running example and its address."""
    command = [sys.executable, str(EXAMPLE), str(unet_bundle), "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=tmp_path
    ) as running:
        try:
            assert running.stdout is not None
            yield running, urlsplit(running.stdout.readline()).netloc
        finally:
            running.kill()


def test_it_answers_each_request_of_a_connection(service: tuple[subprocess.Popen[str], str]) -> None:
    running, address = service
    connection = http.client.HTTPConnection(address, timeout=120)
    for path, status, kind in [
        ("/healthz", 200, "text/plain"),
        ("/?label=cat&seed=7", 200, "image/png"),
        ("/?label=1&seed=7", 200, "image/png"),
        ("/?label=pink", 400, "text/plain"),
        ("/?seed=-1", 400, "text/plain"),
        ("/?seed=x", 400, "text/plain"),
        ("http://[::1/?seed=1", 400, "text/plain"),
        ("/?" + "&".join(f"a{n}=1" for n in range(99)), 400, "text/plain"),
        ("/favicon.ico", 404, "text/plain"),
        ("/?label=cat&seed=7", 200, "image/png"),
    ]:
        connection.putrequest("GET", path, skip_host=True)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        assert (answer.status, answer.getheader("Content-Type")) == (status, kind), (path, body)
    first = connection.sock
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    assert connection.sock is first, "kept alive"
    connection.close()
    running.send_signal(signal.SIGTERM)
    assert running.wait(120) == 0
    assert running.stderr is not None and "Traceback" not in running.stderr.read()


def test_on_sigterm_every_request_that_was_sent_is_answered(service: tuple[subprocess.Popen[str], str]) -> None:
    running, address = service
    host, port = address.split(":")
    idle = socket.create_connection((host, int(port)))  # it holds the end up no longer than the others
    sent = [http.client.HTTPConnection(address, timeout=120) for _ in range(24)]
    for seed, connection in enumerate(sent):
        connection.request("GET", f"/?seed={seed}")
    running.send_signal(signal.SIGTERM)
    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda c: c.getresponse(), sent))
    assert [answer.status for answer in answers] == [200] * 24
    assert all(answer.read().startswith(b"\x89PNG") for answer in answers)
    assert running.wait(120) == 0
    idle.close()


def test_where_too_many_wait_one_is_refused_at_once(unet_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("serve_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    go = threading.Event()
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_threads=1) as gen:
        backend = gen.opened().backend
        sample = backend.sample
        monkeypatch.setattr(backend, "sample", lambda *inputs: go.wait(120) and sample(*inputs))
        with (
            gen.batcher(max_queue_size=1, max_concurrent_batches=1) as batcher,
            example.Server(("127.0.0.1", 0)) as server,
        ):
            example.Handler.batcher = batcher
            threading.Thread(target=server.serve_forever).start()
            held = [batcher.submit(seed=0)]
            while batcher.waiting:
                time.sleep(0.01)
            held.append(batcher.submit(seed=1))
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
            connection.request("GET", "/?seed=2")
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
            assert answer.read().startswith(b"1 images wait")
            go.set()
            assert [future.result(120).seeds for future in held] == [(0,), (1,)]
            connection.request("GET", "/?seed=2")
            assert connection.getresponse().status == 200
            connection.close()
            server.end()
            server.drain()
