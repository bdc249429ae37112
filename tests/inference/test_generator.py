"""Generator: what it promises about seeds, labels, batches, outputs, streams and threads."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from scm_sdk import EventLines, Generator, ProgressBar
from scm_sdk._util.events import Silent
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import ParityRecord
from scm_sdk.errors import BackendFailure, ConfigError
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec

GRAPH = "onnx/fp32/2step/model.onnx"
PLAIN = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), max_batch=4)
LABELED = msgspec.structs.replace(PLAIN, num_classes=3)


# Seeds, labels and batches


def test_a_seed_names_an_image(ort: Generator) -> None:
    together = ort(11, seed=100, output_type="raw")
    assert together.seeds == tuple(range(100, 111))
    assert together.info.batches == (5, 5, 1)
    for size in (1, 3):
        split = ort(11, seed=100, output_type="raw", batch_size=size)
        np.testing.assert_array_equal(split.images, together.images)
    picked = ort(3, seed=[107, 100, 107], output_type="raw")
    assert picked.class_labels == tuple(together.class_labels[i] for i in (7, 0, 7))  # type: ignore[index]
    np.testing.assert_array_equal(picked.images, together.images[[7, 0, 7]])


def test_noise_is_what_a_seed_names(ort: Generator) -> None:
    named = ort(4, [0, 1, 2, 3], seed=9, output_type="raw")
    given_noise = ort(4, [0, 1, 2, 3], noise=draw_noise(ort.opened().spec, range(9, 13)), output_type="raw")
    assert given_noise.seeds == ()
    np.testing.assert_array_equal(named.images, given_noise.images)
    stacked = np.stack(draw_noise(ort.opened().spec, range(9, 13)))
    np.testing.assert_array_equal(named.images, ort(4, [0, 1, 2, 3], noise=stacked, output_type="raw").images)


def test_no_seed_draws_a_fresh_one_and_reports_it(ort: Generator) -> None:
    first, second = ort(2, output_type="raw"), ort(2, output_type="raw")
    assert first.seeds != second.seeds
    assert first.seeds[1] == first.seeds[0] + 1
    again = ort(2, seed=first.seeds[0], output_type="raw")
    assert again.class_labels == first.class_labels
    np.testing.assert_array_equal(again.images, first.images)


def test_seed_zero_is_a_seed(ort: Generator) -> None:
    assert ort(1, seed=0, output_type="raw").seeds == (0,)
    assert ort(2, seed=np.int64(0), output_type="raw").seeds == (0, 1)
    top = 2**64 - 1
    assert ort(1, seed=top, output_type="raw").seeds == (top,)


def test_labels_by_name_and_number(ort: Generator) -> None:
    names = ort(3, ["robot", 0, "cat"], seed=1, output_type="raw")
    assert names.class_labels == (2, 0, 0)
    np.testing.assert_array_equal(names.images, ort(3, np.array([2, 0, 0]), seed=1, output_type="raw").images)
    assert ort(2, "rocket", seed=1).class_labels == (3, 3)
    labels = [ort(1, label, seed=1, output_type="raw").images for label in range(4)]
    assert len({image.tobytes() for image in labels}) == 4


# Outputs


def test_output_types(ort: Generator) -> None:
    out = {kind: ort(3, seed=4, output_type=kind).images for kind in ("raw", "np", "pt", "uint8", "pil")}
    raw = out["raw"]
    assert (raw.shape, raw.dtype) == ((3, 3, 8, 8), np.float32)
    assert raw.min() < -1 or raw.max() > 1, "the untrained model leaves the range, so clipping is seen"
    unit = np.clip((raw + 1) / 2, 0, 1)
    np.testing.assert_allclose(out["np"], unit.transpose(0, 2, 3, 1), rtol=0, atol=1e-7)
    assert out["np"].dtype == np.float32
    assert isinstance(out["pt"], torch.Tensor)
    assert out["pt"].dtype == torch.float32
    np.testing.assert_array_equal(out["pt"].numpy().transpose(0, 2, 3, 1), out["np"])
    np.testing.assert_array_equal(out["uint8"], np.rint(out["np"] * np.float64(255)).astype(np.uint8))
    assert [image.size for image in out["pil"]] == [(8, 8)] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in out["pil"]]), out["uint8"])


def test_info_says_what_ran(unet_bundle: Path, ort: Generator) -> None:
    info = ort(2, seed=1, num_inference_steps=1).info
    manifest = Bundle.open(unet_bundle, verify="none").manifest
    assert (info.backend, info.device, info.precision) == ("onnxruntime", "cpu", "fp32")
    assert info.artifact == "onnx/fp32/1step/model.onnx"
    assert info.sha256 == next(entry.sha256 for entry in manifest.files if entry.path == info.artifact)
    assert (info.build_id, info.num_inference_steps, info.fallback) == (manifest.build_id, 1, None)
    assert set(info.timings) == {"load_ms", "noise_ms", "sample_ms", "total_ms"}
    assert min(info.timings.values()) > 0
    assert any("2-step graph, 1 asked for" in row.reason for row in info.rejected)
    assert json.loads(json.dumps(info.to_dict()))["rejected"][0]["accepted"] is False


def test_steps_default_to_two(ort: Generator, reference: Generator, unet_bundle: Path) -> None:
    assert ort(1, seed=0).info.num_inference_steps == 2
    assert reference(1, seed=0, num_inference_steps=3).info.num_inference_steps == 3  # torch unrolls any
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_inference_steps=1) as gen:
        assert gen(1, seed=0).info.num_inference_steps == 1


def test_progress(ort: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    ort(7, seed=0, batch_size=3, events=EventLines(lines.append))
    assert lines == ["3 of 7: images", "6 of 7: images", "7 of 7: images"]
    with ProgressBar() as bar:
        ort(7, seed=0, events=bar)
    streams = capsys.readouterr()
    assert "7/7" in streams.err
    assert streams.out == ""


def test_a_model_without_labels_and_one_of_latents(linear_bundle: Callable[..., Path]) -> None:
    with Generator.from_pretrained(linear_bundle(PLAIN), backend="onnxruntime") as gen:
        out = gen(3, seed=1, output_type="raw")
        assert out.class_labels is None
        np.testing.assert_allclose(out.images, 0.5 * sum(draw_noise(PLAIN, [1, 2, 3])), rtol=0, atol=1e-6)
        with pytest.raises(ConfigError, match=r"this model is unconditional\. Leave class_labels out"):
            gen(1, class_labels=0)
    latents = msgspec.structs.replace(PLAIN, output="latents", sample_shape=(4, 4, 4))
    with Generator.from_pretrained(linear_bundle(latents, name="latents"), backend="onnxruntime") as gen:
        assert gen(2, seed=0, output_type="raw").images.shape == (2, 4, 4, 4)
        with pytest.raises(ConfigError, match=r"returns latents of shape \(4, 4, 4\).*Use output_type='raw'"):
            gen(2, seed=0)


def test_images_that_are_not_finite_are_refused(linear_bundle: Callable[..., Path]) -> None:
    path = linear_bundle(PLAIN, gain=float("nan"))
    with Generator.from_pretrained(path, backend="onnxruntime") as gen:
        with pytest.raises(BackendFailure, match=f"onnxruntime .{GRAPH}. returned NaN or infinity for seed 5"):
            gen(2, seed=5)
        assert np.isnan(gen(1, seed=5, output_type="raw").images).all()  # raw shows what came


def test_max_batch_can_be_lowered(unet_bundle: Path) -> None:
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", max_batch=2) as gen:
        assert gen(5, seed=0).info.batches == (2, 2, 1)
        with pytest.raises(ConfigError, match=r"batch_size is 3, expected 1\.\.2"):
            gen(5, batch_size=3)
        with gen.reopen(max_batch=4) as other:
            assert other(5, seed=0).info.batches == (4, 1)
            assert other.opened().row.backend == "onnxruntime"


def test_closing(unet_bundle: Path) -> None:
    gen = Generator.from_pretrained(unet_bundle, backend="onnxruntime")
    assert gen.warmup() > 0
    gen.close()
    gen.close()
    with pytest.raises(BackendFailure, match="this generator was closed, expected an open one"):
        gen(1)


# The stream, and threads


def test_a_stream_equals_its_single_calls(ort: Generator) -> None:
    noise = draw_noise(ort.opened().spec, [50, 51])
    requests: list[dict[str, Any]] = [
        {"num_images": 2, "seed": 10},
        {"seed": 3, "class_labels": "dog"},
        {"num_images": 2, "noise": noise, "class_labels": [1, 3]},
        {"num_images": 12, "seed": 0},
        {"seed": 5, "num_inference_steps": 1},
        {"num_images": 2, "seed": 6, "num_inference_steps": 1},
        {"seed": 7},
    ]
    outputs = list(ort.stream({**request, "output_type": "raw"} for request in requests))
    assert [out.info.batches for out in outputs] == [(5,)] * 3 + [(5, 5, 2)] + [(3,)] * 2 + [(1,)]
    for request, out in zip(requests, outputs, strict=True):
        alone = ort(**request, output_type="raw")
        assert (out.seeds, out.class_labels) == (alone.seeds, alone.class_labels)
        np.testing.assert_array_equal(out.images, alone.images)


def test_a_wrong_request_in_a_stream_costs_only_itself(ort: Generator) -> None:
    stream = ort.stream([{"seed": 1, "output_type": "uint8"}, {"seed": 2}, {"num_images": 0}, {"seed": 3}])
    assert next(stream).images.dtype == np.uint8
    assert next(stream).seeds == (2,)
    with pytest.raises(ConfigError, match="num_images is 0"):
        next(stream)
    with pytest.raises(TypeError, match="events"):
        list(ort.stream([{"events": Silent()}]))
    assert list(ort.stream([])) == []


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_one_generator_for_many_threads(unet_bundle: Path, backend: str) -> None:
    """Fresh, so that the threads also race for opening; two numbers of steps, so that they open both."""
    jobs = [{"num_images": 1 + n % 4, "seed": n, "num_inference_steps": 1 + n % 2} for n in range(24)]
    with Generator.from_pretrained(unet_bundle, backend=backend, num_threads=1) as gen:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda job: gen(**job, output_type="raw").images, jobs))
        assert gen.opened(1).backend is gen.opened(1).backend
        for job, images in zip(jobs, together, strict=True):
            np.testing.assert_array_equal(images, gen(**job, output_type="raw").images)  # type: ignore[arg-type]


def test_a_warning_points_at_the_line_that_opened(linear_bundle: Callable[..., Path]) -> None:
    records = [
        ParityRecord(
            artifact=f"onnx/fp32/{steps}step/model.onnx", reference="denoiser", backend="onnxruntime", threshold=1,
            noise_floor=0, max_abs=0, num_samples=4, passed=True,
        )
        for steps in (1, 2)
    ]  # fmt: skip
    path = linear_bundle(PLAIN, msgspec.structs.replace(PLAIN, times=(1.5,)), parity=records)
    with pytest.warns(RuntimeWarning, match="runs instead") as caught:
        gen = Generator.from_pretrained(path, backend="torch", fallback="warn")
    with gen, pytest.warns(RuntimeWarning, match="runs instead") as later:
        gen(num_inference_steps=1)
    assert {Path(each.filename).name for each in (*caught, *later)} == {"test_generator.py"}
