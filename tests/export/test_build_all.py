"""All steps in one command, and again: unchanged files are kept, changed ones are made again."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from helpers.recorded_events import Recorded
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.engines.targets import resolve_targets
from scm_sdk.errors import ConfigError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.build_all import build_all
from scm_sdk.export.bundle_export import current_export, export_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.graph.io import write_model
from scm_sdk.export.graph.network import export_samplers
from scm_sdk.export.precision.int8_variants import QuantizeOptions
from scm_sdk.inference.parity.compare import MIN_PSNR_DB
from scm_sdk.model.consistency import ConsistencyModel

pytestmark = pytest.mark.usefixtures("exported_once")


def test_a_second_run_changes_nothing_and_more_is_added(unet_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    out, events = tmp_path / "bundle", Recorded()
    common = {"steps": [1], "max_batch": 2, "events": events}
    first = build_all(unet_checkpoint, out, precisions=["fp16"], targets=resolve_targets(["l4"]), **common)
    assert {(a.format, a.precision) for a in first.manifest.artifacts} == {
        ("safetensors", "fp32"), ("onnx", "fp32"), ("onnx", "fp16"), ("tensorrt_rtx", "fp16"),
    }  # fmt: skip
    files = {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in out.rglob("*") if f.is_file()}
    again = build_all(unet_checkpoint, out, precisions=["fp16"], targets=resolve_targets(["l4"]), **common)
    assert again.manifest == first.manifest and "exported already" in events.notes[-1]
    assert files == {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in out.rglob("*") if f.is_file()}

    more = build_all(unet_checkpoint, out, precisions=["fp16", "int8"], targets=(), **common)
    assert len(more.manifest.artifacts) == 5
    other = build_all(unet_checkpoint, out, precisions=[], steps=[1], max_batch=3)
    assert [a.format for a in other.manifest.artifacts] == ["safetensors", "onnx"], "other samplers: exported again"
    (out / "onnx/fp32/1step/model.onnx").write_bytes(b"damaged")
    build_all(unet_checkpoint, out, precisions=[], steps=[1], max_batch=3)
    Bundle.open(out)


def test_a_bundle_of_other_times_is_not_current(unet_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_bundle(unet_checkpoint, out, times=(1.2,), max_batch=2)
    events = Recorded()
    made = build_all(unet_checkpoint, out, precisions=[], steps=[1], max_batch=2, events=events)
    assert events.stages[0].startswith("export") and made.spec(1).times != (1.2,)


def test_a_models_own_second_time_is_current(unet_checkpoint: Path, tmp_path: Path) -> None:
    model = ConsistencyModel.from_pretrained(unet_checkpoint)
    config = msgspec.structs.replace(model.config, mid_time=0.6)
    ConsistencyModel(config, model.network).save_pretrained(tmp_path / "model")
    events = Recorded()
    for _ in range(2):
        made = build_all(tmp_path / "model", tmp_path / "b", precisions=[], steps=[2], max_batch=2, events=events)
    assert made.spec(2).times[1] == 0.6 and "exported already" in events.notes[-1]


def test_what_a_killed_export_left_beside_a_whole_bundle_is_removed(unet_checkpoint: Path, tmp_path: Path) -> None:
    """Killed after the new bundle had its name, the export has nothing more to do than to clean up."""
    out, left = tmp_path / "b", tmp_path / ".scm-0123abcd.partial"
    export_bundle(unet_checkpoint, out, steps=[1], max_batch=2)
    left.mkdir()
    (left / "old.onnx").write_bytes(b"old")
    assert current_export(unet_checkpoint, out, steps=[1], max_batch=2) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_interruption_keeps_what_was_done(unet_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "bundle"

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("scm_sdk.export.precision.int8_variants.quantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_all(unet_checkpoint, out, steps=[1], max_batch=2)
    assert {a.precision for a in Bundle.open(out).manifest.artifacts} == {"fp32", "fp16"}
    events = Recorded()
    done = build_all(unet_checkpoint, out, steps=[1], max_batch=2, events=events)
    assert {a.precision for a in done.manifest.artifacts} == {"fp32", "fp16", "int8"}
    assert not any("fp16" in stage for stage in events.stages), "what was done is not done again"


def test_int8_is_sought_2_db_above_its_gate(
    unet_checkpoint: Path, unet_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a graph that was chosen on some seeds passes on others."""
    asked: list[QuantizeOptions] = []
    monkeypatch.setattr("scm_sdk.export.build_all.add_int8", lambda out, options, **_: asked.append(options) or ())
    for precisions, target in ((["int8", "int8-cpu"], None), (["int8"], 50.0)):
        build_all(unet_checkpoint, unet_copy, precisions=precisions, max_batch=5, target_db=target)
    assert [each.target_db for each in asked] == [MIN_PSNR_DB["int8"] + 2, None, 50]


def test_unknown_precisions_are_refused(unet_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precisions hold fp4, expected fp32, fp32-cpu, fp16"):
        build_all(unet_checkpoint, tmp_path / "bundle", precisions=["fp4"])  # type: ignore[list-item]
    assert not (tmp_path / "bundle").exists()


def test_the_verb_builds_and_proves(unet_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["all", str(unet_checkpoint), "-o", str(tmp_path / "b"), "--precision", "fp16", "--steps", "1"]
    arguments += ["--max-batch", "2"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    passed = [
        line for line in run.stderr.splitlines() if line.startswith("pass  onnx/") and " on onnxruntime: " in line
    ]
    assert len(passed) == 2
    again = CliRunner().invoke(main, [*arguments, "--no-validate"])
    assert again.exit_code == 0 and "exported already" in again.stderr and "pass" not in again.stderr
    plain = CliRunner().invoke(main, [*arguments, "--no-validate", "--json"])
    status = json.loads(plain.stdout)["status"]
    assert status == Bundle.open(tmp_path / "b").status.to_dict() and status["quality_measured"] is False


def test_weights_in_files_of_their_own_go_the_whole_way(
    unet_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large networks have them; readers refuse files with several hard links, as an extended bundle once had."""
    pytest.importorskip("tensorrt_rtx")
    for function in (write_model, export_samplers):
        monkeypatch.setitem(function.__kwdefaults__, "external_data_above", 0)
    out = tmp_path / "bundle"
    bundle = build_all(unet_checkpoint, out, steps=[1], max_batch=3, targets=resolve_targets(["l4"]))
    data = [path for path in out.rglob("*_data")]
    assert sorted(path.parts[-3] for path in data) == ["fp16", "fp32", "int8"]
    assert {entry.path for entry in bundle.manifest.files} >= {path.relative_to(out).as_posix() for path in data}
    assert all(path.stat().st_nlink == 1 for path in data)
    assert all(validate_bundle(out, backends=["onnxruntime"], min_psnr_db=20, reason="random weights"))
