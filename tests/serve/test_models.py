"""What kinds of models are served: latents, guidance, and those that no request could serve."""

from pathlib import Path

import pytest

from helpers.servers import running, write_served_bundle
from scm_sdk.errors import ConfigError
from scm_sdk.serve.options import ServeOptions
from scm_sdk.serve.server import listen
from scm_sdk.serve.service import Service
from scm_sdk.spec import TensorSpec

IMAGES = "/v1/images/generations"


def test_latents_with_guidance_come_as_tensors(tmp_path: Path) -> None:
    bundle = write_served_bundle(
        tmp_path / "linear", steps=(2,), output="latents", sample_shape=(4, 2, 2), guidance_range=(1.0, 4.0)
    )
    with running(bundle) as server:
        assert server.http.get("/readyz").status_code == 200
        model = server.http.get("/v1/models").json()["data"][0]
        assert (model["size"], model["steps"], model["guidance_range"]) == (None, [2], [1.0, 4.0])
        answer = server.http.post(IMAGES, json={"guidance_scale": 2})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
        inputs = [
            {"name": "seed", "datatype": "UINT64", "shape": [2], "data": [1, 1]},
            {"name": "guidance_scale", "datatype": "FP32", "shape": [2], "data": [1, 4]},
        ]
        answer = server.http.post("/v2/models/linear/infer", json={"inputs": inputs}).json()
        assert [(t["name"], t["shape"]) for t in answer["outputs"]] == [
            ("samples", [2, 4, 2, 2]), ("seed", [2]), ("class_labels", [2]),
        ]  # fmt: skip
        missing = server.http.post("/v2/models/linear/infer", json={"inputs": inputs[:1]})
        assert missing.status_code == 400 and "guidance_scale" in missing.json()["error"]
        late = server.http.post("/v2/models/linear/infer", json={"inputs": inputs, "parameters": {"timeout": 0}})
        assert late.status_code == 400


def test_models_that_no_request_could_serve_are_refused_at_the_start(tmp_path: Path) -> None:
    cases = {"prompt_embeds": "text encoder", "camera": "inputs camera"}
    for name, found in cases.items():
        bundle = write_served_bundle(tmp_path / name, steps=(1,), conditioning=(TensorSpec(name=name, shape=(2, 2)),))
        with pytest.raises(ConfigError, match=found):
            Service.open(ServeOptions(bundle=bundle))


def test_addresses_and_steps_that_are_not_there_are_refused(served_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"listen on 192\.0\.2\.1"):
        listen(ServeOptions(bundle=served_bundle, host="192.0.2.1", api_key_file="keys"))
    with pytest.raises(ConfigError, match="num_inference_steps is 3"):
        Service.open(ServeOptions(bundle=served_bundle, steps=(3,)))


def test_only_the_named_steps_are_offered(served_bundle: Path) -> None:
    with Service.open(ServeOptions(bundle=served_bundle, steps=(1,))) as service:
        assert (service.model.steps, service.model.default_steps) == ([1], 1)
