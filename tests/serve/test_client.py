"""The client: images, repeated attempts, errors, and an image that is computed again here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.servers import RunningServer, answering, running, write_served_bundle
from scm_sdk import Client
from scm_sdk.errors import BackendFailure, BackendUnavailable, ConfigError, IntegrityError, ParityError, QueueFull
from scm_sdk.inference.generator import Generator
from scm_sdk.serve import client as module


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.01)


@contextmanager
def front_of(server: RunningServer, *faults: int) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that answers its first requests with these statuses, 0 for a closed connection; it passes the rest on."""
    left, bodies = list(faults), list[bytes]()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            status = left.pop(0) if left else 200
            if not status:
                return
            content = json.dumps({"error": {"message": "m", "type": "t", "code": "c"}}).encode()
            if status == 200:
                headers = {"Content-Type": "application/json"}
                content = server.http.post(self.path, content=bodies[-1], headers=headers).content
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(content)

    with answering(Handler) as url:
        yield url, bodies


def test_images_are_those_of_a_generator(server: RunningServer, local: Generator) -> None:
    with Client(server.url) as client:
        out = client.generate(3, class_labels="robot", seed=2**53 + 1, num_inference_steps=1)
        wanted = local(3, "robot", 1, seed=2**53 + 1)
        assert (out.seeds, out.class_labels, out.attempts) == (wanted.seeds, (2, 2, 2), 1)
        assert (out.model, out.build_id) == ("linear", local.source.build_id)
        for found, image in zip(out.images, wanted.images, strict=True):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
        assert client.model().class_names == ["cat", "dog", "robot"]


def test_a_request_is_repeated_with_the_seed_of_the_first(server: RunningServer) -> None:
    with front_of(server, 429, 503, 0, 500) as (url, bodies), Client(url) as client:
        out = client.generate()
    assert out.attempts == 5 and len(set(bodies)) == 1
    assert json.loads(bodies[0])["seed"] == str(out.seeds[0])


@pytest.mark.parametrize(
    ("faults", "error", "found"),
    [((429, 429), QueueFull, "429"), ((500, 503), BackendFailure, "503"), ((0, 0), BackendUnavailable, "2 attempts")],
)
def test_attempts_end(server: RunningServer, faults: tuple[int, ...], error: type[Exception], found: str) -> None:
    with front_of(server, *faults) as (url, bodies), Client(url, max_retries=1) as client:
        with pytest.raises(error, match=found):
            client.generate()
        assert len(bodies) == 2


def test_what_is_wrong_is_not_repeated(server: RunningServer) -> None:
    with Client(server.url) as client:
        with pytest.raises(ConfigError, match=r"invalid_value.*'pink'"):
            client.generate(class_labels="pink")
        with pytest.raises(ConfigError, match="num_images"):
            client.generate(0)
        with pytest.raises(ConfigError, match="bundle"):
            client.generate(verify=True)
    with pytest.raises(ConfigError, match="url"):
        Client("127.0.0.1:8000")


def test_an_image_is_computed_again(server: RunningServer, served_bundle: Path) -> None:
    with Client(server.url, bundle=served_bundle) as client:
        out = client.generate(4, verify=True)
        assert out.verified in out.seeds


def test_a_server_of_another_model_or_with_wrong_images_is_found_out(server: RunningServer, tmp_path: Path) -> None:
    other = write_served_bundle(tmp_path / "other", sigma_data=0.4)
    with Client(server.url, bundle=other) as client, pytest.raises(IntegrityError, match="build"):
        client.generate(verify=True)
    planted = write_served_bundle(tmp_path / "planted", half_gain=0.6)
    with (
        running(planted, "--precision", "fp16") as wrong,
        Client(wrong.url, bundle=planted) as client,
        pytest.raises(ParityError, match=r"seed 5 .*onnxruntime"),
    ):
        client.generate(seed=5, verify=True)
