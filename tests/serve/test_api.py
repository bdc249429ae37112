"""The HTTP API of a running server: shapes, equality with single calls, errors."""

import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from helpers.servers import NAMES, RunningServer, eventually
from scm_sdk.images import encode_picture
from scm_sdk.inference.generator import Generator
from scm_sdk.serve.schemas import CODES

IMAGES = "/v1/images/generations"


def single(local: Generator, seed: int, label: str | None = None, steps: int = 2, suffix: str = ".png") -> bytes:
    """The file of a single call in this process."""
    out = local(1, label, steps, seed=seed, output_type="uint8")
    return encode_picture(out.images[0], suffix)


def post(server: RunningServer, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http.post(IMAGES, content=content, headers={"Content-Type": "application/json", **headers})


def test_images_have_the_shape_of_openai_and_the_bytes_of_single_calls(server: RunningServer, local: Generator) -> None:
    answer = post(server, {"prompt": "dog", "n": 3, "seed": 7, "size": "8x8", "num_inference_steps": 1}).json()
    assert set(answer) == {"created", "data", "model", "build_id", "output_format", "size"}
    assert (answer["model"], answer["build_id"], answer["size"]) == ("linear", local.source.build_id, "8x8")
    assert [(image["seed"], image["label"]) for image in answer["data"]] == [(7, 1), (8, 1), (9, 1)]
    for image in answer["data"]:
        assert base64.b64decode(image["b64_json"]) == single(local, image["seed"], "dog", 1)


def test_each_of_many_concurrent_requests_gets_the_bytes_of_its_single_call(
    server: RunningServer, local: Generator
) -> None:
    def ask(seed: int) -> tuple[int, str, int, httpx.Response]:
        label, steps = NAMES[seed % 3], 1 + seed % 2
        body = {"label": label, "seed": str(seed), "num_inference_steps": steps}
        return seed, label, steps, post(server, body, Accept="image/png")

    seeds = [*range(95), 2**64 - 1]
    with ThreadPoolExecutor(24) as pool:
        for seed, label, steps, answer in pool.map(ask, seeds):
            assert (answer.status_code, answer.headers["x-seed"]) == (200, str(seed)), answer.text
            assert answer.content == single(local, seed, label, steps)


def test_labels_are_drawn_from_seeds_and_new_seeds_are_returned(server: RunningServer, local: Generator) -> None:
    first, second = (post(server, {"prompt": ""}).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"] and first["seed"] < 2**53
    assert base64.b64decode(first["b64_json"]) == single(local, first["seed"])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_one_image_comes_as_a_file(server: RunningServer, local: Generator, kind: str) -> None:
    answer = post(server, {"seed": 5}, Accept=f"image/{kind}")
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-build-id"] == local.source.build_id
    assert answer.content == single(local, 5, suffix=f".{kind}")


def test_a_stream_sends_each_picture_as_an_event(server: RunningServer, local: Generator) -> None:
    with server.http.stream("POST", IMAGES, json={"seed": 20, "n": 6, "label": "cat", "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = answer.read().decode().strip().split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    events = []
    for block in blocks:
        kind, data = block.split("\n")
        assert kind == "event: image_generation.completed"
        events.append(json.loads(data.removeprefix("data: ")))
    assert sorted(event["index"] for event in events) == list(range(6))
    for event in events:
        assert event["seed"] == 20 + event["index"]
        assert base64.b64decode(event["b64_json"]) == single(local, event["seed"], "cat")


BAD: list[tuple[str, Any, dict[str, str]]] = [
    ("invalid_json", b"{", {}),
    ("invalid_json", b"[1]", {}),
    ("invalid_json", b"\xff\xfe", {}),
    ("invalid_json", b"[" * 9000, {}),
    ("unknown_parameter", {"sede": 1}, {}),
    ("invalid_value", {"n": 0}, {}),
    ("invalid_value", {"n": 11}, {}),
    ("invalid_value", {"n": 2**70}, {}),
    ("invalid_value", {"n": "1"}, {}),
    ("invalid_value", {"seed": -1}, {}),
    ("invalid_value", {"seed": 2**64}, {}),
    ("invalid_value", {"seed": 2**64 - 1, "n": 2}, {}),
    ("invalid_value", {"seed": "١"}, {}),
    ("invalid_value", {"seed": 1.5}, {}),
    ("invalid_value", {"prompt": "pink"}, {}),
    ("invalid_value", {"label": 3}, {}),
    ("invalid_value", {"label": True}, {}),
    ("invalid_value", {"label": "a" * 5000}, {}),
    ("invalid_value", {"label": "cat", "prompt": "dog"}, {}),
    ("invalid_value", {"num_inference_steps": 3}, {}),
    ("invalid_value", {"guidance_scale": 2}, {}),
    ("invalid_value", {"size": "16x16"}, {}),
    ("invalid_value", {"size": "file:///etc/passwd"}, {}),
    ("invalid_value", {"response_format": "url"}, {}),
    ("invalid_value", {"output_format": "gif"}, {}),
    ("invalid_value", {"timeout": 0}, {}),
    ("invalid_value", {"n": 2}, {"Accept": "image/png"}),
    ("model_not_found", {"model": "dall-e-3"}, {}),
    ("not_acceptable", {}, {"Accept": "image/gif"}),
    ("not_acceptable", {"output_format": "webp"}, {"Accept": "image/png"}),
    ("payload_too_large", {"user": "a" * 30_000}, {}),
    ("unsupported_media_type", {}, {"Content-Type": "text/plain"}),
    ("unsupported_media_type", {}, {"Content-Encoding": "gzip"}),
    ("invalid_host", {}, {"Host": "rebound.example"}),
    ("invalid_host", {}, {"Host": "localhost@rebound.example"}),
    ("invalid_host", {}, {"Host": ""}),
    ("forbidden_origin", {}, {"Origin": "https://rebound.example"}),
    ("forbidden_origin", {}, {"Origin": "null"}),
]


@pytest.mark.parametrize(("code", "body", "headers"), BAD, ids=[f"{n}-{case[0]}" for n, case in enumerate(BAD)])
def test_bad_requests_get_an_error_object_with_a_code(
    server: RunningServer, code: str, body: Any, headers: dict[str, str]
) -> None:
    answer = post(server, body, **headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (CODES[code][0], code, CODES[code][1])
    assert set(error) == {"message", "type", "code", "param"}
    assert "Traceback" not in answer.text and "/linear/" not in answer.text and ".py" not in answer.text
    assert answer.headers["x-request-id"]


def test_other_paths_and_methods_get_an_error_object(server: RunningServer) -> None:
    for method, path, code in (("GET", "/v1/files", "not_found"), ("DELETE", IMAGES, "method_not_allowed")):
        answer = server.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (CODES[code][0], code)
    answer = server.http.options(IMAGES, headers={"Access-Control-Request-Method": "POST"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_body_without_a_length_is_cut_off_at_the_limit(server: RunningServer) -> None:
    parts = (b'{"user":"' + b"a" * 1000 for _ in range(40))
    answer = server.http.post(IMAGES, content=parts, headers={"Content-Type": "application/json"})
    assert answer.json()["error"]["code"] == "payload_too_large"


def test_request_ids_are_kept_and_logged(server: RunningServer) -> None:
    answer = server.http.get("/v1/models", headers={"X-Request-Id": "trace-1"})
    assert answer.headers["x-request-id"] == "trace-1"
    other = server.http.get("/v1/models", headers={"X-Request-Id": "a\tb"})
    assert re.fullmatch("[0-9a-f]{16}", other.headers["x-request-id"])
    eventually(lambda: any('"trace-1"' in line for line in server.lines))
    (logged,) = [json.loads(line) for line in server.lines if '"trace-1"' in line]
    assert (logged["path"], logged["status"], logged["level"]) == ("/v1/models", 200, "info")


def test_probes_run_an_inference_whatever_the_host_is_called(server: RunningServer) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert server.http.get(path, headers={"Host": "probe"}).status_code == 200


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_the_server_loads_onnx_runtime_and_no_torch(server: RunningServer) -> None:
    loaded = Path(f"/proc/{server.process.pid}/maps").read_text(encoding="utf-8")
    assert "onnxruntime" in loaded and "torch" not in loaded


def test_metrics_name_requests_refusals_and_batches(server: RunningServer) -> None:
    before = server.metric("scm_images_total")
    post(server, {"n": 4})
    post(server, {"n": 0})
    assert server.metric("scm_images_total") == before + 4
    assert server.metric("scm_rejected_total", code="invalid_value") >= 1
    assert server.metric("scm_requests_total", endpoint=IMAGES, status="400") >= 1
    assert server.metric("scm_waiting_images") == 0
    assert server.metric("scm_request_seconds_count", endpoint=IMAGES) >= 2


def test_the_openapi_document_lists_every_route_and_resolves(server: RunningServer) -> None:
    document = server.http.get("/openapi.json").json()
    assert {IMAGES, "/v1/models", "/metrics", "/readyz", "/v2/models/{model}/infer"} <= set(document["paths"])
    for path, methods in document["paths"].items():
        (method,) = methods
        answer = server.http.request(method, path.replace("{model}", "linear").replace("{version}", "1"))
        assert answer.status_code not in (404, 405), path
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
    assert {"seed", "label", "n", "stream"} <= set(document["components"]["schemas"]["ImageRequest"]["properties"])


def test_the_page_may_run_its_own_script_and_nothing_else(server: RunningServer) -> None:
    answer = server.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert not re.findall(r"https?://|\bsrc=|onclick=|style=", answer.text)


def test_tritonclient_reads_metadata_and_infers(server: RunningServer, local: Generator) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("linear")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        metadata = client.get_model_metadata("linear", "1")
        assert [tensor["name"] for tensor in metadata["inputs"]] == ["seed", "class_labels"]
        for binary in (True, False):
            seed = triton.InferInput("seed", [3], "UINT64")
            seed.set_data_from_numpy(np.array([3, 2**64 - 1, 3], np.uint64), binary_data=binary)
            label = triton.InferInput("class_labels", [3], "INT64")
            label.set_data_from_numpy(np.array([0, 1, 2]), binary_data=binary)
            outputs = [
                triton.InferRequestedOutput(name, binary_data=binary) for name in ("images", "samples", "class_labels")
            ]
            found = client.infer(
                "linear", [seed, label], outputs=outputs, request_id="r1", parameters={"num_inference_steps": 1}
            )
            wanted = local(3, [0, 1, 2], 1, seed=[3, 2**64 - 1, 3], output_type="raw").images
            assert found.get_response()["id"] == "r1"
            np.testing.assert_array_equal(found.as_numpy("samples"), wanted)
            np.testing.assert_array_equal(found.as_numpy("class_labels"), [0, 1, 2])
            pictures = local(3, [0, 1, 2], 1, seed=[3, 2**64 - 1, 3], output_type="uint8").images
            np.testing.assert_array_equal(found.as_numpy("images"), pictures)
        with pytest.raises(triton.InferenceServerException, match="expected 'linear'"):
            client.get_model_metadata("other")
        wrong = triton.InferInput("seed", [1], "INT64")
        wrong.set_data_from_numpy(np.array([3]))
        with pytest.raises(triton.InferenceServerException, match="seed is INT64"):
            client.infer("linear", [wrong])
