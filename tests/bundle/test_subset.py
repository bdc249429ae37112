"""Bundles that hold only some artifacts of a whole one: what stays runs, and its records stay true."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from helpers.commands import run
from helpers.toy_bundles import write_linear_graph
from scm_sdk.bundle import subset
from scm_sdk.bundle.archive import pack
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import Artifact, ParityRecord
from scm_sdk.bundle.verify import make_build_id
from scm_sdk.engines.targets import resolve_targets
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError
from scm_sdk.evaluate.stored_budgets import check_budgets
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.engines.add import add_engines
from scm_sdk.export.polygraphy import write_handover
from scm_sdk.export.precision.variants import add_cpu_form
from scm_sdk.inference.backends import BACKENDS
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.report.collect import collect
from scm_sdk.spec import SamplerSpec

GRAPHS = [f"onnx/fp32/{steps}step/model.onnx" for steps in (1, 2)]


def record(artifact: str) -> ParityRecord:
    return ParityRecord(artifact=artifact, reference="denoiser", backend="onnxruntime", threshold=1e-5,
                        noise_floor=1e-6, max_abs=1e-6, num_samples=9, passed=True)  # fmt: skip


@pytest.fixture
def whole(unet_copy: Path) -> Bundle:
    """A bundle with a checkpoint, two graphs, records about both and budgets."""
    with extend_bundle(unet_copy) as draft:
        draft.path("precision/fp16.json").write_bytes(b"{}")
    bundle = Bundle.open(unet_copy).with_parity(*map(record, GRAPHS)).with_card()
    return bundle.with_budgets(
        "onnxruntime:fp32:p95=9s@b1", "p95=9s@b1", "torch:p95=9s@b1", "onnxruntime:fp16:p95=1s@b1"
    )


@pytest.fixture
def slim(whole: Bundle, tmp_path: Path) -> Bundle:
    return whole.subset(tmp_path / "slim", ["onnx/fp32/2step"])


def test_what_stays_is_listed_and_its_records_with_it(whole: Bundle, slim: Bundle) -> None:
    manifest, before = slim.manifest, whole.manifest
    assert manifest.cut_from == before.build_id != manifest.build_id == make_build_id(manifest)
    assert [artifact.path for artifact in manifest.artifacts] == GRAPHS[1:]
    paths = {entry.path for entry in manifest.files}
    assert paths == {p.relative_to(slim.path).as_posix() for p in slim.path.rglob("*") if p.is_file()} - {
        "scm_manifest.json"
    }
    assert GRAPHS[1] in paths and not {p for p in paths if p.startswith(("denoiser/", "precision/", "onnx/fp32/1step"))}
    assert manifest.parity == tuple(r for r in before.parity if r.artifact == GRAPHS[1])
    assert manifest.budgets == before.budgets[:2]
    assert (manifest.provenance, manifest.versions, manifest.name) == (before.provenance, before.versions, before.name)
    assert [spec.num_inference_steps for spec in manifest.samplers] == [2]
    assert list(slim.goldens()) == [2]
    np.testing.assert_array_equal(slim.goldens()[2].images, whole.goldens()[2].images)
    card = (slim.path / "README.md").read_text("utf-8")
    assert before.build_id in card and GRAPHS[1] in card and "denoiser" not in card and GRAPHS[0] not in card


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
def test_it_runs_as_the_whole_one_does(backend: str, whole: Bundle, slim: Bundle) -> None:
    if backend != "auto":
        pytest.importorskip(backend)
    wanted = "onnxruntime" if backend == "auto" else backend
    with (
        Generator.from_pretrained(slim.path, backend=backend, verify="full", num_threads=1) as gen,
        Generator.from_pretrained(whole.path, backend=wanted, num_inference_steps=2, num_threads=1) as other,
    ):
        assert gen.opened().row.backend == wanted
        images = (each(2, seed=3, output_type="raw").images for each in (gen, other))
        np.testing.assert_array_equal(*images)
    assert check_budgets(slim.path)


NEEDS_MORE: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: Generator.from_pretrained(path, backend="torch"),
    "other steps": lambda path: Generator.from_pretrained(path, backend="onnxruntime", num_inference_steps=1),
    "other precision": lambda path: Generator.from_pretrained(path, precision="fp16"),
    "unrolled steps": lambda path: Bundle.open(path).spec(7),
    "checkpoint": ConsistencyModel.from_pretrained,
    "validate": validate_bundle,
    "report": collect,
    "precision": lambda path: add_cpu_form(path, steps=[1]),
    "engine": lambda path: add_engines(
        path, flavor="tensorrt_rtx", targets=resolve_targets(["8.9"]), precisions=["fp16"]
    ),
    "handover": lambda path: write_handover(path, path.parent / "handover", steps=2, precision="fp16"),
}


@pytest.mark.parametrize("need", NEEDS_MORE)
def test_who_needs_more_is_told_where_it_is(need: str, whole: Bundle, slim: Bundle) -> None:
    with pytest.raises(ScmError, match=f"cut from build {whole.manifest.build_id[:12]}"):
        NEEDS_MORE[need](slim.path)


def test_it_may_be_cut_again_and_extended(whole: Bundle, tmp_path: Path) -> None:
    both = whole.subset(tmp_path / "both", ["onnx"])
    assert [a.path for a in both.manifest.artifacts] == GRAPHS and list(both.goldens()) == [1, 2]
    one = both.subset(tmp_path / "one", [GRAPHS[0]])
    assert one.manifest.cut_from == whole.manifest.build_id, "the whole one"
    with extend_bundle(one.path) as draft:
        write_linear_graph(draft.path("onnx/fp16/1step/model.onnx"), one.spec(1))
        draft.add(Artifact(path="onnx/fp16/1step/model.onnx", format="onnx", num_inference_steps=1), [GRAPHS[0]])
    assert Bundle.open(one.path).manifest.cut_from == whole.manifest.build_id
    last = Bundle.open(one.path).subset(tmp_path / "last", ["onnx/fp16"])
    assert [entry.built_from for entry in last.manifest.files if entry.role == "graph"] == [()]
    with pytest.raises(IntegrityError, match=r"altered or damaged.*'cut_from'"):
        forged = msgspec.structs.replace(last.manifest, cut_from="")
        (last.path / "scm_manifest.json").write_bytes(forged.to_json())
        Bundle.open(last.path)


def test_the_checkpoint_may_be_what_stays(whole: Bundle, tmp_path: Path) -> None:
    slim = whole.subset(tmp_path / "slim", ["denoiser"])
    assert [spec.num_inference_steps for spec in slim.manifest.samplers] == [1, 2], "it runs all"
    with Generator.from_pretrained(slim.path, verify="full") as gen:
        assert gen.opened().row.backend == "torch"


def test_what_is_not_kept_need_not_be_there_and_what_is_kept_is_whole(whole: Bundle, tmp_path: Path) -> None:
    shutil.rmtree(whole.path / "denoiser")
    thin = Bundle.open(whole.path, verify="none")
    assert thin.subset(tmp_path / "slim", ["onnx/fp32/2step"]).artifacts()
    (whole.path / GRAPHS[1]).write_bytes((whole.path / GRAPHS[1]).read_bytes()[:-1] + b"\0")
    for out in ("other", "other.scmz"):
        with pytest.raises(IntegrityError, match=r"2step/model\.onnx has sha256"):
            thin.pack(tmp_path / out, only=["onnx/fp32/2step"])
        assert not (tmp_path / out).exists()


@pytest.mark.parametrize("only", [["onnx/fp32/3step"], ["onnx/fp3"], ["README.md"], [""], []])
def test_names_that_are_not_there(only: list[str], made_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no artifact '.*', expected some of denoiser, onnx"):
        Bundle.open(made_bundle).subset(tmp_path / "slim", only)
    assert not (tmp_path / "slim").exists()


def test_the_verb_writes_a_file_or_a_folder(whole: Bundle, tmp_path: Path) -> None:
    only = ["--only", "onnx/fp32/2step"]
    file, folder = tmp_path / "slim.scmz", tmp_path / "slim"
    packed = run("bundle", "pack", whole.path, *only, "-o", file, "--json")
    assert json.loads(packed.stdout)["bytes"] == file.stat().st_size
    run("bundle", "pack", file, *only, "-o", folder)
    assert pack(folder, tmp_path / "again.scmz").read_bytes() == file.read_bytes()
    again = run("bundle", "pack", whole.path, *only, "-o", folder, code=6)
    assert "exists and is not empty" in again.stderr
    run("bundle", "pack", whole.path, "-o", folder, "--overwrite")
    assert Bundle.open(folder).manifest == whole.manifest
    lacking = run("bundle", "pack", whole.path, *only, code=2)
    assert "--out is missing" in lacking.stderr
    shown = run("inspect", file).stdout
    assert f"cut from build {whole.manifest.build_id[:12]}" in shown and "onnx/fp32/2step " in shown


def test_a_table_of_backends_that_lies_below_them() -> None:
    assert {name: (format,) for name, format in subset.BACKEND_FORMATS.items()} == {
        name: info.opens for name, info in BACKENDS.items()
    }


def test_engines_keep_their_records(toy, tmp_path: Path) -> None:
    engine = Artifact(path="engines/rtx/model.engine", format="tensorrt_rtx", num_inference_steps=1)

    class WithEngine(type(toy)):
        def fill(self, folder: Path, scale: float = 1.0) -> None:
            super().fill(folder, scale)
            (folder / "engines/rtx").mkdir(parents=True)
            for name in ("model.engine", "build.json"):
                (folder / "engines/rtx" / name).write_bytes(b"{}")

    bundle = WithEngine().export(tmp_path / "b", artifacts=[toy.checkpoint, *toy.graphs, engine],
                                 built_from={engine.path: [toy.graphs[0].path]})  # fmt: skip
    slim = bundle.subset(tmp_path / "slim", ["engines/rtx"])
    assert {entry.path for entry in slim.manifest.files} >= {engine.path, "engines/rtx/build.json"}
    assert not list(slim.path.rglob("*.onnx")) and not (slim.path / "denoiser").exists()


def test_beside_the_manifest(tmp_path: Path) -> None:
    """A graph that has no folder of its own, with its data."""
    from scm_sdk.bundle.bundle import publish_bundle, write_bundle

    spec = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))
    with publish_bundle(tmp_path / "b") as folder:
        for name in ("a.onnx", "b.onnx"):
            write_linear_graph(folder / name, spec)
        (folder / "a.onnx_data").write_bytes(b"weights")
        artifacts = [Artifact(path=f"{name}.onnx", format="onnx", num_inference_steps=1) for name in "ab"]
        write_bundle(folder, name="flat", samplers=[spec], artifacts=artifacts)
    slim = Bundle.open(tmp_path / "b").subset(tmp_path / "slim", ["a.onnx"])
    assert [entry.path for entry in slim.manifest.files] == ["a.onnx", "a.onnx_data"]
    with pytest.raises(BundleError, match="exists and is not empty"):
        Bundle.open(tmp_path / "b").subset(tmp_path, ["a.onnx"])
