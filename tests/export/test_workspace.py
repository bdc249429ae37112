"""One process: each file is hashed once, each graph parsed, diagnosed and opened once; what changes is read again."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime
import pytest
from click.testing import CliRunner

from helpers.recorded_events import Recorded
from scm_sdk._util import files
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.errors import IntegrityError
from scm_sdk.export.build_all import build_all
from scm_sdk.export.cli import main
from scm_sdk.export.diagnose import validate
from scm_sdk.export.diagnose.validate import validate as validate_model
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.variants import Variant
from scm_sdk.export.workspace import Workspace
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.parity.compare import Parity
from scm_sdk.model.consistency import ConsistencyModel

pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the package does that costs time with a large model."""
    counts: Counter[str] = Counter()

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return counting

    real = files.sha256_file

    def sha256_file(path: Path, *args: Any) -> str:
        counts[f"{path.stat().st_ino} {path.name}"] += 1
        counts["hashes"] += 1
        return real(path, *args)

    for module in [each for name, each in sys.modules.items() if name.startswith("scm_sdk")]:
        if getattr(module, "sha256_file", None) is real:
            monkeypatch.setattr(module, "sha256_file", sha256_file)
    for cls, name, what in (
        (Bundle, "open", "opens"),
        (ConsistencyModel, "from_pretrained", "checkpoint loads"),
    ):
        monkeypatch.setattr(cls, name, classmethod(count(what, vars(cls)[name].__func__)))
    monkeypatch.setattr(validate, "diagnose", count("diagnoses", validate.diagnose))
    monkeypatch.setattr("scm_sdk.export.workspace.read_model", count("parsed", read_model))
    opened = onnxruntime.InferenceSession.__init__
    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", count("sessions", opened))
    return counts


def test_all_opens_each_file_once(unet_checkpoint: Path, tmp_path: Path, counted: Counter[str]) -> None:
    workspace, events = Workspace(tmp_path / "bundle"), Recorded()
    build_all(unet_checkpoint, workspace, precisions=["fp16", "int8"], max_batch=2, target_db=20.0, events=events)
    built = counted.copy()
    validate_model(workspace, backends=["onnxruntime"], num_seeds=2, batches=[2], record=False, events=events)
    twice = {name: count for name, count in counted.items() if " " in name and name[0].isdigit() and count > 1}
    assert not twice, "each file is hashed once"
    assert counted["opens"] == 0, "nothing is read again that was just written"
    assert counted["diagnoses"] == counted["parsed"] == 6, "2 numbers of steps in 3 precisions"
    assert counted["checkpoint loads"] == 2, "the source, and the bundle's own"
    # For each number of steps: float32 and FP16 as it was written; float32, channels, ranges, candidates, written INT8.
    assert built["sessions"] == 2 * 7
    # For each graph: its values, and the backend, which opens INT8 again without fusing.
    assert counted["sessions"] - built["sessions"] == 6 * 2 + 2


def test_events_come_in_order_and_name_no_temporary_path(unet_checkpoint: Path, tmp_path: Path) -> None:
    workspace, events = Workspace(tmp_path / "bundle"), Recorded()
    build_all(unet_checkpoint, workspace, steps=[1], precisions=["fp16", "int8"], max_batch=2, target_db=20.0,
              events=events)  # fmt: skip
    traced = ("trace the network", "translate to ONNX", "simplify the graph")  # by another test, perhaps
    assert [stage for stage in events.stages if stage not in traced] == [
        f"export {unet_checkpoint}",
        "build the 1-step graph",
        "write the 1-step graph",
        "record reference samples",
        "hash the files and write the manifest",
        "write the 1-step graph in fp16",
        "measure the channels of the 1-step graph on 128 images",
        "calibrate the 1-step graph on 128 images",
    ]
    after = [kind for kind, what in events.all[events.all.index(("stage", events.stages[-1])) :]]
    assert after == ["stage", *["step"] * 64, "note", "result"], "128 images in batches of at most 2"
    assert [made.precision for made in events.results if isinstance(made, Variant)] == ["fp16", "int8"]
    (parity, *_) = validate_model(workspace, backends=["onnxruntime"], precisions=["fp16"], num_seeds=2, batches=[2],
                         record=False, min_psnr_db=20.0, reason="untrained", events=events)  # fmt: skip
    assert isinstance(parity, Parity) and events.results[-1] is parity
    assert [text.split()[0] for text in events.notes] == ["95", "onnx/fp16/1step/model.onnx"]
    for _, what in events.all:
        assert "partial" not in str(what) and ".scm-" not in str(what)


def test_what_changed_since_is_read_again(
    unet_copy: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scm_sdk.bundle.verify._SETTLED_NS", -1)  # files that were just copied count as settled
    workspace = Workspace(unet_copy)
    with workspace.extend(workspace.open_to_extend()) as draft:
        draft.path("reports/note.txt").write_text("as it was", encoding="utf-8")
        draft.roles["reports/note.txt"] = "report"
    counted.clear()
    first = workspace.bundle
    assert not counted and workspace.bundle == first
    with extend_bundle(unet_copy) as draft:  # another command, which opens the bundle by itself
        draft.path("reports/note.txt").write_text("by another", encoding="utf-8")
        draft.roles["reports/note.txt"] = "report"
    counted.clear()
    digests = {entry.path: entry.sha256 for entry in workspace.bundle.manifest.files}
    assert {name.split()[1] for name in counted if name[0].isdigit()} >= {"note.txt"}
    assert digests["reports/note.txt"] == files.sha256_file(unet_copy / "reports/note.txt")
    (unet_copy / "reports/note.txt").write_text("by a mouse", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"note\.txt has sha256"):
        _ = workspace.bundle


def test_an_open_bundle_needs_only_the_files_that_are_opened(unet_copy: Path, counted: Counter[str]) -> None:
    bundle = Bundle.open(unet_copy)
    shutil.rmtree(unet_copy / "denoiser")
    with Generator.from_pretrained(bundle, backend="onnxruntime", verify="none") as gen:
        assert gen(1, seed=0).info.artifact == "onnx/fp32/2step/model.onnx"
    assert counted["opens"] == 1


def test_a_bundle_that_was_replaced_as_it_was_written_is_hashed(unet_copy: Path, counted: Counter[str]) -> None:
    manifest = Bundle.open(unet_copy).manifest
    counted.clear()
    Bundle.written(unet_copy, manifest, hashed=[entry.path for entry in manifest.files])
    assert not counted["hashes"]
    other = msgspec.structs.replace(manifest, name="what this process wrote")
    Bundle.written(unet_copy, other, hashed=[entry.path for entry in manifest.files])
    assert counted["hashes"] == len(manifest.files)


def test_the_log_tells_what_each_pass_did(unet_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["onnx", str(unet_checkpoint), "-o", str(tmp_path / "bundle"), "--steps", "1", "--max-batch", "2"]
    silent = CliRunner().invoke(main, arguments)
    assert silent.exit_code == 0 and "scm_sdk.export" not in silent.stderr, silent.stderr
    told = CliRunner().invoke(main, ["-v", *arguments, "--overwrite"])
    assert told.exit_code == 0, told.stderr
    for line in (
        "scm_sdk.export.graph.compose: compose: 1 steps",
        "scm_sdk.export.graph.label_table: label table: ",
        "scm_sdk.export.graph.cleanup: narrow_splits: ",
    ):
        assert line in told.stderr
    again = CliRunner().invoke(main, arguments)
    assert "scm_sdk.export" not in again.stderr, "the log ends with the command"
