"""A server under more load than it carries: refusals, deadlines, clients that are slow or gone, and its end."""

import asyncio
import base64
import itertools
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from helpers.servers import RunningServer, eventually, open_files, running
from scm_sdk.images import encode_picture
from scm_sdk.inference.generator import Generator
from scm_sdk.serve.app import make_app
from scm_sdk.serve.metrics import Metrics
from scm_sdk.serve.options import ServeOptions
from scm_sdk.serve.service import Service

IMAGES = "/v1/images/generations"
QUEUE = 8


@pytest.fixture(scope="module")
def busy(slow_bundle: Path) -> Iterator[RunningServer]:
    """A server with a short queue of slow batches, whose clients must be quick."""
    options = ("--max-queue", str(QUEUE), "--max-images", "8", "--read-timeout", "0.6")
    with running(slow_bundle, *options) as found:
        yield found


@pytest.fixture(scope="module")
def local(slow_bundle: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(slow_bundle, num_threads=1) as gen:
        yield gen


def ask(server: RunningServer, **body: object) -> httpx.Response:
    return server.http.post(IMAGES, json=body)


def request_bytes(**body: object) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


def test_more_than_the_queue_is_refused_at_once_and_the_rest_is_right(busy: RunningServer, local: Generator) -> None:
    before = busy.metric("scm_rejected_total", code="queue_full")
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda seed: ask(busy, seed=seed), range(40)))
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429} and counts[429] >= 40 - 3 * QUEUE and counts[200] >= QUEUE, counts
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        else:
            (image,) = answer.json()["data"]
            wanted = local(seed=image["seed"], output_type="uint8").images[0]
            assert base64.b64decode(image["b64_json"]) == encode_picture(wanted, ".png")
    eventually(lambda: busy.metric("scm_waiting_images") == 0)
    assert busy.metric("scm_rejected_total", code="queue_full") == before + counts[429]


def test_the_bound_counts_images_not_requests(busy: RunningServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(busy, n=5), range(8)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert ask(busy, n=8).status_code == 200, "an empty queue takes as many as it holds"


@pytest.mark.parametrize(
    "made, stream", [(0, False), (0, True), (1, True)], ids=["nothing made", "stream of nothing", "one batch made"]
)
def test_what_misses_its_deadline_is_dropped(
    slow_bundle: Path, monkeypatch: pytest.MonkeyPatch, made: int, stream: bool
) -> None:
    """The model makes one batch or none and then waits until the answer is there, so no machine is too fast."""
    batches, answered = itertools.count(), threading.Event()
    gen = Generator.from_pretrained(slow_bundle, num_threads=None)  # one batch at a time
    sample = gen.opened().backend.sample

    def held(*inputs: object) -> object:
        assert next(batches) < made or answered.wait(120)
        return sample(*inputs)

    monkeypatch.setattr(gen.opened().backend, "sample", held)
    body = {"n": 8, "stream": stream, "timeout": 3.0 if made else 0.05}

    async def call(service: Service) -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            try:
                return await client.post(IMAGES, json=body)
            finally:
                answered.set()

    with Service(gen, ServeOptions(bundle=slow_bundle), None, Metrics()) as service:
        answer = asyncio.run(call(service))
    dropped = re.search(r"^scm_canceled_images_total (\S+)$", service.metrics.render().decode(), re.MULTILINE)
    if made and stream:  # it had begun
        assert answer.status_code == 200 and "event: image_generation.completed" in answer.text
        assert '"code":"deadline_exceeded"' in answer.text and "[DONE]" not in answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")
        assert "retry-after" in answer.headers
    assert dropped and float(dropped[1]) >= 8 - 2 * made - 2, "all but what was made and what was in a batch"


def test_a_client_that_goes_away_cancels_its_images(busy: RunningServer) -> None:
    before = busy.metric("scm_canceled_images_total")
    for stream in (False, True):
        with busy.connect() as client:
            client.sendall(request_bytes(n=8, stream=stream))
            if stream:
                client.recv(64)  # the first picture is there
            else:
                eventually(lambda: busy.metric("scm_waiting_images") > 0)
        eventually(lambda: busy.metric("scm_waiting_images") == 0)
    assert busy.metric("scm_canceled_images_total") > before


BEGINNINGS = (b"", b"POST ", request_bytes(seed=1)[:60], request_bytes(seed=1)[:-3])
"""What slow clients send: nothing, a part of the headers, a part of the body."""


def test_slow_clients_are_closed_and_hold_up_nobody(busy: RunningServer) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(busy.connect()) for _ in range(40)]
        for i, client in enumerate(slow):
            client.sendall(BEGINNINGS[i % len(BEGINNINGS)])
        assert ask(busy, seed=1).status_code == 200
        for client in slow:
            client.settimeout(30)
            while client.recv(4096):  # an error object where there was a request, then the end
                pass


def test_a_client_that_drips_bytes_is_closed(busy: RunningServer) -> None:
    for begin in (b"GET /healthz HTTP/1.1\r\nX: ", request_bytes(seed=1)[:-3]):
        with busy.connect() as client:
            client.sendall(begin)
            client.settimeout(0.05)
            for _ in range(400):
                try:
                    client.sendall(b" ")
                    if not client.recv(4096):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                pytest.fail("the connection stayed open")


def test_a_request_that_turns_out_to_be_no_http_is_no_error_of_the_server(busy: RunningServer) -> None:
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: other.example\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for body in (b"zz\r\n", b"5\r\n12345678\r\n"):
        with busy.connect() as client:
            client.sendall(head + body)
            assert client.recv(4096).split()[1] in (b"400", b"421")
    assert ask(busy, seed=1).status_code == 200
    assert not [line for line in busy.lines if "Traceback" in line]


def test_large_headers_are_refused(busy: RunningServer) -> None:
    with busy.connect() as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b" 400 " in client.recv(4096).split(b"\r\n")[0]


def test_sigterm_answers_what_was_accepted_and_takes_nothing_new(slow_bundle: Path, local: Generator) -> None:
    with running(slow_bundle, "--max-queue", "64") as server, ExitStack() as stack:
        with ThreadPoolExecutor(16) as pool:
            pending = [pool.submit(ask, server, seed=seed, n=2) for seed in range(16)]
            eventually(lambda: server.metric("scm_waiting_images") + server.metric("scm_images_total") >= 32)
            idle, late = stack.enter_context(server.connect()), stack.enter_context(server.connect())
            for connection in (idle, late):  # it is accepted when its first request is answered
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b'{"live":true}'):
                    answer += connection.recv(4096)
            late.sendall(request_bytes(seed=99))
            code = server.end()
        answers = [future.result() for future in pending]
        assert [answer.status_code for answer in answers] == [200] * 16
        for seed, answer in enumerate(answers):
            assert [image["seed"] for image in answer.json()["data"]] == [seed, seed + 1]
        assert late.recv(1 << 16).startswith(b"HTTP/1.1 200"), "sent before the end"
        assert idle.recv(1) == b"", "closed"
        assert code == 0
        with pytest.raises(OSError, match="refused"):
            server.connect()
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.slow
def test_a_thousand_slow_clients_hold_up_nobody(busy: RunningServer) -> None:
    count = min(1000, open_files() - 200)
    closed: list[socket.socket] = []
    with ExitStack() as stack:
        slow = [stack.enter_context(busy.connect()) for _ in range(count)]
        for i, client in enumerate(slow):
            client.sendall(BEGINNINGS[i % len(BEGINNINGS)])
        for seed in range(20):
            assert ask(busy, seed=seed).status_code == 200

        def wait(client: socket.socket) -> None:
            try:
                while client.recv(4096):
                    pass
            except OSError:
                pass
            closed.append(client)

        threads = [threading.Thread(target=wait, args=(client,)) for client in slow]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(closed) == count
