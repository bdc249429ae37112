"""Models in parts: a decoder that is a graph of its own, and parts that are loaded in turn."""

import shutil
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")


from helpers.commands import invoke, run  # noqa: E402
from helpers.latent_models import latent_model  # noqa: E402
from scm_sdk.bundle.bundle import Bundle, write_bundle  # noqa: E402
from scm_sdk.bundle.verify import read_manifest  # noqa: E402
from scm_sdk.errors import BackendFailure, ConfigError, IntegrityError  # noqa: E402
from scm_sdk.export.build_all import build_all  # noqa: E402
from scm_sdk.export.bundle_export import current_export, export_bundle  # noqa: E402
from scm_sdk.export.diagnose.validate import validate  # noqa: E402
from scm_sdk.export.graph.io import read_model, write_model  # noqa: E402
from scm_sdk.export.precision.half import default_plan  # noqa: E402
from scm_sdk.export.precision.variants import add_precision  # noqa: E402
from scm_sdk.inference.generator import Generator  # noqa: E402
from scm_sdk.inference.parts import Part  # noqa: E402

DECODER = "decoder/model.onnx"
ORT: dict[str, Any] = {"backend": "onnxruntime", "num_threads": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent model with a registered decoder; read only."""
    folder = tmp_path_factory.mktemp("latent") / "checkpoint"
    latent_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, exports: Callable[[], AbstractContextManager[None]]) -> Path:
    """Its bundle, whose graphs return images; read only."""
    with exports():
        export_bundle(checkpoint, checkpoint.parent / "whole", steps=(1, 2), max_batch=2)
    return checkpoint.parent / "whole"


@pytest.fixture(scope="module")
def split(checkpoint: Path, exports: Callable[[], AbstractContextManager[None]]) -> Path:
    """The bundle that the command splits; read only."""
    out = checkpoint.parent / "split"
    with exports():
        run("onnx", checkpoint, "-o", out, "--steps", 1, "--steps", 2, "--max-batch", 2, "--split")
    return out


@pytest.fixture
def copy(split: Path, tmp_path: Path) -> Path:
    """A copy of the split bundle that the test may change."""
    return Path(shutil.copytree(split, tmp_path / "copy"))


def images(bundle: Path, count: int = 3, steps: int = 2, **options: Any) -> np.ndarray:
    with Generator.from_pretrained(bundle, **{**ORT, **options}) as gen:
        found: np.ndarray = gen(count, seed=7, num_inference_steps=steps, output_type="raw").images
    return found


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of the sessions of ONNX Runtime in order; each is opened while no other is in memory, or this fails."""
    real = ort.InferenceSession
    opened: list[str] = []
    alive: list[weakref.ref[Any]] = []
    lock = threading.Lock()

    def open_alone(path: str, *arguments: Any, **options: Any) -> Any:
        with lock:
            assert not any(each() is not None for each in alive), f"{path} opened while another part is open"
            session = real(path, *arguments, **options)
            opened.append("/".join(Path(path).parts[-3:]))
            alive.append(weakref.ref(session))
        return session

    monkeypatch.setattr(ort, "InferenceSession", open_alone)
    return opened


@pytest.mark.parametrize("steps", [1, 2])
def test_split_images_equal_those_of_one_graph(whole: Path, split: Path, steps: int) -> None:
    wanted = images(whole, steps=steps)
    assert wanted.shape == (3, 3, 8, 8) and wanted.std() > 0.01
    np.testing.assert_array_equal(images(split, steps=steps), wanted)
    np.testing.assert_array_equal(images(split, steps=steps, offload=True), wanted)
    np.testing.assert_allclose(images(split, steps=steps, backend="torch"), wanted, rtol=0, atol=1e-4)


def test_openvino_runs_both_parts_of_a_split_bundle(
    whole: Path, split: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    wanted = images(whole)
    monkeypatch.setattr(ort, "InferenceSession", None)
    for offload in (False, True):
        found = images(split, backend="openvino", offload=offload)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    shutil.copyfile(whole / "onnx/fp32/1step/model.onnx", copy / DECODER)
    rewritten(copy)
    with pytest.raises(IntegrityError, match=r"has inputs and outputs .*expected latents: float32"):
        images(copy, backend="openvino")


def test_one_part_is_in_memory_at_a_time(split: Path, sessions: list[str]) -> None:
    sampler, decoder = "fp32/2step/model.onnx", f"split/{DECODER}"
    with Generator.from_pretrained(split, offload=True, **ORT) as gen:
        assert sessions == [sampler, decoder], "the check when it is opened"
        out = gen(5, seed=1, output_type="raw")
        assert sessions[2:] == [sampler, decoder] and out.info.batches == (2, 2, 1)
        assert set(out.info.timings) == {"load_ms", "noise_ms", "sample_ms", "decode_ms", "total_ms"}
        threads = [threading.Thread(target=gen, kwargs={"seed": seed, "output_type": "raw"}) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(sessions[4:]) == sorted(3 * [sampler, decoder])
        with pytest.raises(ConfigError, match=r"offload=True.*reopen\(offload=False\)"):
            gen.benchmark()


def test_parts_stay_open_without_offload(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator.from_pretrained(split, **ORT) as gen:
        wanted = gen(3, seed=1, output_type="raw").images
        monkeypatch.setattr(ort, "InferenceSession", None)
        np.testing.assert_array_equal(gen(3, seed=1, output_type="raw").images, wanted)
        backend = gen.opened().backend
    with pytest.raises(BackendFailure, match="closed"):
        gen(1)
    with pytest.raises(BackendFailure, match="closed"):
        backend.sample([np.zeros((1, 2, 4, 4), np.float32)] * 2, {})


def test_a_part_is_closed_where_its_use_fails() -> None:
    closed: list[int] = []

    class Held:
        def close(self) -> None:
            closed.append(1)

    part = Part(Held, threading.Lock())
    with pytest.raises(ValueError, match="x"), part.use():
        raise ValueError("x")
    with part.use():
        pass
    assert closed == [1, 1]
    part.close()
    with pytest.raises(BackendFailure, match="closed"), part.use():
        pass


def test_offload_is_refused_where_it_cannot_be_done(whole: Path, split: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"offload is True.*one part.*--split"):
        Generator.from_pretrained(whole, offload=True, **ORT)
    for model in (split, checkpoint):
        with pytest.raises(ConfigError, match=r"torch on .*a checkpoint is loaded whole.*backend='onnxruntime'"):
            Generator.from_pretrained(model, backend="torch", offload=True)


def test_a_model_without_a_decoder_is_not_split(unet_checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    done = invoke("onnx", unet_checkpoint, "-o", tmp_path / "x", "--steps", 1, "--split")
    assert done.exit_code == 2 and "has none" in done.output and "Leave --split out" in done.output
    assert not (tmp_path / "x").exists()


def test_an_export_is_repeated_if_it_is_to_be_split(checkpoint: Path, whole: Path, split: Path) -> None:
    options: dict[str, Any] = {"steps": (1, 2), "max_batch": 2}
    for bundle, is_split in ((whole, False), (split, True)):
        found = [current_export(checkpoint, bundle, split=each, **options) for each in (False, True)]
        assert [report is not None for report in found] == [not is_split, is_split]


@pytest.mark.usefixtures("exported_once")
def test_all_keeps_a_bundle_split(copy: Path, checkpoint: Path) -> None:
    made = build_all(checkpoint, copy, precisions=())
    assert made.manifest.is_split and made.manifest == Bundle.open(copy).manifest
    again = build_all(checkpoint, copy, precisions=(), steps=(1,))
    assert again.manifest.is_split and [spec.num_inference_steps for spec in again.manifest.samplers] == [1]
    with Generator.from_pretrained(copy, verify="full", offload=True, **ORT) as gen:
        assert len(gen(1, seed=0).images) == 1


def rewritten(bundle: Path) -> None:
    """List the files of a changed bundle again."""
    old = read_manifest(bundle)
    write_bundle(
        bundle, name=old.name, samplers=old.samplers, artifacts=old.artifacts, provenance=old.provenance,
        roles={entry.path: entry.role for entry in old.files},
    )  # fmt: skip


def test_a_split_bundle_is_judged_by_its_images(copy: Path, tmp_path: Path) -> None:
    (variant,) = add_precision(copy, default_plan("fp16"), steps=[2], num_samples=4)
    assert variant.psnr_db is not None and variant.psnr_db > 40
    parities = validate(copy, backends=["onnxruntime"], num_seeds=4)
    assert {parity.candidate for parity in parities} == {
        f"onnx/{p}step/model.onnx" for p in ("fp32/1", "fp32/2", "fp16/2")
    }
    assert all(parities)
    shown = invoke("inspect", copy)
    assert f"split: graphs and engines end in latents, {DECODER}" in shown.output
    packed = tmp_path / "fp16.scmz"
    assert invoke("bundle", "pack", copy, "-o", packed, "--only", "onnx/fp16").exit_code == 0
    np.testing.assert_array_equal(images(packed, offload=True), images(copy, precision="fp16"))


def test_a_fault_of_the_decoder_is_found(copy: Path) -> None:
    model = read_model(copy / DECODER)
    name, weight = next((n, v) for n, v in model.graph.initializers.items() if n.endswith("layers.0.weight"))
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.001), name=name)
    write_model(model, copy / DECODER)
    rewritten(copy)
    parities = validate(copy, backends=["onnxruntime"], num_seeds=4, record=False)
    assert not any(parities)
    assert all("off what the decoder makes" in parity.fault for parity in parities)


def test_a_damaged_or_missing_decoder_is_refused(copy: Path) -> None:
    content = bytearray((copy / DECODER).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / DECODER).write_bytes(content)
    for offload in (False, True):
        with pytest.raises(IntegrityError, match=r"decoder.model\.onnx"):
            images(copy, offload=offload)
    (copy / DECODER).unlink()
    with pytest.raises(IntegrityError, match=r"decoder.model\.onnx is missing"):
        images(copy)


def test_the_decoder_of_another_model_is_refused(copy: Path, whole: Path) -> None:
    shutil.copyfile(whole / "onnx/fp32/1step/model.onnx", copy / DECODER)
    rewritten(copy)
    with pytest.raises(IntegrityError, match=r"has inputs and outputs .*expected latents: float32"):
        images(copy)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("triton", ["-o", "OUT"]),
        ("web", ["-o", "OUT"]),
        ("handover", ["-o", "OUT"]),
        ("handover", ["-o", "OUT", "--target", "orin"]),
        ("edge", ["--runtime", "openvino_ir"]),
    ],
)
def test_verbs_that_need_images_of_one_graph_refuse(copy: Path, tmp_path: Path, verb: str, options: list[str]) -> None:
    done = invoke(verb, copy, *(tmp_path / "out" if option == "OUT" else option for option in options))
    assert done.exit_code in (2, 7), done.output
    if done.exit_code == 2:  # 7: an optional library is missing
        assert "end in latents" in done.output and "without --split" in done.output
    assert not (tmp_path / "out").exists()


def test_the_command_generates_with_one_part_in_memory(split: Path, tmp_path: Path, sessions: list[str]) -> None:
    options = ["--num-images", 3, "--seed", 7, "--backend", "onnxruntime", "--scale", 1, "--offload"]
    done = invoke("generate", split, "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert sessions[-1].endswith(DECODER) and len(list((tmp_path / "out").iterdir())) == 3
