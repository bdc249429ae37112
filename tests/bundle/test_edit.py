"""A bundle grows whole or not at all, and keeps what is still true of it."""

import os

import msgspec
import pytest

from helpers.toy_bundles import ToyBundle, write_linear_graph
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle, open_to_extend, recipe_of
from scm_sdk.bundle.manifest import Artifact, ParityRecord
from scm_sdk.errors import BundleError, ConfigError, IntegrityError

FP16 = "onnx/fp16/1step/model.onnx"
BF16 = "onnx/bf16/1step/model.onnx"
FP32 = "onnx/fp32/1step/model.onnx"


def artifact(**recipe) -> Artifact:
    return Artifact(path=FP16, format="onnx", precision="fp16", num_inference_steps=1, recipe=recipe)


def record(path: str) -> ParityRecord:
    return ParityRecord(
        artifact=path, reference="denoiser", backend="onnxruntime", threshold=1.0, noise_floor=0.1, max_abs=0.5,
        num_samples=4, passed=True,
    )  # fmt: skip


def add_fp16(path, gain: float = 0.5, **recipe) -> None:
    with extend_bundle(path) as draft:
        write_linear_graph(draft.path(FP16), ToyBundle.specs[0], gain=gain)
        draft.add(artifact(**recipe), [FP32])


def test_an_artifact_is_added_and_the_rest_stays(bundle_copy):
    before = Bundle.open(bundle_copy)
    before.with_parity(record(FP32))
    add_fp16(bundle_copy, source="abc")
    after = Bundle.open(bundle_copy)
    assert [a.path for a in after.artifacts(precision="fp16")] == [FP16]
    old, new = ({e.path: e.sha256 for e in b.manifest.files} for b in (before, after))
    assert new.items() >= old.items() and new.keys() - old.keys() == {FP16}
    entry = next(e for e in after.manifest.files if e.path == FP16)
    assert entry.built_from == (FP32,) and entry.role == "graph"
    assert recipe_of(after, FP16) == {"source": "abc"} and recipe_of(after, "absent") == {}
    assert after.manifest.parity == (record(FP32),), "what was measured of an unchanged artifact stays"
    assert after.manifest.provenance == before.manifest.provenance
    assert after.manifest.build_id != before.manifest.build_id
    assert after.goldens().keys() == before.goldens().keys()


def test_a_replaced_artifact_loses_its_record(bundle_copy):
    add_fp16(bundle_copy)
    Bundle.open(bundle_copy).with_parity(record(FP16), record(FP32))
    before = (bundle_copy / FP16).read_bytes()
    add_fp16(bundle_copy, gain=0.25)
    after = Bundle.open(bundle_copy)
    assert [r.artifact for r in after.manifest.parity] == [FP32]
    assert after.file(FP16).read_bytes() != before


def test_an_artifact_is_removed_with_its_files(bundle_copy):
    add_fp16(bundle_copy)
    with extend_bundle(bundle_copy) as draft:
        draft.remove(FP16)
    after = Bundle.open(bundle_copy)
    assert not after.artifacts(precision="fp16") and not (bundle_copy / FP16).exists()


def test_a_failure_leaves_the_old_bundle(bundle_copy):
    before = (bundle_copy / "scm_manifest.json").read_bytes()
    with pytest.raises(RuntimeError, match="half-way"), extend_bundle(bundle_copy) as draft:
        draft.path(FP32).write_bytes(b"never seen")
        raise RuntimeError("half-way")
    assert (bundle_copy / "scm_manifest.json").read_bytes() == before
    Bundle.open(bundle_copy)
    assert [p.name for p in bundle_copy.parent.iterdir()] == [bundle_copy.name], "nothing else is left"


def test_a_forgotten_file_a_damaged_bundle_and_a_path_out_of_it_are_refused(bundle_copy):
    with pytest.raises(ConfigError, match=r"fp16/1step/model\.onnx"), extend_bundle(bundle_copy) as draft:
        draft.add(artifact(), [FP32])
    with pytest.raises(BundleError, match="not allowed"), extend_bundle(bundle_copy) as draft:
        draft.path("../outside")
    (bundle_copy / FP32).write_bytes(b"x" * (bundle_copy / FP32).stat().st_size)
    with pytest.raises(IntegrityError, match="altered or damaged"), extend_bundle(bundle_copy):
        pass


def add(draft, path: str, precision, gain: float = 0.25) -> None:
    write_linear_graph(draft.path(path), ToyBundle.specs[0], gain=gain)
    draft.add(Artifact(path=path, format="onnx", precision=precision, num_inference_steps=1), [FP32])


def test_what_others_published_meanwhile_is_kept(bundle_copy):
    before = open_to_extend(bundle_copy)
    with extend_bundle(before) as draft:
        add(draft, BF16, "bf16")
        add_fp16(bundle_copy)
        Bundle.open(bundle_copy).with_parity(record(FP32), record(FP16)).with_budgets("median=5ms@b1")
    after = Bundle.open(bundle_copy)
    assert {a.path for a in after.artifacts(format="onnx")} >= {FP32, FP16, BF16}
    assert {r.artifact for r in after.manifest.parity} == {FP32, FP16}
    assert after.manifest.budgets == ("median=5ms@b1",)


def test_of_two_that_add_the_same_the_later_stays(bundle_copy):
    with extend_bundle(bundle_copy) as draft:
        add_fp16(bundle_copy)
        Bundle.open(bundle_copy).with_parity(record(FP16))
        add(draft, FP16, "fp16")
        mine = draft.path(FP16).read_bytes()
    after = Bundle.open(bundle_copy)
    assert after.file(FP16).read_bytes() == mine and not after.manifest.parity


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_what_was_made_from_another_file_is_not_published(how, bundle_copy):
    with (
        pytest.raises(BundleError, match=rf"{FP32} of .* was replaced by another command.*run the command again"),
        extend_bundle(bundle_copy) as draft,
    ):
        add(draft, FP16, "fp16")
        with extend_bundle(bundle_copy) as other:
            if how == "removed":
                other.remove(FP32)
            else:
                add(other, FP32, "fp32", gain=0.125)
    after = Bundle.open(bundle_copy)
    assert not after.artifacts(precision="fp16")
    assert [a.path for a in after.artifacts(precision="fp32", format="onnx") if a.path == FP32] == (
        [] if how == "removed" else [FP32]
    )


def test_files_that_the_bundle_does_not_list_stay(bundle_copy):
    (bundle_copy / ".git").mkdir()
    (bundle_copy / ".git/config").write_bytes(b"mine")
    add_fp16(bundle_copy)
    assert Bundle.open(bundle_copy).artifacts(precision="fp16")
    assert (bundle_copy / ".git/config").read_bytes() == b"mine"


def test_a_file_that_was_altered_is_not_made_right_by_an_extension(bundle_copy):
    with extend_bundle(bundle_copy) as draft:
        add(draft, FP16, "fp16")
        (bundle_copy / FP32).write_bytes(b"x" * (bundle_copy / FP32).stat().st_size)
    with pytest.raises(IntegrityError, match="altered or damaged"):
        Bundle.open(bundle_copy)


def test_without_hard_links_files_are_copied(bundle_copy, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    Bundle.open(bundle_copy).with_parity(record(FP32))
    add_fp16(bundle_copy)
    assert [r.artifact for r in Bundle.open(bundle_copy).manifest.parity] == [FP32]


def test_an_engine_and_a_recipe_survive_the_round_trip(bundle_copy):
    facts = {
        "library_version": "1.7.1.116",
        "compute_capabilities": ["8.6"],
        "platform": "linux-x86_64",
        "batch": [1, 8, 32],
    }
    with extend_bundle(bundle_copy) as draft:
        path = "engines/tensorrt_rtx-sm_86-fp16-1step/model.engine"
        draft.path(path).write_bytes(b"engine")
        draft.path(path.replace("model.engine", "build.json")).write_bytes(b"{}")
        engine = msgspec.convert(
            {"path": path, "format": "tensorrt_rtx", "precision": "fp16", "num_inference_steps": 1, "engine": facts},
            Artifact,
        )
        draft.add(engine, [FP32])
    (found,) = Bundle.open(bundle_copy).artifacts(format="tensorrt_rtx")
    assert found.engine is not None and found.engine.compute_capabilities == ("8.6",)
