"""A bundle gains precisions in place; what would come out the same is left alone."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from helpers.bf16 import COMPUTES_BF16
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import BackendFailure, ConfigError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.graph.io import read_model, write_model
from scm_sdk.export.precision.half import Island, default_plan
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.generator import Generator

FP16 = "onnx/fp16/1step/model.onnx"

DESCRIPTIONS = {"scm_manifest.json", "README.md"}


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of each file: a file that was not written again has both."""
    return {str(f.relative_to(path)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in path.rglob("*") if f.is_file()}


def test_fp16_is_added_proved_and_dispatched(unet_copy: Path) -> None:
    before = stamps(unet_copy)
    variants = add_precision(unet_copy, default_plan("fp16"), num_samples=8)
    assert [v.num_inference_steps for v in variants] == [1, 2]
    assert all(v.psnr_db is not None and v.psnr_db > 60 and v.nodes["float16"] > v.nodes["float"] for v in variants)
    after = stamps(unet_copy)
    assert {f: s for f, s in after.items() if f in before and f not in DESCRIPTIONS} == {
        f: s for f, s in before.items() if f not in DESCRIPTIONS
    }, "files that were there are not copied"
    bundle = Bundle.open(unet_copy)
    entry = next(e for e in bundle.manifest.files if e.path == FP16)
    assert set(entry.built_from) == {"onnx/fp32/1step/model.onnx", "precision/fp16.json"}
    assert next(e for e in bundle.manifest.files if e.path == "precision/fp16.json").role == "plan"

    with Generator.from_pretrained(unet_copy, num_inference_steps=1) as gen:
        reasons = {row.artifact: row.reason for row in gen.plan().rejected if row.backend == "onnxruntime"}
    assert "no recorded parity" in reasons[FP16], "nothing is dispatched to before it was compared"
    results = validate_bundle(unet_copy, backends=["onnxruntime"], precisions=["fp16"], num_seeds=4, batches=[1, None])
    assert len(results) == 2 and all(results) and {r.gate for r in results} == {"psnr_p05_db"}
    with Generator.from_pretrained(unet_copy, precision="fp16", num_inference_steps=1) as gen:
        assert gen(1, class_labels=[0], output_type="np").info.artifact == FP16


def test_the_same_again_changes_nothing_and_another_plan_does(unet_copy: Path) -> None:
    add_precision(unet_copy, default_plan("fp16"), steps=[1], num_samples=2)
    before = stamps(unet_copy)
    (again,) = add_precision(unet_copy, default_plan("fp16"), steps=[1], num_samples=2)
    assert again.unchanged and again.graph is None and stamps(unet_copy) == before
    plan = default_plan("fp16").with_islands(Island(pattern="step*/conv_out*", reason="seen by everyone"))
    (other,) = add_precision(unet_copy, plan, steps=[1], num_samples=2)
    assert not other.unchanged
    assert b"seen by everyone" in (unet_copy / "precision/fp16.json").read_bytes()


def test_another_source_makes_another_variant(unet_copy: Path) -> None:
    add_precision(unet_copy, default_plan("fp16"), steps=[1], num_samples=2)
    manifest = Bundle.open(unet_copy).manifest
    changed = next(a for a in manifest.artifacts if a.path == FP16)
    assert changed.recipe["source"] in {e.sha256 for e in manifest.files if e.path.startswith("onnx/fp32/1step")}


def test_a_target_is_reached_and_its_islands_are_kept(unet_copy: Path) -> None:
    (plain,) = add_precision(unet_copy, default_plan("fp16"), steps=[1], num_samples=4)
    assert plain.psnr_db is not None
    target = plain.psnr_db + 2
    (better,) = add_precision(unet_copy, default_plan("fp16"), target_db=target, steps=[1], num_samples=4)
    assert better.psnr_db is not None and better.psnr_db >= target
    assert b"alone in fp16 it leaves" in (unet_copy / "precision/fp16.json").read_bytes()


def test_a_failure_leaves_the_bundle_as_it_was(unet_copy: Path) -> None:
    before = stamps(unet_copy)
    plan = default_plan("fp16").with_islands(Island(pattern="nowhere", reason="a typing error"))
    with pytest.raises(ConfigError, match="'nowhere' matches no node"):
        add_precision(unet_copy, plan, num_samples=2)
    assert stamps(unet_copy) == before


def test_steps_that_are_not_there(unet_copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"has fp32 graphs for \[1, 2\] steps, expected \[4\]"):
        add_precision(unet_copy, default_plan("fp16"), steps=[4])


def test_the_verb_adds_and_tells(unet_copy: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["precision", str(unet_copy), "--to", "fp16", "--to", "bf16", "--steps", "1"])
    assert run.exit_code == 0, run.output
    assert "95 % of images reach" in run.stderr and "scm-export validate" in run.stderr
    assert ("no CPU kernels" in run.stderr) == (not COMPUTES_BF16)
    again = CliRunner().invoke(main, ["precision", str(unet_copy), "--steps", "1", "--json"])
    assert json.loads(again.stdout)[0]["unchanged"] is True

    edited = tmp_path / "plan.json"
    edited.write_bytes(default_plan("fp16").with_islands(Island(pattern="step*/conv_in*", reason="mine")).to_json())
    mine = CliRunner().invoke(main, ["precision", str(unet_copy), "--steps", "1", "--plan", str(edited), "--json"])
    assert (
        json.loads(mine.stdout)[0]["nodes"]["float"] > 0 and b"mine" in (unet_copy / "precision/fp16.json").read_bytes()
    )

    edited.write_text("{", encoding="utf-8")
    bad = CliRunner().invoke(main, ["precision", str(unet_copy), "--plan", str(edited)])
    assert bad.exit_code == 2 and "precision plan cannot be read" in bad.stderr


def test_an_interrupted_write_leaves_the_bundle_as_it_was(unet_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stamps(unet_copy)

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scm_sdk.export.precision.variants.write_model", fail)
    with pytest.raises(KeyboardInterrupt):
        add_precision(unet_copy, default_plan("fp16"), num_samples=2)
    assert stamps(unet_copy) == before and not list(unet_copy.parent.glob(".*partial"))
    assert msgspec.json.decode((unet_copy / "scm_manifest.json").read_bytes())["artifacts"]


def test_a_recorded_sample_is_held_against_what_fp16_was_seen_to_do(unet_copy: Path) -> None:
    """A PSNR gate's threshold is in dB: as a difference it would let anything pass."""
    add_precision(unet_copy, default_plan("fp16"), steps=[1], num_samples=1)
    (parity,) = validate_bundle(unet_copy, backends=["onnxruntime"], precisions=["fp16"], num_seeds=4, batches=[1])
    Generator.from_pretrained(unet_copy, precision="fp16", num_inference_steps=1, verify="smoke").close()
    bundle = Bundle.open(unet_copy)
    bundle.with_parity(msgspec.structs.replace(parity.record(), max_abs=1e-9))
    with pytest.raises(BackendFailure, match=r"differs from the recorded sample by .*, expected at most"):
        Generator.from_pretrained(unet_copy, precision="fp16", num_inference_steps=1, verify="smoke")


def test_weights_read_from_a_file_of_their_own_may_go_into_the_graph(unet_bundle: Path, tmp_path: Path) -> None:
    """A large fp32 graph has its weights apart; its int8 form may be small enough not to."""
    graph = unet_bundle / "onnx/fp32/1step/model.onnx"
    apart = write_model(read_model(graph), tmp_path / "apart/model.onnx", external_data_above=0)
    assert apart.data_path is not None
    write_model(read_model(tmp_path / "apart/model.onnx"), tmp_path / "one.onnx")
    shutil.rmtree(tmp_path / "apart")
    one = {name: value.const_value for name, value in read_model(tmp_path / "one.onnx").graph.initializers.items()}
    for name, value in read_model(graph).graph.initializers.items():
        np.testing.assert_array_equal(one[name].numpy(), value.const_value.numpy())
