"""OpenAI's form of edits: the images of the same request in JSON, and what is refused."""

import asyncio
import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from helpers.servers import RunningServer, running, write_served_bundle
from scm_sdk.serve import app
from scm_sdk.serve.schemas import CODES

EDITS, IMAGES = "/v1/images/edits", "/v1/images/generations"
START = 0.9
FORM = "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Return a server of a bundle whose sampler of one step starts from images."""
    bundle = write_served_bundle(tmp_path_factory.mktemp("edits") / "linear", start_time=START)
    with running(bundle, "--max-body", "60000", "--max-queue", "64") as found:
        yield found


def picture(seed: int = 1, size: int = 8) -> bytes:
    """Return a PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def edit(server: RunningServer, fields: dict[str, str], image: bytes | None = None, name: str = "image") -> Any:
    file = picture() if image is None else image
    return server.http.post(EDITS, data=fields, files={name: ("in.png", file, "image/png")})


FIELDS = {"prompt": "cat", "seed": "18446744073709551613", "n": "3", "start_time": str(START)}


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_a_form_makes_the_images_of_the_same_request_in_json(server: RunningServer, name: str) -> None:
    answer = edit(server, FIELDS, name=name)
    assert answer.status_code == 200, answer.text
    body = {"prompt": "cat", "seed": 2**64 - 3, "n": 3, "start_time": START}
    wanted = server.http.post(IMAGES, json=body | {"image": base64.b64encode(picture()).decode()}).json()
    assert answer.json()["data"] == wanted["data"] and len(wanted["data"]) == 3
    assert edit(server, FIELDS, picture(2)).json()["data"] != wanted["data"], "the image matters"


def test_an_edit_comes_as_a_file_and_as_events(server: RunningServer) -> None:
    fields = {"label": "dog", "seed": "5", "output_format": "webp"}
    made = edit(server, fields).json()["data"][0]["b64_json"]
    files = {"image": ("in.png", picture(), "image/png")}
    file = server.http.post(EDITS, data={"label": "dog", "seed": "5"}, files=files, headers={"Accept": "image/webp"})
    assert (file.headers["content-type"], file.headers["x-seed"]) == ("image/webp", "5")
    assert file.content == base64.b64decode(made)
    assert edit(server, fields | {"start_time": str(START)}).json()["data"][0]["b64_json"] == made, "the only one"
    events = edit(server, fields | {"stream": "true"}).text.split("\n\n")
    assert events[0].startswith("event: image_edit.completed\n") and events[1] == "data: [DONE]"
    assert json.loads(events[0].partition("\ndata: ")[2])["b64_json"] == made


REFUSED: dict[str, tuple[dict[str, str], str, str | None]] = {
    "unknown": ({"sed": "1"}, "unknown_parameter", "sed"),
    "number": ({"n": "three"}, "invalid_value", "n"),
    "too many": ({"n": "11"}, "invalid_value", "n"),
    "seed": ({"seed": "-1"}, "invalid_value", "seed"),
    "start": ({"start_time": "0.5"}, "invalid_value", "start_time"),
    "address": ({"response_format": "url"}, "invalid_value", "response_format"),
    "long prompt": ({"prompt": "x" * 4001}, "invalid_value", "prompt"),
    "many fields": ({f"f{i}": "" for i in range(40)}, "invalid_form", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_fields_are_refused(server: RunningServer, case: str) -> None:
    fields, code, param = REFUSED[case]
    answer = edit(server, fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (CODES[code][0], code, param), error


FILES: dict[str, tuple[list[tuple[str, tuple[str | None, bytes, str]]], str]] = {
    "none": ([("prompt", (None, b"cat", ""))], "invalid_value"),
    "two": ([("image[]", ("a.png", picture(), "image/png"))] * 2, "invalid_value"),
    "mask": ([(name, ("a.png", picture(), "image/png")) for name in ("image", "mask")], "invalid_value"),
    "many": ([("image[]", ("a.png", b"", "image/png"))] * 40, "invalid_form"),
    "text": ([("image", (None, b"cat", ""))], "invalid_value"),
    "other name": ([("picture", ("a.png", picture(), "image/png"))], "invalid_value"),
    "field twice": (
        [("image", ("a.png", picture(), "image/png")), ("n", (None, b"1", "")), ("n", (None, b"1", ""))],
        "invalid_value",
    ),
    "no picture": ([("image", ("a.png", b"cat", "image/png"))], "invalid_value"),
    "other size": ([("image", ("a.png", picture(size=9), "image/png"))], "invalid_value"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files_are_refused(server: RunningServer, case: str) -> None:
    files, code = FILES[case]
    answer = server.http.post(EDITS, files=files)  # pyright: ignore[reportArgumentType]
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"", FORM, "invalid_value"),
        (b"nonsense", FORM, "invalid_form"),
        (b"nonsense", "multipart/form-data", "invalid_form"),
        (b"--x\r\n\r\n", FORM, "invalid_form"),
        (
            b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
            FORM,
            "invalid_form",
        ),
        (b"{}", "application/json", "unsupported_media_type"),
        (b"x" * 60_001, FORM, "payload_too_large"),
    ],
)
def test_bodies_that_are_no_form_are_refused(server: RunningServer, content: bytes, kind: str, code: str) -> None:
    answer = server.http.post(EDITS, content=content, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (CODES[code][0], code), answer.text


def test_cut_and_mutated_forms_end_in_answers(server: RunningServer) -> None:
    request = httpx.Request("POST", "http://x", data=FIELDS, files={"image": ("in.png", picture(), "image/png")})
    body, draw = request.read(), np.random.default_rng(0)
    for _ in range(300):
        mutated = bytearray(body[: draw.integers(1, len(body) + 1)])
        for at in draw.integers(0, len(mutated), draw.integers(0, 4)):
            mutated[at] = draw.integers(0, 256)
        headers = {"Content-Type": request.headers["content-type"]}
        answer = server.http.post(EDITS, content=bytes(mutated), headers=headers)
        assert answer.status_code in (200, 400), (bytes(mutated), answer.text)


def test_a_file_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may have no folder that it can write to."""
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path / "nowhere"))
    request = httpx.Request("POST", "http://x", files={"image": ("in.png", b"x" * (1 << 22), "image/png")})
    scope = {"type": "http", "headers": [(b"content-type", request.headers["content-type"].encode())]}
    _, image = asyncio.run(app._read_form(app.Request(scope), request.read()))
    assert len(image) == 1 << 22


def test_a_model_that_starts_from_noise_alone_takes_no_edit(served_bundle: Path) -> None:
    with running(served_bundle) as server:
        answer = edit(server, {"prompt": "cat"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"


def test_the_form_is_described(server: RunningServer) -> None:
    operation = server.http.get("/openapi.json").json()["paths"][EDITS]["post"]
    (body,) = operation["requestBody"]["content"].items()
    assert body[0] == "multipart/form-data" and body[1]["schema"]["allOf"][1]["required"] == ["image"]
    assert operation["operationId"] == "post_v1_images_edits"
