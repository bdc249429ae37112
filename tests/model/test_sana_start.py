"""SANA-Sprint from an image: equal to diffusers' pipeline from the same start time and noise, without torch."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from PIL import Image  # noqa: E402

from helpers.commands import invoke  # noqa: E402
from helpers.sana_fixtures import SIZE, TOKENS, pictures_from_pictures  # noqa: E402
from helpers.sana_fixtures import source_pictures as pictures  # noqa: E402
from scm_sdk.bundle.bundle import Bundle, write_bundle  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError  # noqa: E402
from scm_sdk.export.sana import import_sana  # noqa: E402
from scm_sdk.inference.generator import Generator  # noqa: E402
from scm_sdk.model.consistency import ConsistencyModel  # noqa: E402

START = 1.1
OPTIONS: dict[str, Any] = {
    "steps": (2,), "start_time": START, "size": (SIZE, SIZE), "max_sequence_length": TOKENS, "max_batch": 3,
    "text_encoder": False,
}  # fmt: skip


def told(inputs: Any, **more: Any) -> dict[str, Any]:
    embeds, mask, noise = inputs
    return {
        "prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 4.0, "output_type": "np",
        "noise": noise[:1], "start_time": START, **more,
    }  # fmt: skip


@pytest.mark.parametrize(("backend", "allowed"), [("torch", 1e-5), ("onnxruntime", 1e-4)])
def test_the_pictures_are_those_of_diffusers(
    sana_pipeline: Any, sana_image_bundle: Path, sana_inputs: Any, backend: str, allowed: float,
    monkeypatch: pytest.MonkeyPatch, record_property: Any,
) -> None:  # fmt: skip
    wanted = pictures_from_pictures(pictures(), [START])
    with Generator.from_pretrained(sana_image_bundle, backend=backend, num_threads=1) as gen:
        found = gen(2, image=pictures(), **told(sana_inputs)).images
        floats = gen(2, image=pictures().astype(np.float32) / 255, **told(sana_inputs)).images
        pil = gen(2, image=[Image.fromarray(each) for each in pictures()], **told(sana_inputs)).images
        other = gen(2, image=pictures()[::-1].copy(), **told(sana_inputs)).images
        one = gen(2, image=pictures()[0], **told(sana_inputs)).images
    record_property("difference", float(np.abs(found - wanted).max()))
    assert np.abs(found - wanted).max() <= allowed
    assert np.abs(other - wanted).max() > 100 * allowed, "the image must matter, or this compares nothing"
    np.testing.assert_array_equal(found, floats)
    np.testing.assert_array_equal(found, pil)
    np.testing.assert_allclose(one[0], found[0], rtol=0, atol=allowed)
    np.testing.assert_allclose(one[1], other[1], rtol=0, atol=allowed)


@pytest.mark.slow
@pytest.mark.usefixtures("exported_once")
def test_several_steps_start_from_an_image(
    sana_pipeline: Any, sana_folder: Path, sana_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "two"
    import_sana(sana_folder, bundle, encoder=True, **(OPTIONS | {"times": (START, 0.6), "start_time": None}))
    wanted = pictures_from_pictures(pictures(), [START, 0.6])
    with Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as gen:
        found = gen(2, image=pictures(), **told(sana_inputs, noise=sana_inputs[2][:2])).images
    assert np.abs(found - wanted).max() <= 1e-4


def test_the_default_strength_of_diffusers_ignores_the_image(
    sana_pipeline: Any, sana_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why there is a start time and no ``strength``: 0.6 of two steps starts at pi/2, where the image has weight 0."""
    embeds, mask, noise = sana_inputs
    found = []
    for images in (pictures(), pictures()[::-1]):
        pipe = diffusers.SanaSprintImg2ImgPipeline(**sana_pipeline.components)
        pipe.set_progress_bar_config(disable=True)
        waiting = iter([noise[0], noise[1], np.zeros_like(noise[0])])
        for module in ("pipelines.sana.pipeline_sana_sprint_img2img", "schedulers.scheduling_scm"):
            monkeypatch.setattr(
                f"diffusers.{module}.randn_tensor", lambda *_, w=waiting, **__: torch.from_numpy(next(w))
            )
        with torch.no_grad():
            found.append(pipe(
                image=[Image.fromarray(image) for image in images], prompt_embeds=torch.from_numpy(embeds),
                prompt_attention_mask=torch.from_numpy(mask), height=SIZE, width=SIZE, use_resolution_binning=False,
                output_type="np",
            ).images)  # fmt: skip
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_requests_with_and_without_images_share_batches(sana_image_bundle: Path, sana_inputs: Any) -> None:
    embeds, mask, _ = sana_inputs
    words = {"prompt_embeds": embeds[:1], "prompt_attention_mask": mask[:1], "output_type": "np", "num_images": 1}
    image = pictures()[0]
    requests = [
        {"seed": 3, "image": image, "start_time": START, **words},
        {"seed": 4, "num_inference_steps": 1, **words},
        {"seed": 5, "image": image, "start_time": START, **words},
    ]
    with Generator.from_pretrained(sana_image_bundle, backend="onnxruntime", num_threads=1) as gen:
        singles = [gen(**request).images for request in requests]
        shared = list(gen.stream(requests))
    assert shared[0].info.batches == (3,)
    for single, out in zip(singles, shared, strict=True):
        np.testing.assert_allclose(out.images, single, rtol=0, atol=1e-5)


def test_an_image_needs_no_torch(sana_image_bundle: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from scm_sdk import Generator
with Generator.from_pretrained({str(sana_image_bundle)!r}, backend="onnxruntime") as gen:
    out = gen(image=np.zeros(({SIZE}, {SIZE}, 3), np.uint8), start_time={START}, seed=1,
              prompt_embeds=np.zeros((1, {TOKENS}, 8), np.float32))
print(out.images[0].size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and done.stdout.strip() == f"({SIZE}, {SIZE})", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_time": 0.3}, r"start_time is 0.3, expected one of 1.1 \(1 steps\).*--start-time"),
        ({"start_time": 1.5708}, r"start_time is 1.5708, expected one of 1.1"),
        ({"start_time": None}, "start_time is None with an image, expected radians, one of 1.1"),
        ({"start_time": float("nan")}, "start_time is nan, expected one of 1.1"),
        ({"num_inference_steps": 2}, "num_inference_steps is 2 with start_time 1.1, expected 1"),
        ({"image": None}, "start_time is 1.1 without an image"),
        ({"image": np.zeros((64, 64, 3), np.uint8)}, r"64x64 pixels .*expected 32x32 with 3.*Resize"),
        ({"image": np.zeros((32, 32, 1), np.uint8)}, r"with 1 channels, expected 32x32 with 3"),
        ({"image": np.zeros((32, 32, 3), np.float64)}, r"\(1, 32, 32, 3\) float64, expected"),
        ({"image": np.full((32, 32, 3), 255, np.float32)}, r"outside of \[0, 1\]"),
        ({"image": np.full((32, 32, 3), np.nan, np.float32)}, r"outside of \[0, 1\]"),
        ({"image": np.zeros((3, 32, 32, 3), np.uint8)}, "image holds 3 images, expected num_images = 2"),
        ({"image": Image.new("RGBA", (32, 32))}, "image has mode RGBA, expected RGB"),
        ({"image": [Image.new("RGB", (32, 32)), Image.new("RGB", (16, 32))]}, "expected one size"),
        ({"image": "fox.png"}, "image is str, expected a PIL image"),
    ],
)
def test_wrong_images_and_times_are_refused(
    sana_image_bundle: Path, sana_inputs: Any, arguments: dict[str, Any], message: str
) -> None:
    with (
        Generator.from_pretrained(sana_image_bundle, backend="onnxruntime", num_threads=1) as gen,
        pytest.raises(ScmError, match=message),
    ):
        gen(2, **told(sana_inputs, **({"image": pictures()} | arguments)))


def test_a_bundle_without_what_an_image_needs_says_so(
    sana_bundle: Path, sana_image_bundle: Path, sana_folder: Path, sana_inputs: Any, tmp_path: Path
) -> None:
    with (
        Generator.from_pretrained(sana_bundle, backend="onnxruntime", num_threads=1) as gen,
        pytest.raises(ConfigError, match=r"starts from noise, at 1.5708 radians.*--start-time"),
    ):
        gen(2, image=pictures(), **told(sana_inputs))
    bare = Path(shutil.copytree(sana_image_bundle, tmp_path / "bare", ignore=shutil.ignore_patterns("encoder")))
    old = Bundle.open(sana_image_bundle).manifest
    write_bundle(
        bare, name=old.name, samplers=old.samplers, artifacts=old.artifacts, provenance=old.provenance,
        roles={entry.path: entry.role for entry in old.files},
    )  # fmt: skip
    with (
        Generator.from_pretrained(bare, backend="onnxruntime", num_threads=1) as gen,
        pytest.raises(ConfigError, match=r"has no encoder graph.*--encoder"),
    ):
        gen(2, image=pictures(), **told(sana_inputs))
    with pytest.raises(ConfigError, match=r"start_time 1.1 makes a sampler of one step.*--steps 2"):
        import_sana(sana_folder, tmp_path / "both", **(OPTIONS | {"steps": (1, 2)}))
    for outside in (3.0, 0.0, -1.0):
        with pytest.raises(ConfigError, match=rf"start_time is {outside}, expected radians above 0 and at most pi/2"):
            import_sana(sana_folder, tmp_path / "out", **(OPTIONS | {"start_time": outside}))
    assert not (tmp_path / "both").exists()
    assert import_sana(sana_folder, bare, reuse=True, **OPTIONS).unchanged
    assert import_sana(sana_folder, sana_image_bundle, encoder=True, reuse=True, **OPTIONS).unchanged
    for other in ({"encoder": True}, {"start_time": 1.2}):
        with pytest.raises(BundleError, match="exists and is not empty"):
            import_sana(sana_folder, bare, reuse=True, **(OPTIONS | other))


def test_a_damaged_encoder_is_refused(sana_image_bundle: Path, sana_inputs: Any, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(sana_image_bundle, tmp_path / "bundle"))
    encoder = bundle / "encoder" / "model.onnx"
    content = bytearray(encoder.read_bytes())
    content[len(content) // 2] ^= 1
    encoder.write_bytes(content)
    with (
        Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as gen,
        pytest.raises(IntegrityError, match=r"encoder.model\.onnx"),
    ):
        gen(2, image=pictures(), **told(sana_inputs))


def test_the_command_takes_an_image(start_bundle: Path, tmp_path: Path) -> None:
    bundle = start_bundle
    Image.fromarray(pictures()[0, :8, :8]).save(tmp_path / "in.png")
    start = ["generate", bundle, "--num-images", 1, "--seed", 1, "--backend", "onnxruntime", "--class-labels", "cat"]
    image = ["--image", tmp_path / "in.png", "--start-time", 0.9]
    done = invoke(*start, *image, "-o", tmp_path / "out.png", "--scale", 1)
    assert done.exit_code == 0 and "1 step" in done.output, done.output
    with Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as gen:
        same = gen(1, "cat", seed=1, image=pictures()[0, :8, :8], start_time=0.9, output_type="uint8").images
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), same[0])
    assert invoke(*start, *image[:2], "-o", tmp_path / "x.png").exit_code == 2
    Image.fromarray(pictures()[0, :8, :4]).save(tmp_path / "small.png")
    small = invoke(*start, "--image", tmp_path / "small.png", "--start-time", 0.9, "-o", tmp_path / "x.png")
    assert small.exit_code == 2 and "8x4 pixels" in small.output and "expected 8x8" in small.output
    (tmp_path / "no.png").write_bytes(b"text")
    none = invoke(*start, "--image", tmp_path / "no.png", "--start-time", 0.9, "-o", tmp_path / "x.png")
    assert none.exit_code == 2 and "no.png is no image" in none.output
    assert not (tmp_path / "x.png").exists()


def test_a_pixel_model_starts_where_the_formula_says(unet_checkpoint: Path, start_bundle: Path) -> None:
    image, t = pictures()[:1, :8, :8], 0.9
    noise = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    model = ConsistencyModel.from_pretrained(unet_checkpoint).double()
    x_0 = (image.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2)
    x_t = np.cos(t) * x_0 + np.sin(t) * 0.5 * noise
    with torch.no_grad():
        wanted = model(torch.from_numpy(x_t), torch.tensor([t], dtype=torch.float64), torch.tensor([2])).numpy()
    for backend in ("torch", "onnxruntime"):
        with Generator.from_pretrained(start_bundle, backend=backend, num_threads=1) as gen:
            found = gen(1, 2, noise=[noise], image=image, start_time=t, output_type="raw").images
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
