"""The canary: what it takes for right, and a planted fault that turns a server red."""

from pathlib import Path

import pytest

from helpers.servers import eventually, running, write_served_bundle
from scm_sdk.errors import ConfigError
from scm_sdk.inference.generator import Generator
from scm_sdk.serve.canary import Bound, open_reference
from scm_sdk.serve.options import ServeOptions

IMAGES = "/v1/images/generations"


@pytest.mark.parametrize("only_warns", [False, True])
def test_a_graph_with_changed_weights_turns_the_server_red(tmp_path: Path, only_warns: bool) -> None:
    """Its parity record says that it passed: it was changed and sealed again."""
    bundle = write_served_bundle(tmp_path / "linear", half_gain=0.51)
    options = ["--precision", "fp16", "--shadow", "1", "--shadow-samples", "3"]
    with running(bundle, *options, *(["--shadow-warn"] if only_warns else [])) as server:
        assert server.http.get("/readyz").status_code == 200
        for seed in range(3):
            assert server.http.post(IMAGES, json={"seed": seed, "label": "dog"}).status_code == 200
            eventually(lambda n=seed: server.metric("scm_canary_samples_total", verdict="out_of_bound") == n + 1)
        eventually(lambda: server.metric("scm_canary_failed") == 1)
        assert server.metric("scm_canary_bound", steps="2", gate="psnr_db") == 55
        assert 0 < server.metric("scm_canary_max_abs") < 0.1
        assert 20 < server.metric("scm_canary_psnr_db_sum") / 3 < 55
        answer = server.http.get("/readyz")
        assert answer.status_code == (200 if only_warns else 503)
        if not only_warns:
            assert answer.json()["error"]["code"] == "not_ready" and "55" in answer.json()["error"]["message"]
        eventually(lambda: any("the canary failed" in line for line in server.lines))
        assert server.http.get("/healthz").status_code == 200


def test_a_right_graph_stays_green(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path / "linear", half_gain=0.5)
    with running(bundle, "--precision", "fp16", "--shadow", "1", "--shadow-samples", "1") as server:
        for steps in (1, 2):
            assert server.http.post(IMAGES, json={"n": 2, "num_inference_steps": steps}).status_code == 200
            eventually(lambda n=2 * steps: server.metric("scm_canary_samples_total", verdict="in_bound") == n)
        assert server.http.get("/readyz").status_code == 200
        assert server.metric("scm_canary_samples_total") == 4


def test_bounds_come_from_the_bundle_and_the_reference_is_another_artifact(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path / "linear", half_gain=0.5)
    with Generator.from_pretrained(bundle, precision="fp16", num_threads=1) as served:
        assert Bound.of(served, 2) == Bound(gate="psnr_db", limit=55.0, origin="the bundle's parity record")
        with open_reference(served, ServeOptions(bundle=bundle, shadow=0.1)) as reference:
            row = reference.opened().row
            assert (row.backend, row.precision) == ("onnxruntime", "fp32")
    with Generator.from_pretrained(bundle, precision="fp32", num_threads=1) as served:
        assert Bound.of(served, 1).gate == "max_abs"
        with pytest.raises(ConfigError, match="shadow has nothing to compare onnxruntime fp32 with"):
            open_reference(served, ServeOptions(bundle=bundle, shadow=0.1))


@pytest.mark.slow
def test_the_canary_of_a_real_model_compares_with_pytorch(unet_bundle: Path) -> None:
    options = ("--backend", "onnxruntime", "--shadow", "1", "--shadow-samples", "1")
    with running(unet_bundle, *options) as server:
        for seed in range(4):
            assert server.http.post(IMAGES, json={"seed": seed}).status_code == 200
            eventually(lambda n=seed: server.metric("scm_canary_samples_total", verdict="in_bound") == n + 1)
        assert server.http.get("/readyz").status_code == 200
