"""A Triton model repository: its configs in Triton's own message, its Python model, and a real server."""

import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.servers import eventually, write_served_bundle
from scm_sdk._util.files import sha256_file
from scm_sdk.bundle.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.bundle.manifest import Artifact, EngineFacts
from scm_sdk.errors import ConfigError, ScmError
from scm_sdk.export.triton_model import draw_label, standard_normal, to_offset, to_png, to_uint8
from scm_sdk.export.triton_repository import write_triton_repository
from scm_sdk.inference import request
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.sources import open_source
from scm_sdk.inference.start import StartImages, offset_factor
from scm_sdk.noise import standard_normal as noise_of_the_package


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    bundle = write_served_bundle(tmp_path / "linear")
    return write_triton_repository(bundle, tmp_path / "models").path


def parsed(config: Path) -> Any:
    """A config as Triton's own message."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or found.origin is None:
        pytest.skip("needs tritonclient")
    path = Path(found.origin).parent / "grpc" / "model_config_pb2.py"  # without grpc, which its package imports
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.get("model_config_pb2") or importlib.util.module_from_spec(spec)
    if "model_config_pb2" not in sys.modules:
        spec.loader.exec_module(module)
        sys.modules["model_config_pb2"] = module
    from google.protobuf import text_format

    return text_format.Parse(config.read_text(encoding="utf-8"), module.ModelConfig())


def test_configs_are_messages_of_triton(repository: Path) -> None:
    core, front = (parsed(repository / name / "config.pbtxt") for name in ("linear_core", "linear"))
    assert (core.backend, core.max_batch_size, front.backend) == ("onnxruntime", 4, "python")
    assert [(t.name, list(t.dims), t.HasField("reshape")) for t in core.input] == [
        ("noise_0", [3, 8, 8], False), ("noise_1", [3, 8, 8], False), ("class_labels", [1], True),
    ]  # fmt: skip
    assert [(t.name, list(t.dims), t.optional) for t in front.input] == [
        ("seed", [1], False), ("class_labels", [1], True),
    ]  # fmt: skip
    assert [(t.name, list(t.dims)) for t in front.output] == [("images", [8, 8, 3]), ("png", [1])]
    assert front.dynamic_batching.default_queue_policy.max_queue_size == 64
    assert front.parameters["core"].string_value == "linear_core"
    assert {key for warmup in core.model_warmup for key in warmup.inputs} == {"noise_0", "noise_1", "class_labels"}


def test_the_manifest_has_the_digest_of_every_file(repository: Path) -> None:
    manifest = json.loads((repository / "MANIFEST.json").read_text("utf-8"))
    found = {p.relative_to(repository).as_posix(): sha256_file(p) for p in repository.rglob("*") if p.is_file()}
    del found["MANIFEST.json"]
    assert manifest["sha256"] == found and "linear/1/model.py" in found
    assert [record["artifact"] for record in manifest["parity"]] == ["onnx/fp32/2step/model.onnx"]
    assert "--model-control-mode=none" in (repository / "README.md").read_text("utf-8")


def test_the_python_model_draws_the_noise_labels_and_pictures_of_this_package() -> None:
    for seed in (0, 1, 2**32, 2**63 + 5, 2**64 - 1):
        for step, shape in ((0, (3, 8, 8)), (1, (5,)), (3, (1, 2, 3, 7))):
            np.testing.assert_array_equal(standard_normal(seed, step, shape), noise_of_the_package(seed, step, shape))
        assert draw_label(seed, 7) == request.draw_label(seed, 7)
    from scm_sdk.images import to_uint8 as pictures_of_the_package

    samples = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    pictures = to_uint8(samples, (-1.0, 1.0))
    np.testing.assert_array_equal(pictures, pictures_of_the_package(samples, (-1.0, 1.0)))
    for picture in (pictures[0], pictures[0, :, :, :1]):
        found = np.asarray(Image.open(io.BytesIO(to_png(picture))))
        np.testing.assert_array_equal(found.reshape(picture.shape), picture)


def test_an_image_to_start_from_changes_the_noise_as_in_this_package(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path / "linear", start_time=0.9, value_range=(-1.7, 2.3))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    source = open_source(bundle)
    spec = source.spec(1, unrolled=False)
    wanted = StartImages(source, device=None, num_threads=None).offset(spec, 2, images)
    np.testing.assert_array_equal(to_offset(images, spec.value_range, float(offset_factor(spec))), wanted)
    for steps, names in ((1, ["seed", "class_labels", "image"]), (2, ["seed", "class_labels"])):
        write_triton_repository(bundle, tmp_path / "models", steps=steps, overwrite=steps == 2)
        inputs = parsed(tmp_path / "models/linear/config.pbtxt").input
        assert [each.name for each in inputs] == names
        assert steps == 2 or (list(inputs[2].dims), inputs[2].optional) == ([8, 8, 3], True)


def test_engines_go_in_by_compute_capability_and_those_of_tensorrt_rtx_stay_out(tmp_path: Path) -> None:
    source = Bundle.open(write_served_bundle(tmp_path / "linear", steps=(2,)))
    facts = {"library_version": "10.16.0.5", "platform": "linux-x86_64", "batch": (1, 4, 4)}
    kinds = {"tensorrt": ("8.0", "8.6"), "tensorrt_rtx": ("8.9",)}
    engines = [
        Artifact(
            path=f"engines/{kind}/model.engine",
            format=kind,  # type: ignore[arg-type]
            num_inference_steps=2,
            engine=EngineFacts(compute_capabilities=capabilities, **facts),  # type: ignore[arg-type]
        )
        for kind, capabilities in kinds.items()
    ]
    with publish_bundle(tmp_path / "with_engines") as folder:
        shutil.copytree(source.path / "onnx", folder / "onnx")
        for engine in engines:
            (folder / engine.path).parent.mkdir(parents=True)
            (folder / engine.path).write_bytes(engine.path.encode())
        write_bundle(
            folder, name="linear", samplers=source.manifest.samplers, artifacts=[*source.manifest.artifacts, *engines]
        )
    found = write_triton_repository(tmp_path / "with_engines", tmp_path / "models")
    assert found.models == ("linear", "linear_core", "linear_core_trt")
    assert found.left_out == ("engines/tensorrt_rtx/model.engine",)
    config = parsed(found.path / "linear_core_trt" / "config.pbtxt")
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "model_sm80.plan")
    assert dict(config.cc_model_filenames) == {"8.0": "model_sm80.plan", "8.6": "model_sm86.plan"}
    for name in config.cc_model_filenames.values():
        assert (found.path / "linear_core_trt" / "1" / name).read_bytes() == b"engines/tensorrt/model.engine"
    assert parsed(found.path / "linear" / "config.pbtxt").parameters["core"].string_value == "linear_core_trt"
    assert "10.16.0.5" in (found.path / "README.md").read_text("utf-8")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path / "linear")
    with pytest.raises(ConfigError, match="no fp16 graph of 2 steps"):
        write_triton_repository(bundle, tmp_path / "models", precision="fp16")
    with pytest.raises(ConfigError, match="name"):
        write_triton_repository(bundle, tmp_path / "models", name="../x")
    write_triton_repository(bundle, tmp_path / "models")
    with pytest.raises(ScmError, match="models"):
        write_triton_repository(bundle, tmp_path / "models")
    write_triton_repository(bundle, tmp_path / "models", steps=1, overwrite=True)
    assert len(parsed(tmp_path / "models" / "linear_core" / "config.pbtxt").input) == 2


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def other_servers() -> ModuleType:
    """The benchmark that runs Triton and other servers."""
    file = Path(__file__).resolve().parents[2] / "benchmarks/speed/other_servers.py"
    spec = importlib.util.spec_from_file_location("other_servers", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules["other_servers"] = importlib.util.module_from_spec(spec)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@contextmanager
def triton(environment: Path, repository: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Run the tritonserver of a Python environment that holds nvidia-pytriton, numpy<2 and onnxruntime."""
    servers, log = other_servers(), tmp_path / "triton.log"
    port = servers.free_port()
    command, variables = servers.triton_command(environment, repository, tmp_path / "backends", port)
    command.append("--exit-on-error=false")
    with log.open("wb") as file, subprocess.Popen(command, env=variables, stdout=file, stderr=file) as process:
        try:
            eventually(lambda: listens(port) or process.poll() is not None)
            yield f"127.0.0.1:{port}", log
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_real_server_accepts_the_configs_and_makes_the_pictures_of_this_package(
    repository: Path, tmp_path: Path
) -> None:
    client = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    if "TRITON_ENVIRONMENT" not in os.environ:
        pytest.skip("needs TRITON_ENVIRONMENT, a virtual environment with nvidia-pytriton, numpy<2 and onnxruntime")
    environment = Path(os.environ["TRITON_ENVIRONMENT"])
    with triton(environment, repository, tmp_path) as (_, log):
        text = log.read_text("utf-8")
        assert "unable to find backend library for backend 'onnxruntime'" in text, "its config was accepted"
        assert "failed to read text proto" not in text
        assert "successfully loaded 'linear'" in text
    other_servers().run_graph_in_python(repository, "linear")
    starts = write_served_bundle(tmp_path / "starts", start_time=0.9)
    other = write_triton_repository(starts, tmp_path / "other", steps=1, name="starts").path
    other_servers().run_graph_in_python(other, "starts")
    for name in ("starts", "starts_core"):
        shutil.copytree(other / name, repository / name)
    seeds = [0, 7, 2**63, 2**64 - 1]
    with triton(environment, repository, tmp_path) as (address, _), client.InferenceServerClient(address) as asked:
        assert asked.is_server_ready()
        seed = client.InferInput("seed", [4, 1], "UINT64")
        seed.set_data_from_numpy(np.array(seeds, np.uint64)[:, None])
        label = client.InferInput("class_labels", [4, 1], "INT64")
        outputs = [client.InferRequestedOutput(name) for name in ("images", "png")]
        with Generator.from_pretrained(tmp_path / "linear", num_threads=1) as gen:
            for labels in (None, [0, 1, 2, 0]):
                if labels:
                    label.set_data_from_numpy(np.array(labels)[:, None])
                found = asked.infer("linear", [seed, label] if labels else [seed], outputs=outputs)
                wanted = gen(4, labels, seed=seeds, output_type="uint8").images
                np.testing.assert_array_equal(found.as_numpy("images"), wanted)
                for file, picture in zip(found.as_numpy("png")[:, 0], wanted, strict=True):
                    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), picture)
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
        image = client.InferInput("image", [4, 8, 8, 3], "UINT8")
        image.set_data_from_numpy(images)
        label.set_data_from_numpy(np.zeros((4, 1), np.int64))
        found = asked.infer("starts", [seed, label, image], outputs=outputs[:1])
        with Generator.from_pretrained(starts, num_threads=1) as gen:
            wanted = gen(4, "cat", seed=seeds, image=images, start_time=0.9, output_type="uint8").images
        np.testing.assert_array_equal(found.as_numpy("images"), wanted)
        with pytest.raises(client.InferenceServerException, match="image"):
            asked.infer("linear", [seed, label, image])
        label.set_data_from_numpy(np.full((4, 1), 3))
        with pytest.raises(client.InferenceServerException, match="class_labels"):
            asked.infer("linear", [seed, label])
