"""A bundle grows whole or not at all, and keeps what is still true of it."""

import os

import msgspec
import pytest

from scm_sdk.bundle import Bundle
from scm_sdk.errors import BundleError, ConfigError, IntegrityError
from scm_sdk.extend import extend_bundle, recipe_of
from scm_sdk.manifest import Artifact, ParityRecord
from toy_bundles import ToyBundle, write_linear_graph

FP16 = "onnx/fp16/1step/model.onnx"
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
    assert [p.name for p in bundle_copy.parent.iterdir()] == [bundle_copy.name], "nothing is left beside it"


def test_a_forgotten_file_a_damaged_bundle_and_a_path_out_of_it_are_refused(bundle_copy):
    with pytest.raises(ConfigError, match=r"fp16/1step/model\.onnx"), extend_bundle(bundle_copy) as draft:
        draft.add(artifact(), [FP32])
    with pytest.raises(BundleError, match="not allowed"), extend_bundle(bundle_copy) as draft:
        draft.path("../outside")
    (bundle_copy / FP32).write_bytes(b"x" * (bundle_copy / FP32).stat().st_size)
    with pytest.raises(IntegrityError, match="altered or damaged"), extend_bundle(bundle_copy):
        pass


def test_a_second_writer_is_noticed(bundle_copy):
    with pytest.raises(BundleError, match="replaced while it was being extended"), extend_bundle(bundle_copy) as draft:
        add_fp16(bundle_copy)
        theirs = (bundle_copy / FP16).read_bytes()
        write_linear_graph(draft.path(FP16), ToyBundle.specs[0], gain=0.25)
        draft.add(artifact(), [FP32])
    assert Bundle.open(bundle_copy).file(FP16).read_bytes() == theirs


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
