"""A bundle is written whole or not at all, and what is written opens."""

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.toy_bundles import parity_record
from scm_sdk._util.publish import atomic_folder
from scm_sdk.bundle.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.bundle.goldens import GOLDEN_PATH
from scm_sdk.bundle.manifest import MANIFEST_NAME, Artifact
from scm_sdk.errors import BundleError, ConfigError

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
RECORD = parity_record("onnx/fp32/1step/model.onnx")


def test_what_is_written_opens(made_bundle: Path, toy: Any) -> None:
    bundle = Bundle.open(made_bundle)
    assert bundle.manifest.name == "toy"
    assert bundle.manifest.provenance == {"license": "CC0-1.0", "seed": 1}
    assert {entry.path: entry.role for entry in bundle.manifest.files} == {
        WEIGHTS: "weights",
        "denoiser/config.json": "config",
        "README.md": "card",
        "reports/parity.json": "report",
        GOLDEN_PATH: "golden",
        **{graph.path: "graph" for graph in toy.graphs},
    }
    graph = next(entry for entry in bundle.manifest.files if entry.role == "graph")
    assert graph.built_from == (WEIGHTS,)
    assert bundle.file(WEIGHTS).is_file()
    assert bundle.file("denoiser").is_dir()
    assert [p.name for p in made_bundle.parent.iterdir()] == ["toy"]


def test_works_inside_a_plain_atomic_folder_and_with_a_text_path(tmp_path: Path, toy: Any) -> None:
    with atomic_folder(tmp_path / "toy") as folder:
        toy.fill(folder)
        written = write_bundle(folder, name="toy", samplers=toy.specs, artifacts=[toy.checkpoint])
    assert Bundle.open(str(tmp_path / "toy")).manifest == written


def test_build_id_names_what_is_computed(tmp_path: Path, toy: Any) -> None:
    ids = {
        name: toy.export(tmp_path / name, **changes).manifest.build_id  # type: ignore[arg-type]
        for name, changes in {
            "a": {},
            "same": {"name": "other", "provenance": {}, "parity": [RECORD]},
            "weights": {"scale": 2.0},
            "versions": {"versions": {"onnx": "1.21"}},
            "artifacts": {"artifacts": toy.graphs},
        }.items()
    }
    assert ids["a"] == ids["same"]
    assert len(set(ids.values())) == 4


def test_parity_is_recorded_and_replaced(bundle_copy: Path) -> None:
    other = msgspec.structs.replace(RECORD, backend="torch")
    worse = msgspec.structs.replace(RECORD, passed=False, max_abs=1.0)
    opened = Bundle.open(bundle_copy).with_parity(RECORD, other)
    opened = opened.with_parity(worse)
    assert opened.manifest.parity == (worse, other)
    assert Bundle.open(bundle_copy).manifest == opened.manifest
    with pytest.raises(ConfigError, match=r"breaks schema version 2: .*parity"):
        opened.with_parity(msgspec.structs.replace(RECORD, max_abs=float("nan")))
    assert Bundle.open(bundle_copy).manifest == opened.manifest


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"artifacts": [Artifact(path="gone.onnx", format="onnx")]},
            "artifact 'gone.onnx' .* none of the listed",
        ),
        ({"samplers": []}, r"samplers of \[\] steps"),
        ({"built_from": {WEIGHTS: ["data.npz"]}}, r"built from .data.npz., expected listed files"),
        ({"provenance": {"x": object()}}, "do not fit together: Encoding objects of type object"),
        ({"parity": [msgspec.structs.replace(RECORD, max_abs=float("nan"))]}, "breaks schema version 2"),
        ({"versions": {"torch": 2}}, "breaks schema version 2"),
    ],
    ids=range(6),
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_there(
    changes: dict[str, Any], message: str, tmp_path: Path, toy: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        toy.export(tmp_path / "b", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_file_needs_a_role_and_may_be_given_one(tmp_path: Path, toy: Any) -> None:
    (tmp_path / "notes.txt").write_bytes(b"")
    toy.fill(tmp_path)
    parts: dict[str, Any] = {"name": "x", "samplers": toy.specs, "artifacts": [toy.checkpoint]}
    with pytest.raises(ConfigError, match=r"role of notes\.txt .*weights, config"):
        write_bundle(tmp_path, **parts)
    manifest = write_bundle(tmp_path, **parts, roles={"notes.txt": "card"})
    assert {e.path: e.role for e in manifest.files}["notes.txt"] == "card"
    (tmp_path / "link").symlink_to("notes.txt")
    with pytest.raises(BundleError, match="link is a link, expected a file"):
        write_bundle(tmp_path, **parts)


def test_a_folder_without_manifest_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=rf"no {MANIFEST_NAME} was written"), publish_bundle(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_replacing_needs_leave_and_a_bundle(tmp_path: Path, toy: Any) -> None:
    toy.export(tmp_path / "b")
    with pytest.raises(BundleError, match="exists and is not empty"):
        toy.export(tmp_path / "b", scale=2.0)
    assert toy.export(tmp_path / "b", scale=2.0, overwrite=True).manifest.name == "toy"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_bytes(b"years")
    with pytest.raises(BundleError, match=f"holds no {MANIFEST_NAME}, so it is not replaced"):
        toy.export(tmp_path / "c", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_leaves_the_old_bundle_whole(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Any
) -> None:
    """Fail the first call, then the second, and so on, until an export comes through."""
    old = toy.export(tmp_path / "b").manifest
    real, failures = getattr(os, call), 0
    while True:
        calls = iter(range(10**6))

        def broken(*args: Any, _calls: Any = calls, _fails_at: int = failures) -> Any:
            if next(_calls) == _fails_at:
                raise OSError(code, os.strerror(code))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, broken)
            try:
                toy.export(tmp_path / "b", scale=2.0, overwrite=True)
                break
            except BundleError as exc:
                assert os.strerror(code) in str(exc)
        failures += 1
        assert Bundle.open(tmp_path / "b").manifest == old
        assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert failures >= (2 if call == "replace" else 15), "each call must have failed once"
    assert Bundle.open(tmp_path / "b").manifest.build_id != old.build_id
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_read_only_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(BundleError, match=r"b cannot be written: Permission denied.*that you may write to"):
        toy.export(tmp_path / "b")
