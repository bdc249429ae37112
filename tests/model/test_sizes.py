"""Several image sizes in one bundle: each is the pipeline's own, they share the weights, and nothing mixes them up."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from helpers.commands import invoke, run
from helpers.few_step_fixtures import SIZES, STEPS, draw_prompts, feeds_of, pictures_of
from helpers.few_step_fixtures import TOKENS as FLOW_TOKENS
from helpers.sana_fixtures import SIZE, TOKENS, make_sana_inputs, pictures_of_sana
from scm_sdk.bundle.bundle import Bundle, write_manifest
from scm_sdk.bundle.manifest import Manifest, ParityRecord
from scm_sdk.bundle.verify import check_manifest, read_manifest
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, SchemaError
from scm_sdk.export.flow_pipeline import import_flow_pipeline
from scm_sdk.export.graph.io import read_model, write_beside
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.generator import Generator

WIDE = (SIZE, 2 * SIZE)
FIRST, FURTHER = "onnx/fp32/2step/model.onnx", "onnx/fp32/2step/model-32x64.onnx"
ORT: dict[str, Any] = {"backend": "onnxruntime", "num_threads": 1}


@pytest.fixture(scope="module")
def two_sizes(
    sana_folder: Path, tmp_path_factory: pytest.TempPathFactory, exports: Callable[[], AbstractContextManager[None]]
) -> Path:
    """A bundle of 32x32 and 32x64 pixels, 2 steps, that the command made; read only."""
    out = tmp_path_factory.mktemp("sizes") / "bundle"
    with exports():
        run(*importing(sana_folder, out, "--no-text-encoder"))
    return out


def importing(source: Path, out: Path, *more: object, sizes: tuple[object, ...] = ("32", "32x64")) -> list[object]:
    """Return the arguments of an import for 2 steps."""
    given = [part for size in sizes for part in ("--size", size)]
    return ["import", source, "-o", out, "--tokens", TOKENS, "--max-batch", 2, "--steps", 2, *given, *more]


@pytest.fixture
def two_sizes_copy(two_sizes: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(two_sizes, tmp_path / "bundle"))


def words() -> dict[str, np.ndarray]:
    embeds, mask, _ = make_sana_inputs()
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


@pytest.mark.parametrize(("backend", "allowed"), [("torch", 1e-5), ("onnxruntime", 1e-4)])
def test_each_size_has_the_pictures_of_diffusers(two_sizes: Path, backend: str, allowed: float) -> None:
    with Generator.from_pretrained(two_sizes, backend=backend, num_threads=1) as gen:
        for height, width in ((SIZE, SIZE), WIDE):
            rng = np.random.default_rng(height + width)
            noise = list(rng.standard_normal((2, 2, 4, height // 2, width // 2)).astype(np.float32))
            wanted = pictures_of_sana(2, 4.0, (height, width), [*noise])
            call: dict[str, Any] = {**words(), "noise": noise, "guidance_scale": 4.0, "output_type": "np"}
            found = gen(2, height=height, width=width, **call).images
            assert found.shape == (2, height, width, 3)
            assert np.abs(found - wanted).max() <= allowed and wanted.std() > 0.05
            if (height, width) == (SIZE, SIZE):
                np.testing.assert_array_equal(gen(2, **call).images, found)


def test_the_weights_are_stored_once(two_sizes: Path) -> None:
    manifest = read_manifest(two_sizes)
    data = [entry.path for entry in manifest.files if entry.role == "graph-data"]
    assert data == [f"{FIRST}_data"], "one file of weights for both sizes"
    stored = [read_model(two_sizes / path).graph.initializers.values() for path in (FIRST, FURTHER)]
    apart = [{t.name: t.location for v in values if hasattr(t := v.const_value, "location")} for values in stored]
    assert apart[0] == apart[1] and set(apart[0].values()) == {"model.onnx_data"} and len(apart[0]) > 5
    assert manifest.image_sizes == ((SIZE, SIZE), WIDE)
    Bundle.open(two_sizes)


def test_weights_that_differ_are_not_shared(two_sizes: Path, tmp_path: Path) -> None:
    import onnx_ir as ir

    model = read_model(two_sizes / FURTHER)
    values = model.graph.initializers.values()
    changed = max((v for v in values if v.const_value is not None), key=lambda v: v.const_value.nbytes)  # type: ignore[union-attr]
    assert changed.const_value is not None
    other = changed.const_value.numpy() + 1
    changed.const_value = ir.Tensor(other, name=changed.name)
    for name in (FIRST, f"{FIRST}_data"):
        shutil.copyfile(two_sizes / name, tmp_path / Path(name).name)
    report = write_beside(model, tmp_path / "model-8x8.onnx", tmp_path / "model.onnx")
    assert report.data_path is None and changed.const_value.numpy() is other, "the given model is not changed"
    again = read_model(report.path).graph.initializers[changed.name or ""].const_value
    assert again is not None and not isinstance(again, ir.ExternalTensor)
    np.testing.assert_array_equal(again.numpy(), other)


def test_a_size_is_chosen_for_a_generator_a_stream_and_the_command(two_sizes: Path, tmp_path: Path) -> None:
    one = {name: array[:1] for name, array in words().items()}
    call: dict[str, Any] = {**one, "seed": 3, "output_type": "uint8"}
    with Generator.from_pretrained(two_sizes, **ORT) as gen:
        small, wide = gen(**call).images, gen(height=WIDE[0], width=WIDE[1], **call).images
        assert small.shape == (1, *(SIZE, SIZE), 3) and wide.shape == (1, *WIDE, 3)
        requests = [call, {**call, "height": WIDE[0], "width": WIDE[1]}, call]
        for out, wanted in zip(gen.stream(requests), (small, wide, small), strict=True):
            np.testing.assert_array_equal(out.images, wanted)
    with Generator.from_pretrained(two_sizes, height=WIDE[0], width=WIDE[1], **ORT) as gen:
        np.testing.assert_array_equal(gen(**call).images, wide)
        np.testing.assert_array_equal(gen(height=SIZE, width=SIZE, **call).images, small)
        with gen.reopen() as again:
            assert again.opened().spec.image_shape == (3, *WIDE)
    with pytest.raises(BundleError, match="records no sample of 2 steps"):
        Generator.from_pretrained(two_sizes, height=WIDE[0], width=WIDE[1], verify="smoke", **ORT)


def test_another_size_is_refused(two_sizes: Path, sana_folder: Path, tmp_path: Path) -> None:
    with Generator.from_pretrained(two_sizes, **ORT) as gen:
        with pytest.raises(ConfigError, match=r"size is 64x64, expected one of 32x32, 32x64"):
            gen(height=64, width=64, **words())
        with pytest.raises(ConfigError, match=r"height is 64 and width is None, expected both"):
            gen(height=64, **words())
        with pytest.raises(ConfigError, match=r"height is 0, expected 1 or more"):
            gen(height=0, width=64, **words())
    refused = invoke("generate", two_sizes, "-o", tmp_path / "x.png", "--size", "64x64")
    assert refused.exit_code == 2 and "expected one of 32x32, 32x64" in refused.stderr
    with (
        Generator.from_pretrained(sana_folder, backend="torch", num_threads=1) as gen,
        pytest.raises(ConfigError, match=r"size is 32x32, expected 64x64.*is no bundle"),
    ):
        gen(height=32, width=32, **words())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split"], "--split is given with the image sizes 32x32, 32x64, expected one size"),
        (["--encoder"], "--encoder is given with the image sizes 32x32, 32x64, expected one size"),
        (["--size", "32"], "the image sizes are 32x32, 32x64, 32x32, height x width, expected each once"),
        (["--size", "31"], "images are 31x31 pixels, expected multiples of 2"),
        (["--size", ""], "size is '', expected pixels"),
    ],
)
def test_sizes_that_cannot_be_in_one_bundle_are_refused(
    sana_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    refused = invoke(*importing(sana_folder, tmp_path / "x", *options))
    assert refused.exit_code == 2 and message in refused.stderr
    assert not (tmp_path / "x").exists()


def test_the_import_may_be_repeated_and_the_bundle_inspected(
    two_sizes_copy: Path, sana_folder: Path, tmp_path: Path
) -> None:
    same = invoke(*importing(sana_folder, two_sizes_copy, "--no-text-encoder", "--json"))
    assert json.loads(same.stdout)["unchanged"] is True
    other = invoke(*importing(sana_folder, two_sizes_copy, "--no-text-encoder", sizes=("32",)))
    assert other.exit_code == 6 and "--overwrite" in other.stderr
    assert json.loads(invoke("inspect", two_sizes_copy, "--json").stdout)["image_sizes"] == ["32x32", "32x64"]
    shown = invoke("inspect", two_sizes_copy).output
    assert "further size 32x64" in shown and FURTHER in shown
    assert "32x32 (the default), 32x64" in (two_sizes_copy / "README.md").read_text(encoding="utf-8")
    quantized = invoke("quantize", two_sizes_copy, "--to", "int4", "--num-samples", 1)
    assert "quantize takes the first, 32x32" in quantized.stderr, "nothing is left out silently"


def test_a_damaged_graph_of_a_further_size_is_refused(two_sizes_copy: Path) -> None:
    graph = two_sizes_copy / FURTHER
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"model-32x64.onnx has sha256"):
        Bundle.open(two_sizes_copy)
    graph.write_bytes(whole)
    with Generator.from_pretrained(two_sizes_copy, **ORT) as gen:
        graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=r"was changed since it was opened.*model-32x64.onnx"):
            gen(2, height=WIDE[0], width=WIDE[1], **words())


def test_a_graph_of_another_size_is_refused(two_sizes_copy: Path) -> None:
    shutil.copyfile(two_sizes_copy / FIRST, two_sizes_copy / FURTHER)
    resign(two_sizes_copy, lambda manifest: manifest)
    with pytest.raises(IntegrityError, match=r"model-32x64.onnx.*noise_0"):
        Bundle.open(two_sizes_copy)


def resign(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Write a manifest that matches the files of a bundle, as a forger would."""
    import hashlib

    manifest = change(read_manifest(folder))
    entries = (
        msgspec.structs.replace(e, size=(folder / e.path).stat().st_size,
                                sha256=hashlib.sha256((folder / e.path).read_bytes()).hexdigest())
        for e in manifest.files
    )  # fmt: skip
    write_manifest(folder, msgspec.structs.replace(manifest, files=tuple(entries)))


def test_inconsistent_sizes_are_refused(two_sizes: Path) -> None:
    manifest = read_manifest(two_sizes)
    (size,) = manifest.sizes
    replaced = msgspec.structs.replace
    (further,) = size.artifacts
    decoder = replaced(manifest.files[0], path="decoder/model.onnx")
    for changed, message in (
        (replaced(manifest, sizes=(size, size)), "32x64, 32x64 with 4 artifacts, expected each"),
        (replaced(manifest, sizes=(replaced(size, artifacts=manifest.artifacts[1:]),)), "expected each size and each"),
        (replaced(manifest, sizes=(replaced(size, artifacts=()),)), r"artifacts of \[\], expected artifacts"),
        (replaced(manifest, sizes=(replaced(size, samplers=()),)), r"samplers of \[\] steps"),
        (
            replaced(manifest, sizes=(replaced(size, artifacts=(replaced(further, num_inference_steps=0),)),)),
            r"artifacts of \[0\], expected",
        ),
        (
            replaced(manifest, sizes=(replaced(size, artifacts=(replaced(further, path="x.onnx"),)),)),
            "none of the listed",
        ),
        (replaced(manifest, files=(*manifest.files, decoder)), "a decoder of its own, expected one size"),
    ):
        with pytest.raises(SchemaError, match=message):
            check_manifest(changed)
    json_text = manifest.to_json()
    assert Manifest.from_json(json_text) == manifest
    altered = json_text.replace(b'"model-32x64', b'"model-32x65')
    assert altered == json_text or Manifest.from_json(altered) != manifest


def test_a_manifest_of_one_size_is_that_of_older_versions(sana_bundle: Path) -> None:
    written = (sana_bundle / "scm_manifest.json").read_bytes()
    manifest = read_manifest(sana_bundle)
    assert b'"sizes"' not in written and "sizes" not in manifest.digests and manifest.image_sizes == ((SIZE, SIZE),)
    assert manifest.to_json() == written


def test_a_subset_keeps_the_sizes_that_are_named(two_sizes: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(two_sizes, verify="none")
    both = bundle.subset(tmp_path / "both", ["onnx/fp32/2step"])
    assert both.manifest.image_sizes == ((SIZE, SIZE), WIDE)
    call: dict[str, Any] = {**words(), "seed": 1, "output_type": "raw", "height": WIDE[0], "width": WIDE[1]}
    with Generator.from_pretrained(both.path, **ORT) as gen, Generator.from_pretrained(two_sizes, **ORT) as whole:
        np.testing.assert_array_equal(gen(2, **call).images, whole(2, **call).images)
    first = bundle.subset(tmp_path / "first", [FIRST])
    assert first.manifest.image_sizes == ((SIZE, SIZE),) and not (first.path / FURTHER).exists()
    with pytest.raises(ConfigError, match=r"are of further image sizes, expected one of the first size, 32x32"):
        bundle.subset(tmp_path / "x", [FURTHER])


def test_validate_and_precision_take_every_size(two_sizes_copy: Path) -> None:
    variants = add_precision(two_sizes_copy, default_plan("fp16"), num_samples=2)
    half = [path.replace("fp32", "fp16") for path in (FIRST, FURTHER)]
    assert [variant.path for variant in variants] == half
    assert all((variant.psnr_db or 0) > 25 for variant in variants), "of random weights, which may magnify rounding"
    assert all(variant.unchanged for variant in add_precision(two_sizes_copy, default_plan("fp16"), num_samples=2))
    data = [entry.path for entry in read_manifest(two_sizes_copy).files if entry.role == "graph-data"]
    assert data == [f"{half[0]}_data", f"{FIRST}_data"]
    with Generator.from_pretrained(two_sizes_copy, num_threads=1) as gen:
        asked = {"height": WIDE[0], "width": WIDE[1], **words()}
        assert gen(2, **asked).info.backend == "torch", "auto takes no graph that was not compared"
    judged = invoke("validate", two_sizes_copy, "--backend", "onnxruntime", "--num-seeds", 2, "--batch", 1, "--json",
                 "--min-psnr", 25, "--reason", "random weights")  # fmt: skip
    assert judged.exit_code == 0, judged.output
    found = {record["candidate"] for record in json.loads(judged.stdout)["parity"]}
    assert found == {FIRST, FURTHER, *half}
    bundle = Bundle.open(two_sizes_copy)
    assert {record.artifact for record in bundle.manifest.parity if record.passed} == found
    with Generator.from_pretrained(two_sizes_copy, precision="fp16", num_threads=1) as gen:
        plan = gen.opened().plan
        assert {row.artifact for row in plan if "model" in row.artifact} == {FIRST, half[0]}
        assert gen(2, height=WIDE[0], width=WIDE[1], **words()).info.artifact == half[1]
    # The records of a size are kept when the bundle is extended, and those of the checkpoint are of the first size.
    add_precision(two_sizes_copy, default_plan("bf16"), num_samples=0)
    again = read_manifest(two_sizes_copy)
    assert {record.artifact for record in again.parity} == found
    of_checkpoint = ParityRecord(
        artifact="denoiser", reference="denoiser", backend="torch", threshold=1.0, noise_floor=0.0, max_abs=0.0,
        num_samples=2, passed=True,
    )  # fmt: skip
    more = msgspec.structs.replace(again, parity=(*again.parity, of_checkpoint))
    assert of_checkpoint not in more.at_size(*WIDE).parity and of_checkpoint in more.at_size(SIZE, SIZE).parity


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "ZImagePipeline"])
def test_flow_pictures_of_each_size_are_those_of_diffusers(
    flow_folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    sizes = (SIZES[name], {"height": 32, "width": 16})
    import_flow_pipeline(
        flow_folders(name), tmp_path / "b", steps=(STEPS[name],), size=(16, 24), further_sizes=[(32, 16)],
        max_sequence_length=FLOW_TOKENS, max_batch=2, distilled=True,
    )  # fmt: skip
    for backend, allowed in (("torch", 1e-5), ("onnxruntime", 1e-4)):
        with Generator.from_pretrained(tmp_path / "b", backend=backend, num_threads=1) as gen:
            for size in sizes:
                spec = Bundle.open(tmp_path / "b").at_size(size["height"], size["width"]).spec(STEPS[name])
                feeds = feeds_of(spec)
                wanted = pictures_of(name, feeds, STEPS[name], size)
                given = {key: value for key, value in feeds.items() if not key.startswith("noise")}
                noise = [feeds[tensor.name] for tensor in spec.noise_inputs]
                found = gen(2, noise=noise, output_type="np", **size, **given).images
                assert np.abs(np.moveaxis(found, -1, 1) - wanted).max() <= allowed and wanted.std() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WanPipeline", "AnyFlowPipeline"])
def test_clips_of_each_size_are_those_of_a_bundle_of_that_size(
    flow_folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    options: dict[str, Any] = {
        "steps": (STEPS[name],), "num_frames": 5, "max_sequence_length": FLOW_TOKENS, "max_batch": 1,
        "distilled": True, "goldens": False,
    }  # fmt: skip
    import_flow_pipeline(flow_folders(name), tmp_path / "both", size=(32, 48), further_sizes=[(48, 32)], **options)
    import_flow_pipeline(flow_folders(name), tmp_path / "one", size=(48, 32), **options)
    call: dict[str, Any] = {"prompt_embeds": draw_prompts(8)[:1], "seed": 3, "output_type": "raw"}
    for backend in ("torch", "onnxruntime"):
        with (
            Generator.from_pretrained(tmp_path / "both", backend=backend, num_threads=1) as both,
            Generator.from_pretrained(tmp_path / "one", backend=backend, num_threads=1) as one,
        ):
            wanted = one(1, **call).images
            assert np.abs(both(1, height=48, width=32, **call).images - wanted).max() <= 1e-5 and wanted.std() > 0.05
            assert both(1, **call).images.shape[-2:] == (32, 48)
