"""Requests: every wrong argument is refused with a word of help; what is right is cut and merged freely."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scm_sdk import Generator
from scm_sdk.errors import BackendUnavailable, BundleError, ConfigError, ShapeError
from scm_sdk.inference.request import draw_label, make_request, merge
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec, TensorSpec

GRAPH = "onnx/fp32/2step/model.onnx"
PLAIN = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), max_batch=4)
LABELED = msgspec.structs.replace(PLAIN, num_classes=3)


def test_labels_drawn_from_seeds_are_for_ever(ort: Generator) -> None:
    assert [draw_label(seed, 10) for seed in range(12)] == [6, 0, 7, 4, 2, 2, 8, 3, 5, 7, 0, 6]
    counts = np.bincount([draw_label(seed, 4) for seed in range(4000)])
    assert counts.min() > 900
    assert ort(2, seed=7).class_labels == (draw_label(7, 4), draw_label(8, 4))


@settings(max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_merging_and_cutting_keep_every_image(sizes: list[int], data: st.DataObject) -> None:
    requests = []
    for size in sizes:
        seeds = data.draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
        if data.draw(st.booleans()):
            requests.append(make_request(LABELED, num_images=size, seed=seeds))
        else:
            labels = [seed % 3 for seed in seeds]
            noise = draw_noise(LABELED, seeds)
            requests.append(make_request(LABELED, num_images=size, noise=noise, class_labels=labels))
    merged = merge(requests)
    cut = data.draw(st.integers(0, len(merged)))
    whole = [each.inputs(0, len(each)) for each in requests]
    parts = [merged.inputs(*bounds) for bounds in ((0, cut), (cut, len(merged))) if bounds[0] < bounds[1]]
    for step in range(2):
        want = np.concatenate([noise[step] for noise, _ in whole])
        np.testing.assert_array_equal(np.concatenate([noise[step] for noise, _ in parts]), want)
    want = np.concatenate([conditioning["class_labels"] for _, conditioning in whole])
    np.testing.assert_array_equal(np.concatenate([c["class_labels"] for _, c in parts]), want)


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
            "output_type is 'jpg', expected one of pil, frames, np, pt",
        ),
        ({"batch_size": 6}, ConfigError, r"batch_size is 6, expected 1\.\.5"),
        ({"batch_size": 0}, ConfigError, r"batch_size is 0, expected 1\.\.5"),
        ({"noise": np.zeros((1, 1, 3, 8, 8), np.float32)}, ShapeError, "noise holds 1 arrays, expected 2"),
        ({"noise": 3}, ShapeError, "noise holds int, expected 2"),
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
def test_wrong_arguments(ort: Generator, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ort(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tpu"}, "backend is 'tpu', expected 'auto' or one of .*onnxruntime, openvino, .*torch"),
        ({"precision": "fp64"}, "precision is 'fp64', expected 'auto' or one of fp32, fp32-cpu, fp16"),
        (
            {"precision": "fp16"},
            "precision 'fp16' is not in .*, expected fp32",
        ),
        ({"backend": "ONNXRuntim"}, r"torch\. Did you mean onnxruntime\?$"),
        ({"precision": "int-8"}, r"int4\. Did you mean int8\?$"),
        ({"fallback": "maybe"}, "fallback is 'maybe', expected one of error, warn, allow"),
        ({"verify": "twice"}, "verify is 'twice', expected one of none, digest, remembered, smoke, full"),
        ({"max_batch": 6}, r"max_batch is 6, expected 1\.\.5"),
        ({"num_threads": 0}, "num_threads is 0, expected 1 or more"),
        ({"num_inference_steps": 3}, "num_inference_steps is 3, expected one of 1, 2, .*backend='torch'"),
    ],
)
def test_wrong_options(unet_bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, BackendUnavailable), match=message):
        Generator.from_pretrained(unet_bundle, **arguments)


def test_guidance_and_conditioning_are_checked() -> None:
    spec = msgspec.structs.replace(PLAIN, guidance_range=(1.0, 5.0), conditioning=(TensorSpec(name="p", shape=(2,)),))
    p = np.zeros((2, 2), np.float32)
    good = make_request(spec, num_images=2, seed=0, guidance_scale=4.5, conditioning={"p": p})
    np.testing.assert_array_equal(good.conditioning["guidance_scale"], np.full(2, 4.5, np.float32))
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


def test_a_default_guidance_and_a_mask_may_be_left_out() -> None:
    tensors = (TensorSpec(name="p", shape=(2,)), TensorSpec(name="m", shape=(3,), dtype="int64", kind="mask"))
    spec = msgspec.structs.replace(PLAIN, guidance_range=(1.0, 5.0), default_guidance=4.5, conditioning=tensors)
    p = np.zeros((2, 2), np.float32)
    made = make_request(spec, num_images=2, seed=0, conditioning={"p": p})
    np.testing.assert_array_equal(made.conditioning["guidance_scale"], np.full(2, 4.5, np.float32))
    np.testing.assert_array_equal(made.conditioning["m"], np.ones((2, 3), np.int64))
    own = {"p": p, "m": np.eye(2, 3, dtype=int)}
    given = make_request(spec, num_images=2, seed=0, guidance_scale=2, conditioning=own)
    assert given.conditioning["guidance_scale"].tolist() == [2, 2] and given.conditioning["m"].sum() == 2


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere does not exist, expected the folder of a bundle"):
        Generator.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="file is a file, expected the folder"):
        Generator.from_pretrained(tmp_path / "file")
    with pytest.raises(BundleError, match=r"holds neither scm_manifest\.json .* nor config\.json"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"no diffusion_pytorch_model\.safetensors in .*Copy it whole"):
        Generator.from_pretrained(tmp_path)
