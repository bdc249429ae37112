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
from types import SimpleNamespace
from typing import Any, BinaryIO

import httpx
import pytest

from helpers.servers import RunningServer, Server, eventually, held, open_files, running
from scm_sdk.images import encode_picture
from scm_sdk.inference.generator import Generator
from scm_sdk.serve.app import make_app
from scm_sdk.serve.metrics import Metrics
from scm_sdk.serve.options import ServeOptions
from scm_sdk.serve.service import Service

IMAGES = "/v1/images/generations"
QUEUE = 8


@pytest.fixture(scope="module")
def patient(slow_bundle: Path) -> Iterator[RunningServer]:
    """A server that waits for its clients."""
    with running(slow_bundle) as found:
        yield found


@pytest.fixture(scope="module")
def impatient(slow_bundle: Path) -> Iterator[RunningServer]:
    """A server whose clients must be quick; no test wants an answer of it."""
    with running(slow_bundle, "--read-timeout", "0.6") as found:
        yield found


@pytest.fixture(scope="module")
def local(slow_bundle: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(slow_bundle, num_threads=1) as gen:
        yield gen


def ask(server: Server, **body: object) -> httpx.Response:
    return server.http.post(IMAGES, json=body)


def request_bytes(**body: object) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


def test_more_than_the_queue_is_refused_at_once_and_the_rest_is_right(slow_bundle: Path, local: Generator) -> None:
    with held(slow_bundle, max_queue=QUEUE, max_images=QUEUE) as server:
        with ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(ask, server, seed=seed) for seed in range(40)]
            eventually(lambda: sum(future.done() for future in asked) == 40 - QUEUE)  # while none is made
            server.model.let()
        answers = [future.result() for future in asked]
        assert Counter(answer.status_code for answer in answers) == {200: QUEUE, 429: 40 - QUEUE}
        for answer in answers:
            if answer.status_code == 429:
                assert answer.json()["error"]["code"] == "queue_full"
                assert int(answer.headers["retry-after"]) >= 1
            else:
                (image,) = answer.json()["data"]
                wanted = local(seed=image["seed"], output_type="uint8").images[0]
                assert base64.b64decode(image["b64_json"]) == encode_picture(wanted, ".png")
        eventually(lambda: server.metric("scm_waiting_images") == 0)
        assert server.metric("scm_rejected_total", code="queue_full") == 40 - QUEUE
        assert server.metric("scm_image_batch_size_sum") > server.metric("scm_images_total"), "batches were shared"


def test_the_bound_counts_images_not_requests(slow_bundle: Path) -> None:
    with held(slow_bundle, max_queue=QUEUE, max_images=QUEUE) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, server, n=5)
        eventually(lambda: server.metric("scm_waiting_images") == 5)
        assert ask(server, n=4).status_code == 429
        second = pool.submit(ask, server, n=3)
        eventually(lambda: server.metric("scm_waiting_images") == QUEUE)
        assert ask(server, n=1).status_code == 429
        server.model.let()
        assert [future.result().status_code for future in (first, second)] == [200, 200]
        assert ask(server, n=QUEUE).status_code == 200, "an empty queue takes as many as it holds"


def test_a_full_queue_refuses_before_the_body_and_keeps_the_connection(slow_bundle: Path) -> None:
    body = b"GET /metrics HTTP/1.1\r\n"  # no request of its own
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    probe = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with held(slow_bundle, max_queue=1, max_images=1) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, server)
        eventually(lambda: server.metric("scm_waiting_images") == 1)
        with server.connect() as client, client.makefile("rb") as answers:
            for _ in range(2):
                client.sendall(head)
                assert status_and_body(answers)[0] == 429
                client.sendall(body + probe)
                assert status_and_body(answers) == (200, b'{"live":true}')
        server.model.let()
        assert waiting.result().status_code == 200


def status_and_body(answers: BinaryIO) -> tuple[int, bytes]:
    """Read one answer of a connection."""
    status = int(answers.readline().split()[1])
    length = 0
    while (line := answers.readline()) != b"\r\n":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, answers.read(length)


@pytest.mark.parametrize(
    "made, stream", [(0, False), (0, True), (1, True)], ids=["nothing made", "stream of nothing", "one batch made"]
)
def test_what_misses_its_deadline_is_dropped(
    slow_bundle: Path, monkeypatch: pytest.MonkeyPatch, made: int, stream: bool
) -> None:
    """The model makes one batch or none and then waits until the answer is there, so no machine is too fast.

    Where it makes one, the clock stands still until the first picture is there, so no machine is too slow.
    """
    batches, answered, now = itertools.count(), threading.Event(), [0.0]
    gen = Generator.from_pretrained(slow_bundle, num_threads=None)  # one batch at a time
    sample = gen.opened().backend.sample

    def held(*inputs: object) -> object:
        assert next(batches) < made or answered.wait(600)
        return sample(*inputs)

    monkeypatch.setattr(gen.opened().backend, "sample", held)
    body = {"n": 8, "stream": stream, "timeout": 600.0 if made else 0.05}
    if made:
        monkeypatch.setattr("scm_sdk.serve.service.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def call(service: Service) -> httpx.Response:
        make_files = service.files

        async def files(*output: Any) -> list[bytes]:
            found = await make_files(*output)
            now[0] = 6000.0
            return found

        monkeypatch.setattr(service, "files", files)
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            try:
                return await client.post(IMAGES, json=body)
            finally:
                answered.set()

    with Service(gen, ServeOptions(bundle=slow_bundle, deadline=600), None, Metrics()) as service:
        answer = asyncio.run(call(service))
    dropped = re.search(r"^scm_canceled_images_total (\S+)$", service.metrics.render().decode(), re.MULTILINE)
    if made and stream:  # it had begun
        assert answer.status_code == 200 and "event: image_generation.completed" in answer.text
        assert '"code":"deadline_exceeded"' in answer.text and "[DONE]" not in answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")
        assert "retry-after" in answer.headers
    assert dropped and float(dropped[1]) >= 8 - 2 * made - 2, "all but what was made and what was in a batch"


def test_an_answer_is_due_also_while_its_request_is_encoded(slow_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long before a request is queued, such as a text encoder; its images are dropped after it."""
    go_on, encoded = threading.Event(), threading.Event()

    async def call(service: Service) -> httpx.Response:
        submit = service._batcher.submit

        def slowly(*args: Any, **kwargs: Any) -> Any:
            assert go_on.wait(600)
            encoded.set()
            return submit(*args, **kwargs)

        monkeypatch.setattr(service._batcher, "submit", slowly)
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600) as client:
            answer = await client.post(IMAGES, json={"n": 2, "timeout": 0.05})
            assert not encoded.is_set() and service.admission.images == 2
            go_on.set()
            for _ in range(12_000):
                if not service.admission.images:
                    break
                await asyncio.sleep(0.05)
            assert not service.admission.images
            return answer

    with Service.open(ServeOptions(bundle=slow_bundle, deadline=600)) as service:
        answer = asyncio.run(call(service))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_images(slow_bundle: Path, stream: bool) -> None:
    with held(slow_bundle, max_queue=QUEUE, max_images=QUEUE) as server:
        with server.connect() as client:
            client.sendall(request_bytes(n=QUEUE, stream=stream))
            eventually(lambda: server.metric("scm_waiting_images") == QUEUE)
            if stream:
                server.model.let(1)
                assert client.recv(64)  # the first picture is there
        # All but those of batches that have begun, of at most 2 images each.
        eventually(lambda: server.metric("scm_canceled_images_total") >= QUEUE - 2 * (1 + stream))
        server.model.let()
        eventually(lambda: server.metric("scm_waiting_images") == 0)


BEGINNINGS = (b"", b"POST ", request_bytes(seed=1)[:60], request_bytes(seed=1)[:-3])
"""What slow clients send: nothing, a part of the headers, a part of the body."""


def begin(server: RunningServer, count: int, stack: ExitStack) -> list[socket.socket]:
    """Let so many clients begin a request and stop."""
    slow = [stack.enter_context(server.connect()) for _ in range(count)]
    for i, client in enumerate(slow):
        with suppress(OSError):  # where this process is slow, it is closed by now
            client.sendall(BEGINNINGS[i % len(BEGINNINGS)])
    return slow


def wait_for_end(client: socket.socket) -> None:
    """Read an error object where there was a request, then the end."""
    with suppress(ConnectionError):  # TimeoutError, after minutes, is none
        while client.recv(4096):
            pass


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_slow_clients_hold_up_nobody(patient: RunningServer, count: int) -> None:
    with ExitStack() as stack:
        begin(patient, min(count, open_files() - 200), stack)
        for seed in range(20):
            assert ask(patient, seed=seed).status_code == 200


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_slow_clients_are_closed(impatient: RunningServer, count: int) -> None:
    with ExitStack() as stack:
        for client in begin(impatient, min(count, open_files() - 200), stack):
            wait_for_end(client)


@pytest.mark.parametrize("beginning", [b"GET /healthz HTTP/1.1\r\nX: ", request_bytes(seed=1)[:-3]])
def test_a_client_that_drips_bytes_is_closed(impatient: RunningServer, beginning: bytes) -> None:
    with impatient.connect() as client:
        client.sendall(beginning)
        ended = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not ended.wait(0.05):
                    client.sendall(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            wait_for_end(client)
        finally:
            ended.set()
            dripping.join()


def test_a_request_that_turns_out_to_be_no_http_is_no_error_of_the_server(patient: RunningServer) -> None:
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: other.example\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for body in (b"zz\r\n", b"5\r\n12345678\r\n"):
        with patient.connect() as client:
            client.sendall(head + body)
            assert client.recv(4096).split()[1] in (b"400", b"421")
    assert ask(patient, seed=1).status_code == 200
    assert not [line for line in patient.lines if "Traceback" in line]


def test_large_headers_are_refused(patient: RunningServer) -> None:
    with patient.connect() as client:
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
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert not [line for line in server.lines if "Traceback" in line]
