"""Requests with an image to start from: the image of the same call of a generator, and what is refused."""

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from helpers.servers import NAMES, RunningServer, eventually, running, write_served_bundle
from scm_sdk import Client
from scm_sdk.errors import ConfigError
from scm_sdk.images import encode_picture
from scm_sdk.inference.generator import Generator
from scm_sdk.serve.app import make_app
from scm_sdk.serve.options import ServeOptions
from scm_sdk.serve.service import MOST_SCANS, SMALL_BODY, Service

IMAGES, INFER = "/v1/images/generations", "/v2/models/linear/infer"
START = 0.9


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose sampler of one step starts from images, that of two from noise; read only."""
    return write_served_bundle(tmp_path_factory.mktemp("starts") / "linear", start_time=START)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle, "--max-body", "60000", "--max-queue", "64") as found:
        yield found


@pytest.fixture(scope="module")
def local(bundle: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(bundle, num_threads=1) as gen:
        yield gen


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """Return a picture, (H, W, 3), uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png_text(seed: int, height: int = 8, width: int = 8) -> str:
    return text_of(encoded(Image.fromarray(pixels(seed, height, width))))


def single(local: Generator, seed: int, image: np.ndarray | None, label: str = "cat") -> np.ndarray:
    """The picture of a single call in this process, (H, W, 3), uint8."""
    if image is None:
        return local(1, label, 2, seed=seed, output_type="uint8").images[0]
    return local(1, label, seed=seed, image=image, start_time=START, output_type="uint8").images[0]


def test_the_model_says_where_its_samplers_start(server: RunningServer) -> None:
    model = server.http.get("/v1/models").json()["data"][0]
    assert (model["start_times"], model["formats"], model["frames"]) == ({"1": START}, ["png", "jpeg", "webp"], None)
    metadata = server.http.get("/v2/models/linear").json()
    assert {"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 3]} in metadata["inputs"]
    document = server.http.get("/openapi.json").json()["components"]["schemas"]["ImageRequest"]["properties"]
    assert {"image", "start_time"} <= set(document)


def test_each_of_many_concurrent_requests_starts_from_its_own_image(server: RunningServer, local: Generator) -> None:
    def ask(seed: int) -> tuple[int, np.ndarray | None, str, httpx.Response]:
        label, image = NAMES[seed % 3], pixels(seed % 7) if seed % 4 else None
        body: dict[str, Any] = {"label": label, "seed": seed}
        if image is not None:
            body |= {"image": png_text(seed % 7), "start_time": START}
        return seed, image, label, server.http.post(IMAGES, json=body, headers={"Accept": "image/png"})

    with ThreadPoolExecutor(16) as pool:
        for seed, image, label, answer in pool.map(ask, range(60)):
            assert answer.status_code == 200, answer.text
            assert answer.content == encode_picture(single(local, seed, image, label), ".png")


def test_several_images_of_a_request_start_from_one(server: RunningServer, local: Generator) -> None:
    body = {"label": "cat", "seed": 3, "n": 3, "image": f"data:image/png;base64,{png_text(1)}", "start_time": START}
    made = server.http.post(IMAGES, json=body).json()["data"]
    with server.http.stream("POST", IMAGES, json=body | {"stream": True}) as answer:
        blocks = answer.read().decode().split("\n\n")
    events = [json.loads(block.split("\ndata: ")[1]) for block in blocks if block.startswith("event: image")]
    for found in (made, sorted(events, key=lambda event: event["index"])):
        assert [image["seed"] for image in found] == [3, 4, 5]
        for image in found:
            wanted = encode_picture(single(local, image["seed"], pixels(1)), ".png")
            assert base64.b64decode(image["b64_json"]) == wanted


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"progressive": True}), ("WEBP", {"lossless": True})], ids=["jpeg", "webp"]
)
def test_other_formats_are_read(server: RunningServer, local: Generator, kind: str, options: dict[str, Any]) -> None:
    content = encoded(Image.fromarray(pixels(2)), kind, **options)
    wanted = single(local, 1, np.asarray(Image.open(io.BytesIO(content))))
    body = {"label": "cat", "seed": 1, "image": text_of(content), "start_time": START, "num_inference_steps": 1}
    answer = server.http.post(IMAGES, json=body, headers={"Accept": "image/png"})
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), wanted)


@pytest.mark.parametrize("binary", [False, True])
def test_tensors_start_from_their_own_images(server: RunningServer, local: Generator, binary: bool) -> None:
    images = np.stack([pixels(5), pixels(6)])
    inputs: list[dict[str, Any]] = [
        {"name": "seed", "datatype": "UINT64", "shape": [2], "data": [8, 8]},
        {"name": "class_labels", "datatype": "INT64", "shape": [2], "data": [0, 0]},
        {"name": "image", "datatype": "UINT8", "shape": [2, 8, 8, 3]},
    ]
    inputs[2] |= {"parameters": {"binary_data_size": images.nbytes}} if binary else {"data": images.tolist()}
    head = json.dumps({"inputs": inputs, "parameters": {"start_time": START}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
    answer = server.http.post(INFER, content=head + (images.tobytes() if binary else b""), headers=headers).json()
    found = np.array(answer["outputs"][0]["data"], np.uint8).reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(found, np.stack([single(local, 8, image) for image in images]))
    assert (found[0] != found[1]).any()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that says its size and holds no pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG file whose last scan stands there ``count`` times more."""
    content = encoded(Image.fromarray(pixels(1)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


def an_animation() -> bytes:
    frames = [Image.fromarray(pixels(i)) for i in range(3)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no start time": ({"start_time": None}, "start_time", r"start_time is None .* 0.9 \(1 steps\)"),
    "no image": ({"image": None}, "start_time", "start_time is 0.9 without an image"),
    "another time": ({"start_time": 1.1}, "start_time", r"start_time is 1.1, expected one of 0.9"),
    "steps of another sampler": ({"num_inference_steps": 2}, "start_time", "num_inference_steps is 2 .* expected 1"),
    "size": ({"image": png_text(1, 8, 9)}, "image", "it is 8x9, expected 8x8"),
    "bomb": ({"image": text_of(png_of_size(60_000, 60_000))}, "image", "exceeds limit|60000x60000"),
    "large": ({"image": text_of(png_of_size(4000, 4000))}, "image", "4000x4000, expected 8x8"),
    "no pixels": ({"image": text_of(png_of_size(8, 8))}, "image", "cannot be taken"),
    "scans": ({"image": text_of(jpeg_of_scans(MOST_SCANS))}, "image", f"scans, of which {MOST_SCANS} are"),
    "animation": ({"image": text_of(an_animation())}, "image", "3 pictures"),
    "gif": ({"image": text_of(encoded(Image.fromarray(pixels(1)), "GIF"))}, "image", "no PNG or JPEG or WEBP file"),
    "text": ({"image": text_of(b"picture")}, "image", "no PNG or JPEG or WEBP file"),
    "empty": ({"image": ""}, "image", "no PNG or JPEG or WEBP file"),
    "no base64": ({"image": "??"}, "image", "no base64"),
    "not ascii": ({"image": "é" * 8}, "image", "no base64"),
    "address": ({"image": "http://127.0.0.1/in.png"}, "image", "no base64"),
    "path": ({"image": "file:///etc/passwd"}, "image", "no base64"),
    "data without base64": ({"image": "data:image/png,abc"}, "image", "not in base64"),
    "no text": ({"image": 1}, "image", "Expected `str"),
    "no number": ({"start_time": "0.9"}, "start_time", "Expected `float"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_an_image_to_start_from_is_refused(server: RunningServer, case: str) -> None:
    changes, param, found = BAD[case]
    body = {"image": png_text(1), "start_time": START, "label": "cat"} | changes
    answer = server.http.post(IMAGES, json={name: value for name, value in body.items() if value is not None})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", param)
    with pytest.raises(ConfigError, match=found):
        raise ConfigError(error["message"])
    assert "/linear" not in error["message"] and " at 0x" not in error["message"]


@pytest.mark.parametrize(
    ("shape", "data", "start", "found"),
    [
        ([1, 8, 9, 3], [0] * 216, START, r"image is UINT8 \[1, 8, 9, 3\], expected UINT8 \[N, 8, 8, 3\]"),
        ([1], [0], START, r"image is UINT8 \[1\], expected UINT8 \[N, 8, 8, 3\]"),
        ([1, 8, 8, 3], [0] * 191, START, "191 values, expected 192"),
        ([1, 8, 8, 3], [256] * 192, START, "larger number, expected numbers of UINT8"),
        ([1, 8, 8, 3], [[0] * 64, [0]], START, "65 values"),
        ([2, 8, 8, 3], [0] * 384, START, "the same number of each"),
        ([1, 8, 8, 3], [0] * 192, None, "start_time is None"),
        ([1, 8, 8, 3], [0] * 192, "x", "start_time is no number"),
    ],
)
def test_wrong_image_tensors_are_refused(
    server: RunningServer, shape: list[int], data: list[Any], start: object, found: str
) -> None:
    inputs = [
        {"name": "seed", "datatype": "UINT64", "shape": [1], "data": [8]},
        {"name": "image", "datatype": "UINT8", "shape": shape, "data": data},
    ]
    answer = server.http.post(INFER, json={"inputs": inputs, "parameters": {"start_time": start}})
    assert answer.status_code == 400
    with pytest.raises(ConfigError, match=found):
        raise ConfigError(answer.json()["error"])


def test_a_model_that_starts_from_noise_takes_no_image(served_bundle: Path) -> None:
    with running(served_bundle) as server:
        assert server.http.get("/v1/models").json()["data"][0]["start_times"] == {}
        error = server.http.post(IMAGES, json={"image": png_text(1), "start_time": START}).json()["error"]
        assert error["param"] == "image" and "--start-time" in error["message"]


def test_the_client_sends_an_image_and_computes_it_again(server: RunningServer, bundle: Path, local: Generator) -> None:
    picture = Image.fromarray(pixels(4))
    with Client(server.url, bundle=bundle) as client:
        out = client.generate(2, class_labels="cat", seed=6, image=picture, start_time=START, verify=True)
        same = client.generate(1, class_labels="cat", seed=6, image=pixels(4), start_time=START)
        with pytest.raises(ConfigError, match=r"it is 4x8, expected 8x8"):
            client.generate(image=pixels(4, 4), start_time=START)
        with pytest.raises(ConfigError, match=r"image is \(8, 8\) uint8, expected \(H, W, C\)"):
            client.generate(image=pixels(4)[:, :, 0], start_time=START)
        with pytest.raises(ConfigError, match="image is str, expected a PIL image"):
            client.generate(image="in.png", start_time=START)
    assert out.verified in (6, 7)
    np.testing.assert_array_equal(np.asarray(out.images[0]), single(local, 6, pixels(4)))
    np.testing.assert_array_equal(np.asarray(out.images[0]), np.asarray(same.images[0]))


def test_the_canary_starts_from_the_same_image(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path / "linear", half_gain=0.5, start_time=START)
    with running(bundle, "--precision", "fp16", "--shadow", "1", "--shadow-samples", "1") as server:
        body = {"n": 2, "image": png_text(1), "start_time": START}
        assert server.http.post(IMAGES, json=body).status_code == 200
        eventually(lambda: server.metric("scm_canary_samples_total", verdict="in_bound") == 2)
        assert server.metric("scm_canary_samples_total") == 2


def test_a_body_has_room_for_an_image(tmp_path: Path, served_bundle: Path) -> None:
    bundle = write_served_bundle(tmp_path / "large", start_time=START, sample_shape=(3, 600, 600))
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    with Service.open(ServeOptions(bundle=bundle)) as service:
        assert SMALL_BODY < len(text_of(encode_picture(noise, ".png"))) < service.max_body
    with Service.open(ServeOptions(bundle=served_bundle)) as service:
        assert service.max_body == SMALL_BODY
    with Service.open(ServeOptions(bundle=bundle, max_body=5)) as service:
        assert service.max_body == 5


def test_bodies_of_many_requests_hold_a_bounded_amount_of_memory(bundle: Path) -> None:
    """One request holds nearly all that there is room for; another is refused, and taken when the first is through."""
    options = ServeOptions(bundle=bundle, max_queue=1, max_images=1, max_body=1000, read_timeout=600, deadline=600)

    async def call(service: Service) -> None:
        there, go_on = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b'{"user": "' + b"a" * 900 + b'"'
            there.set()
            await go_on.wait()
            yield b"}"

        transport, headers = httpx.ASGITransport(make_app(service)), {"Content-Type": "application/json"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600) as client:
            first = asyncio.ensure_future(client.post(IMAGES, content=slowly(), headers=headers))
            await there.wait()
            second = await client.post(IMAGES, json={"user": "b" * 500})
            assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
            assert "retry-after" in second.headers
            go_on.set()
            assert (await first).status_code == 200
            assert (await client.post(IMAGES, json={"user": "b" * 500})).status_code == 200
            assert service.body_bytes == 0

    with Service.open(options) as service:
        asyncio.run(call(service))


def test_a_gray_model_takes_gray_pictures_of_any_mode(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path / "linear", start_time=START, sample_shape=(1, 8, 8))
    gray = Image.fromarray(pixels(1)[:, :, 0])
    with running(bundle) as server, Generator.from_pretrained(bundle, num_threads=1) as gen:
        wanted = gen(1, "cat", seed=1, image=gray, start_time=START, output_type="uint8").images[0]
        for picture in (gray, gray.convert("RGB"), gray.convert("RGBA")):
            body = {"label": "cat", "seed": 1, "image": text_of(encoded(picture)), "start_time": START}
            answer = server.http.post(IMAGES, json=body, headers={"Accept": "image/png"})
            assert answer.content == encode_picture(wanted, ".png")
        body = {"image": png_text(1), "start_time": START}
        assert "it has colors" in server.http.post(IMAGES, json=body).json()["error"]["message"]
