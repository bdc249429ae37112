"""Generator: what it promises about seeds, labels, batches and outputs, and what it refuses."""

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk import Generator, dispatch
from scm_sdk.bundle import Bundle, write_bundle
from scm_sdk.errors import (
    BackendFailure,
    BackendUnavailable,
    BundleError,
    ConfigError,
    IntegrityError,
    ShapeError,
)
from scm_sdk.goldens import Golden, write_goldens
from scm_sdk.manifest import Artifact, Manifest, ParityRecord
from scm_sdk.measured import cache_path, recall
from scm_sdk.noise import draw_noise
from scm_sdk.request import draw_label, make_request, merge
from scm_sdk.spec import SamplerSpec, TensorSpec

GRAPH = "onnx/fp32/2step/model.onnx"
PLAIN = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), max_batch=4)
LABELLED = msgspec.structs.replace(PLAIN, num_classes=3)


def record(backend: str = "onnxruntime", *, passed: bool = True, artifact: str = GRAPH) -> ParityRecord:
    return ParityRecord(
        artifact=artifact,
        reference="denoiser",
        backend=backend,
        threshold=1e-5,
        noise_floor=2e-6,
        max_abs=3e-6 if passed else 4e-2,
        num_samples=32,
        passed=passed,
    )


# Seeds, labels and batches


def test_a_seed_names_an_image(ort: Generator) -> None:
    together = ort(11, seed=100, output_type="raw")
    assert together.seeds == tuple(range(100, 111))
    assert together.info.batches == (5, 5, 1)
    for kwargs in ({"batch_size": 1}, {"batch_size": 3}):
        np.testing.assert_array_equal(ort(11, seed=100, output_type="raw", **kwargs).images, together.images)
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


def test_labels_drawn_from_seeds_are_for_ever(ort: Generator) -> None:
    assert [draw_label(seed, 10) for seed in range(12)] == [5, 0, 9, 2, 6, 1, 9, 8, 9, 3, 4, 1]
    counts = np.bincount([draw_label(seed, 4) for seed in range(4000)])
    assert counts.min() > 900
    assert ort(2, seed=7).class_labels == (draw_label(7, 4), draw_label(8, 4))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_merging_and_cutting_keep_every_image(sizes: list[int], data: st.DataObject) -> None:
    requests = []
    for size in sizes:
        seeds = data.draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
        if data.draw(st.booleans()):
            requests.append(make_request(LABELLED, num_images=size, seed=seeds))
        else:
            labels = [seed % 3 for seed in seeds]
            noise = draw_noise(LABELLED, seeds)
            requests.append(make_request(LABELLED, num_images=size, noise=noise, class_labels=labels))
    merged = merge(requests)
    cut = data.draw(st.integers(0, len(merged)))
    whole = [each.inputs(0, len(each)) for each in requests]
    parts = [merged.inputs(*bounds) for bounds in ((0, cut), (cut, len(merged))) if bounds[0] < bounds[1]]
    for step in range(2):
        want = np.concatenate([noise[step] for noise, _ in whole])
        np.testing.assert_array_equal(np.concatenate([noise[step] for noise, _ in parts]), want)
    want = np.concatenate([conditioning["class_labels"] for _, conditioning in whole])
    np.testing.assert_array_equal(np.concatenate([c["class_labels"] for _, c in parts]), want)


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
    seen: list[tuple[int, int]] = []
    ort(7, seed=0, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]
    ort(7, seed=0, progress=True)
    streams = capsys.readouterr()
    assert "7/7" in streams.err
    assert streams.out == ""


def test_a_model_without_labels_and_one_of_latents(linear_bundle: Callable[..., Path]) -> None:
    with Generator.from_pretrained(linear_bundle(PLAIN), backend="onnxruntime") as gen:
        out = gen(3, seed=1, output_type="raw")
        assert out.class_labels is None
        np.testing.assert_allclose(out.images, 0.5 * sum(draw_noise(PLAIN, [1, 2, 3])), rtol=0, atol=1e-6)
        with pytest.raises(ConfigError, match="this model is unconditional. Leave class_labels out"):
            gen(1, class_labels=0)
    latents = msgspec.structs.replace(PLAIN, output="latents", sample_shape=(4, 4, 4))
    with Generator.from_pretrained(linear_bundle(latents, name="latents"), backend="onnxruntime") as gen:
        assert gen(2, seed=0, output_type="raw").images.shape == (2, 4, 4, 4)
        with pytest.raises(ConfigError, match=r"returns latents of shape \(4, 4, 4\).*Use output_type='raw'"):
            gen(2, seed=0)


def test_images_that_are_not_finite_are_refused(linear_bundle: Callable[..., Path]) -> None:
    path = linear_bundle(PLAIN, gain=float("nan"))
    with Generator.from_pretrained(path, backend="onnxruntime") as gen:
        with pytest.raises(
            BackendFailure, match=f"onnxruntime .{GRAPH}. returned NaN or infinity for seed 5"
        ):
            gen(2, seed=5)
        assert np.isnan(gen(1, seed=5, output_type="raw").images).all()  # raw shows what came


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_images": 0}, ConfigError, "num_images is 0, expected 1 or more"),
        ({"num_images": -3}, ConfigError, "num_images is -3, expected 1 or more"),
        ({"num_images": 1.5}, ConfigError, r"num_images is 1\.5, expected a whole number"),
        ({"num_images": True}, ConfigError, "num_images is True, expected a whole number"),
        ({"class_labels": "robt"}, ConfigError, "'robt', expected one of 4 names. Did you mean 'robot'"),
        ({"class_labels": "zzz"}, ConfigError, "The names are: cat, dog, robot, rocket"),
        ({"class_labels": 4}, ConfigError, r"class label is 4, expected 0\.\.3"),
        ({"class_labels": -1}, ConfigError, r"class label is -1, expected 0\.\.3"),
        ({"class_labels": 1.0}, ConfigError, r"class label is 1\.0, expected a whole number or a name"),
        ({"class_labels": [0, 1]}, ConfigError, "class_labels holds 2 labels, expected num_images = 1"),
        ({"num_images": 3, "class_labels": [0, 1]}, ConfigError, "holds 2 labels, expected num_images = 3"),
        ({"num_inference_steps": 4}, ConfigError, "num_inference_steps is 4, expected one of 1, 2"),
        ({"num_inference_steps": 0}, ConfigError, "num_inference_steps is 0, expected 1 or more"),
        ({"seed": -1}, ConfigError, "seed is -1, expected a whole number"),
        ({"seed": "7"}, ConfigError, "seed is '7', expected a whole number"),
        ({"seed": [1, 2]}, ConfigError, "seed holds 2 seeds, expected num_images = 1"),
        ({"num_images": 2, "seed": 2**64 - 1}, ConfigError, "seed is 18446744073709551616, expected"),
        (
            {"output_type": "jpg"},
            ConfigError,
            "output_type is 'jpg', expected one of pil, np, pt, uint8, raw",
        ),
        ({"batch_size": 6}, ConfigError, r"batch_size is 6, expected 1\.\.5"),
        ({"batch_size": 0}, ConfigError, r"batch_size is 0, expected 1\.\.5"),
        ({"noise": np.zeros((1, 1, 3, 8, 8), np.float32)}, ShapeError, "noise holds 1 arrays, expected 2"),
        ({"noise": 3}, ShapeError, "noise holds int, expected 2, one per step"),
        (
            {"noise": np.zeros((2, 2, 3, 8, 8), np.float32)},
            ShapeError,
            r"\(2, 3, 8, 8\) float32, expected \(1, 3",
        ),
        ({"noise": np.zeros((2, 1, 3, 8, 8))}, ShapeError, r"noise\[0\] is .* float64, expected .* float32"),
        ({"noise": [[0.0], [1.0]]}, ShapeError, r"noise\[0\] is list, expected \(1, 3, 8, 8\) float32"),
        ({"noise": np.full((2, 1, 3, 8, 8), np.nan, np.float32)}, ConfigError, "NaN or infinity in image 0"),
        ({"noise": np.zeros((2, 1, 3, 8, 8), np.float32), "seed": 1}, ConfigError, "seed and noise are both"),
        (
            {"noise": np.zeros((2, 1, 3, 8, 8), np.float32)},
            ConfigError,
            "noise is given without class_labels",
        ),
        ({"guidance_scale": 1.0}, ConfigError, "guidance_scale is given, but this model has no such input"),
        (
            {"conditioning": {"x": np.zeros(1)}},
            ConfigError,
            r"conditioning holds \['x'\], expected exactly \[\]",
        ),
    ],
)
def test_wrong_arguments(
    ort: Generator, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ort(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tpu"}, "backend is 'tpu', expected 'auto' or one of onnxruntime, torch"),
        ({"precision": "fp64"}, "precision is 'fp64', expected 'auto' or one of fp32, fp16"),
        (
            {"precision": "fp16"},
            "nothing to run 2 steps with .*precision='fp16'.*precision='fp16' was asked for",
        ),
        ({"fallback": "maybe"}, "fallback is 'maybe', expected one of error, warn, allow"),
        ({"verify": "twice"}, "verify is 'twice', expected one of none, digest, smoke, full"),
        ({"max_batch": 6}, r"max_batch is 6, expected 1\.\.5"),
        ({"num_threads": 0}, "num_threads is 0, expected 1 or more"),
        ({"num_inference_steps": 3}, "num_inference_steps is 3, expected one of 1, 2, .*backend='torch'"),
    ],
)
def test_wrong_options(unet_bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, BackendUnavailable), match=message):
        Generator.from_pretrained(unet_bundle, **arguments)


def test_guidance_and_conditioning_are_checked() -> None:
    spec = msgspec.structs.replace(
        PLAIN, guidance_range=(1.0, 5.0), conditioning=(TensorSpec(name="p", shape=(2,)),)
    )
    p = np.zeros((2, 2), np.float32)
    good = make_request(spec, num_images=2, seed=0, guidance_scale=4.5, conditioning={"p": p})
    np.testing.assert_array_equal(good.conditioning["guidance_scale"], np.float32([4.5, 4.5]))
    for scale, message in (
        (None, r"guidance_scale is missing, expected a number in 1\.0\.\.5\.0"),
        (9, r"expected numbers in 1\.0\.\.5\.0"),
        (float("nan"), "expected numbers in"),
        ("high", "expected a number or one for each image"),
        ([1.0] * 3, r"has shape \(3,\), expected one number or num_images = 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_request(spec, num_images=2, seed=0, guidance_scale=scale, conditioning={"p": p})  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"conditioning\['p'\] is \(1, 2\) float32, expected \(2, 2\)"):
        make_request(spec, num_images=2, seed=0, guidance_scale=1, conditioning={"p": p[:1]})
    with pytest.raises(ConfigError, match="holds NaN or infinity"):
        make_request(spec, num_images=2, seed=0, guidance_scale=1, conditioning={"p": p * np.nan})


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere does not exist, expected the folder of a bundle"):
        Generator.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="file is a file, expected the folder"):
        Generator.from_pretrained(tmp_path / "file")
    with pytest.raises(BundleError, match=r"holds neither scm_manifest\.json .* nor config\.json"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"no diffusion_pytorch_model\.safetensors in .*Copy it whole"):
        Generator.from_pretrained(tmp_path)


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
    with pytest.raises(TypeError, match="progress"):
        list(ort.stream([{"progress": True}]))
    assert list(ort.stream([])) == []


@pytest.mark.parametrize("backend", sorted(dispatch.BACKENDS))
def test_one_generator_for_many_threads(unet_bundle: Path, backend: str) -> None:
    """Fresh, so that the threads also race for opening; two numbers of steps, so that they open both."""
    jobs = [{"num_images": 1 + n % 4, "seed": n, "num_inference_steps": 1 + n % 2} for n in range(24)]
    with Generator.from_pretrained(unet_bundle, backend=backend, num_threads=1) as gen:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda job: gen(**job, output_type="raw").images, jobs))
        assert gen.opened(1).backend is gen.opened(1).backend
        for job, images in zip(jobs, together, strict=True):
            np.testing.assert_array_equal(images, gen(**job, output_type="raw").images)  # type: ignore[arg-type]


# The plan: what runs, what does not, and why


def test_auto_takes_onnxruntime_only_with_a_passed_parity(unet_copy: Path) -> None:
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "torch"
        row = next(row for row in gen.plan() if (row.backend, row.artifact) == ("onnxruntime", GRAPH))
        assert (
            row.reason
            == "no recorded parity; compare it (scm-export validate) or ask for the backend by name"
        )
    Bundle.open(unet_copy).with_parity(record())
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "onnxruntime"
        chosen = gen.plan().chosen
        assert chosen is not None
        assert chosen.reason == "parity passed: 3.0e-06 of 1.0e-05 allowed"
    Bundle.open(unet_copy).with_parity(record(passed=False))
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "torch"
        assert any(
            row.reason == "recorded parity failed: 4.0e-02 is over 1.0e-05" for row in gen.plan().rejected
        )


def test_auto_follows_what_was_measured_here(unet_copy: Path) -> None:
    Bundle.open(unet_copy).with_parity(record())
    build_id = Bundle.open(unet_copy).manifest.build_id
    with Generator.from_pretrained(unet_copy) as gen:
        latency = gen.benchmark(rounds=3, warmup=1)
        assert [timing.name for timing in latency] == [f"onnxruntime:{GRAPH}", "torch:denoiser"]
        assert gen(1, seed=0).images, "benchmark closes only what it opened"
    times = recall(build_id, device=None, num_threads=None)
    assert times == {
        ("onnxruntime", GRAPH): latency.timings[0].median_ms,
        ("torch", "denoiser"): latency.timings[1].median_ms,
    }
    # Written as if torch had won: the file decides, not the order of BACKENDS.
    data = json.loads(cache_path().read_bytes())
    cache_path().write_text(json.dumps({key: 1e-3 if key.startswith("torch") else 9.0 for key in data}))
    with Generator.from_pretrained(unet_copy) as gen:
        assert [row.backend for row in gen.plan().accepted] == ["torch", "onnxruntime"]
        assert "measured here: 9.00 ms at batch 1" in str(gen.plan())
    assert recall(build_id, device="cuda", num_threads=None) == {}
    assert recall("another build", device=None, num_threads=None) == {}
    cache_path().write_text("not json")
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen.plan().accepted[0].backend == "onnxruntime"


def test_the_plan_holds_every_pair_and_prints_as_a_table(ort: Generator) -> None:
    plan = ort.plan()
    assert len(plan) == 2 * 3
    assert len({(row.backend, row.artifact) for row in plan}) == 6
    lines = str(plan).splitlines()
    assert lines[0].split() == ["backend", "artifact", "precision", "steps", "verdict", "reason"]
    assert lines[1].startswith("*  onnxruntime") and "accepted" in lines[1]
    assert all("rejected" in line for line in lines[2:])
    assert json.loads(json.dumps(plan.to_dict()))[0]["chosen"] is True
    assert plan[0] is plan.chosen and plan[1:] == plan.rejected
    assert all(row.reason for row in plan)


def test_fp32_goes_before_other_precisions_until_measured() -> None:
    artifacts = [
        Artifact(path="a", format="onnx", precision="int8", num_inference_steps=2),
        Artifact(path="b", format="onnx", num_inference_steps=2),
        Artifact(path="c", format="tensorrt", num_inference_steps=2),
    ]
    parity = [record(artifact=path) for path in "ab"]
    plan = dispatch.make_plan(artifacts, num_inference_steps=2, parity=parity)
    assert [row.artifact for row in plan.accepted] == ["b", "a"]
    half = {("onnxruntime", "a"): 1.0}
    plan = dispatch.make_plan(artifacts, num_inference_steps=2, parity=parity, measured_ms=half)
    assert [row.artifact for row in plan.accepted] == ["b", "a"]
    both = half | {("onnxruntime", "b"): 2.0}
    plan = dispatch.make_plan(artifacts, num_inference_steps=2, parity=parity, measured_ms=both)
    assert [row.artifact for row in plan.accepted] == ["a", "b"]
    plan = dispatch.make_plan(
        artifacts, num_inference_steps=2, parity=parity, precision="int8", measured_ms=both
    )
    assert [row.artifact for row in plan.accepted] == ["a"]
    assert {row.reason for row in plan if row.artifact == "c"} == {
        "opens onnx, not tensorrt",
        "opens safetensors, not tensorrt",
    }
    assert dispatch.make_plan(artifacts, num_inference_steps=3, parity=parity).chosen is None


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the machine as it is where onnxruntime is not installed."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


@pytest.mark.usefixtures("without_onnxruntime")
def test_a_missing_library_is_named_with_its_command(unet_copy: Path) -> None:
    command = re.escape("pip install 'scm-sdk[onnxruntime]'")
    with pytest.raises(BackendUnavailable, match=f"needs onnxruntime, which is not installed. .*{command}"):
        Generator.from_pretrained(unet_copy, backend="onnxruntime")
    Bundle.open(unet_copy).with_parity(record())
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen.plan().chosen.backend == "torch"  # type: ignore[union-attr]
        assert any(re.search(f"onnxruntime is not installed: {command}", row.reason) for row in gen.plan())


@pytest.mark.usefixtures("without_onnxruntime")
def test_fallback_is_the_users_choice_and_recorded(unet_bundle: Path) -> None:
    with pytest.warns(RuntimeWarning, match="torch .fp32. runs instead: backend 'onnxruntime' needs") as seen:
        gen = Generator.from_pretrained(unet_bundle, backend="onnxruntime", fallback="warn")
    assert seen[0].filename == __file__
    info = gen(1, seed=0).info
    assert info.backend == "torch"
    assert info.fallback is not None and "not installed" in info.fallback
    gen.close()
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", fallback="allow") as gen:
        assert gen(1, seed=0).info.fallback == info.fallback
    with Generator.from_pretrained(unet_bundle, precision="int8", fallback="allow") as gen:
        assert "precision='int8'" in (gen(1, seed=0).info.fallback or "")


def test_a_library_that_does_not_import_is_no_crash(
    unet_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, as far as anybody can see, and broken: found when it is opened."""
    broken = replace(
        dispatch.BACKENDS["onnxruntime"], module="scm_sdk.runtimes.torch_backend", opens=("onnx",)
    )
    monkeypatch.setitem(dispatch.BACKENDS, "onnxruntime", broken)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailable, match="needs torch, which could not be imported"):
        Generator.from_pretrained(unet_bundle, backend="onnxruntime")


def test_damage_never_falls_back(unet_copy: Path) -> None:
    with open(unet_copy / GRAPH, "r+b") as stream:
        stream.seek(100)
        stream.write(b"\0" * 50)
    with pytest.raises(IntegrityError, match="altered or damaged"):
        Generator.from_pretrained(unet_copy, backend="onnxruntime", fallback="allow")
    with pytest.raises(IntegrityError):
        Generator.from_pretrained(unet_copy, backend="onnxruntime", fallback="allow", verify="none")


def test_a_checkpoint_folder_runs_with_torch(unet_checkpoint: Path, reference: Generator) -> None:
    with Generator.from_pretrained(unet_checkpoint) as gen:
        out = gen(3, seed=1, output_type="raw")
        np.testing.assert_array_equal(out.images, reference(3, seed=1, output_type="raw").images)
        assert (out.info.artifact, len(out.info.sha256)) == (".", 64)
    with Generator.from_pretrained(unet_checkpoint, backend="torch") as gen:
        assert gen(1, seed=1, num_inference_steps=5).info.num_inference_steps == 5
    with pytest.raises(
        ConfigError, match="it holds safetensors, onnxruntime opens onnx. Export it first: scm-export onnx"
    ):
        Generator.from_pretrained(unet_checkpoint, backend="onnxruntime")


def test_recorded_samples_are_run_when_asked(unet_copy: Path, linear_bundle: Callable[..., Path]) -> None:
    for verify in ("smoke", "full"):
        for backend in dispatch.BACKENDS:
            Generator.from_pretrained(unet_copy, backend=backend, verify=verify).close()  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="records no sample of 2 steps, expected one for verify='smoke'"):
        Generator.from_pretrained(linear_bundle(PLAIN), backend="onnxruntime", verify="smoke")
    bundle = Bundle.open(unet_copy)
    golden = bundle.goldens()[2]
    moved = Golden(
        images=golden.images + np.float32(0.01), seeds=golden.seeds, class_labels=golden.class_labels
    )
    write_goldens(unet_copy, {2: moved})
    with pytest.raises(
        BackendFailure, match=r"differs from the recorded sample by 2\.0e-02 sigma_data, expected at most"
    ):
        _open_with_new_golden(unet_copy)


def _open_with_new_golden(path: Path) -> None:
    """Record the golden's new digest in the manifest, then open."""
    manifest = Manifest.from_json((path / "scm_manifest.json").read_bytes())
    write_bundle(path, name="moved", samplers=manifest.samplers, artifacts=manifest.artifacts)
    Generator.from_pretrained(path, backend="onnxruntime", verify="smoke")


def test_max_batch_can_be_lowered(unet_bundle: Path) -> None:
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", max_batch=2) as gen:
        assert gen(5, seed=0).info.batches == (2, 2, 1)
        with pytest.raises(ConfigError, match=r"batch_size is 3, expected 1\.\.2"):
            gen(5, batch_size=3)
        with gen.reopen(max_batch=4) as other:
            assert other(5, seed=0).info.batches == (4, 1)
            assert other.opened().row.backend == "onnxruntime"
