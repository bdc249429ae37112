"""Clips over HTTP: files of several formats, tensors, and what is refused."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from helpers.servers import RunningServer, running, write_served_bundle
from scm_sdk import Client
from scm_sdk.errors import ConfigError
from scm_sdk.images import clips_to_uint8, encode_clip
from scm_sdk.inference.generator import Generator
from scm_sdk.serve.options import ServeOptions
from scm_sdk.serve.service import Service

IMAGES = "/v1/images/generations"
SHAPE = (3, 4, 8, 6)
"""C, T, H, W."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of a model of clips; read only."""
    return write_served_bundle(tmp_path_factory.mktemp("clips") / "linear", steps=(1,), sample_shape=SHAPE)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle) as found:
        yield found


@pytest.fixture(scope="module")
def clip(bundle: Path) -> np.ndarray:
    """The clip of seed 3, (T, H, W, C), uint8."""
    with Generator.from_pretrained(bundle, num_threads=1) as gen:
        raw = gen(1, "dog", seed=3, output_type="raw").images
        return clips_to_uint8(raw, gen.opened().spec.value_range)[0]


def test_the_model_says_what_it_makes(server: RunningServer) -> None:
    model = server.http.get("/v1/models").json()["data"][0]
    assert (model["size"], model["frames"], model["formats"][:2]) == ("6x8", 4, ["webp", "gif"])
    outputs = server.http.get("/v2/models/linear").json()["outputs"]
    assert {"name": "images", "datatype": "UINT8", "shape": [-1, 4, 8, 6, 3]} in outputs


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_a_clip_comes_as_a_file_or_in_json(server: RunningServer, clip: np.ndarray, kind: str) -> None:
    wanted = encode_clip(clip, f".{kind}", fps=8)
    body = {"label": "dog", "seed": 3, "fps": 8}
    answer = server.http.post(IMAGES, json=body, headers={"Accept": f"image/{kind}"})
    assert (answer.headers["content-type"], answer.headers["x-seed"]) == (f"image/{kind}", "3")
    told = server.http.post(IMAGES, json=body | {"output_format": kind}).json()
    assert answer.content == base64.b64decode(told["data"][0]["b64_json"]) == wanted
    assert (told["output_format"], told["size"]) == (kind, "6x8")


def test_webp_with_16_frames_a_second_is_the_usual_format(server: RunningServer, clip: np.ndarray) -> None:
    told = server.http.post(IMAGES, json={"label": "dog", "seed": 3}).json()
    assert told["output_format"] == "webp"
    assert base64.b64decode(told["data"][0]["b64_json"]) == encode_clip(clip, ".webp", fps=16)


def test_mp4_comes_where_pyav_is_installed(server: RunningServer) -> None:
    av = pytest.importorskip("av")
    answer = server.http.post(IMAGES, json={"label": "dog", "seed": 3}, headers={"Accept": "video/mp4"})
    assert answer.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(answer.content)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


def test_formats_that_cannot_be_written_are_refused(server: RunningServer, tmp_path: Path) -> None:
    error = server.http.post(IMAGES, json={"output_format": "png"}).json()["error"]
    assert error["param"] == "output_format" and "webp, gif" in error["message"]
    assert server.http.post(IMAGES, json={}, headers={"Accept": "image/png"}).status_code == 406
    for fps in (0, 241, "x"):
        assert server.http.post(IMAGES, json={"fps": fps}).json()["error"]["param"] == "fps"
    odd = write_served_bundle(tmp_path / "odd", steps=(1,), sample_shape=(3, 4, 7, 6))
    with Service.open(ServeOptions(bundle=odd)) as service:
        assert service.model.formats == ["webp", "gif"]


def test_pictures_have_no_frames_a_second_and_no_clip_formats(served_bundle: Path) -> None:
    with running(served_bundle) as server:
        assert server.http.post(IMAGES, json={"fps": 8}).json()["error"]["param"] == "fps"
        for kind in ("gif", "mp4"):
            assert server.http.post(IMAGES, json={"output_format": kind}).json()["error"]["param"] == "output_format"


def test_a_stream_and_tensors_hold_clips(server: RunningServer, clip: np.ndarray) -> None:
    text = server.http.post(IMAGES, json={"label": "dog", "seed": 3, "stream": True}).text
    assert base64.b64encode(encode_clip(clip, ".webp")).decode() in text
    inputs = [
        {"name": "seed", "datatype": "UINT64", "shape": [1], "data": [3]},
        {"name": "class_labels", "datatype": "INT64", "shape": [1], "data": [1]},
    ]
    output = server.http.post("/v2/models/linear/infer", json={"inputs": inputs}).json()["outputs"][0]
    assert (output["name"], output["shape"]) == ("images", [1, 4, 8, 6, 3])
    np.testing.assert_array_equal(np.array(output["data"], np.uint8).reshape(clip.shape), clip)


def test_the_client_returns_frames(server: RunningServer, bundle: Path, clip: np.ndarray) -> None:
    with Client(server.url, bundle=bundle) as client:
        out = client.generate(class_labels="dog", seed=3)
        assert not out.images
        (frames,) = out.clips
        with pytest.raises(ConfigError, match="verify is True for clips"):
            client.generate(verify=True)
    with Image.open(io.BytesIO(encode_clip(clip, ".webp"))) as file:
        wanted = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in frames]), np.stack(wanted))
