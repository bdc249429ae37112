"""Artifacts of edge runtimes: made from the bundle, recorded, held to the gate of every other artifact, and run."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from helpers.disk_faults import tree
from helpers.edge_bundles import edge_params, with_edge
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.layout import WEIGHTS_NAME
from scm_sdk.errors import ConfigError, ExportError, ParityError
from scm_sdk.export.cli import main
from scm_sdk.export.edge.artifacts import add_edge
from scm_sdk.export.edge.runtimes import RUNTIMES, EdgeSource
from scm_sdk.export.graph.io import read_model
from scm_sdk.inference.backends import BACKENDS
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import Precision

# Of the libraries themselves, while they are imported.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


@pytest.fixture(scope="module", params=edge_params())
def made(request: pytest.FixtureRequest, unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the U-Net's bundle with the artifacts of a runtime."""
    return with_edge(unet_bundle, request.param, tmp_path_factory.mktemp("edge") / request.param)


def runtime_of(bundle: Path) -> str:
    return bundle.name


def test_an_artifact_is_recorded_with_what_made_it(made: Path) -> None:
    info, bundle = RUNTIMES[runtime_of(made)], Bundle.open(made)
    found = bundle.artifacts(format=info.format)
    assert [a.path for a in found] == [info.path("fp32", n) for n in (1, 2)]
    entries = {entry.path: entry for entry in bundle.manifest.files}
    for artifact in found:
        sources = set(entries[artifact.path].built_from)
        assert entries[artifact.path].role == "edge" and sources == set(artifact.recipe["source"])
        assert artifact.recipe["source"] == {path: entries[path].sha256 for path in sources}
        reads = "onnx/fp32" if info.reads == "graph" else "denoiser"
        assert sources and all(path.startswith(reads) for path in sources)
        assert artifact.recipe["libraries"].keys() == set(info.libraries) and artifact.recipe["batch"] == 1
        assert "unknown" not in artifact.recipe["libraries"].values()


def paths(made: Path) -> list[str]:
    return [RUNTIMES[runtime_of(made)].path("fp32", n) for n in (1, 2)]


def test_what_would_come_out_the_same_is_left_unchanged(made: Path) -> None:
    before = tree(made)
    assert [each.unchanged for each in add_edge(made, runtime_of(made))] == [True, True]
    assert tree(made) == before


def test_the_gate_of_every_artifact_holds(made: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    done = CliRunner().invoke(main, ["validate", str(bundle), "--backend", runtime_of(made), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["parity"]
    assert [each["candidate"] for each in found] == paths(made)
    records = Bundle.open(bundle).manifest.parity
    assert [(r.artifact, r.backend, r.gate, r.passed) for r in records] == [
        (path, runtime_of(made), "max_abs", True) for path in paths(made)
    ]


def test_a_seed_gives_the_image_of_the_other_backends(made: Path, ort: Generator) -> None:
    with Generator.from_pretrained(made, backend=runtime_of(made), verify="full") as gen:
        for steps in (1, 2):
            asked = {"seed": [7, 2**63, 5], "class_labels": [1, 3, 0], "num_inference_steps": steps}
            images = gen(3, output_type="raw", **asked).images
            np.testing.assert_allclose(images, ort(3, output_type="raw", **asked).images, rtol=0, atol=5e-5)
            alone = gen(1, seed=5, class_labels=[0], num_inference_steps=steps, output_type="raw").images
            np.testing.assert_array_equal(alone[0], images[2])


def test_an_artifact_that_computes_something_else_fails_the_gate(
    made: Path, unet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its converter is given other weights than those of the bundle."""
    checkpoint = Path(shutil.copytree(unet_bundle / "denoiser", tmp_path / "checkpoint"))
    weights = load_file(checkpoint / WEIGHTS_NAME)
    save_file(weights | {"conv_in.weight": weights["conv_in.weight"] * np.float32(1.001)}, checkpoint / WEIGHTS_NAME)
    graph = read_model(unet_bundle / "onnx/fp32/1step/model.onnx")
    stored = graph.graph.initializers["conv_in.weight"]
    stored.const_value = ir.tensor(stored.const_value.numpy() * np.float32(1.001), name="conv_in.weight")  # type: ignore[union-attr]
    ir.save(graph, tmp_path / "model.onnx")
    wrong = tmp_path / "model.onnx" if RUNTIMES[runtime_of(made)].reads == "graph" else checkpoint
    monkeypatch.setattr(EdgeSource, "path", wrong)
    bundle = with_edge(unet_bundle, runtime_of(made), tmp_path / "bundle", steps=[1])
    done = CliRunner().invoke(main, ["validate", str(bundle), "--backend", runtime_of(made)])
    assert done.exit_code == 3 and "edge/" in done.stderr, done.output
    with Generator.from_pretrained(bundle, num_inference_steps=1) as gen:
        assert runtime_of(made) not in {row.backend for row in gen.plan().accepted}, "auto never takes what failed"


def test_every_runtime_with_a_backend_has_the_backends_name() -> None:
    for name, info in RUNTIMES.items():
        assert info.backend in ("", name) and (not info.backend or BACKENDS[info.backend].opens == (name,))


def test_what_cannot_be_converted_is_said(unet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"runtime is 'ncnn', expected one of litert, executorch"):
        add_edge(unet_bundle, "ncnn")
    with pytest.raises(ConfigError, match=r"precision is 'int8', .* fp32, fp16 for OpenVINO IR"):
        add_edge(unet_bundle, "openvino_ir", precisions=["int8"])
    with pytest.raises(ConfigError, match=r"samplers of \[1, 2\] steps, expected \[4\]"):
        add_edge(unet_bundle, "openvino_ir", steps=[4])
    cut = tmp_path / "cut"
    Bundle.open(unet_bundle).subset(cut, ["onnx/fp32/2step"])
    monkeypatch.setattr("scm_sdk.export.edge.artifacts.require", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"holds no checkpoint, expected one to convert to LiteRT.*cut from build"):
        add_edge(cut, "litert", steps=[2])


def test_an_absent_converter_is_named(unet_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scm_sdk._util import lazy

    monkeypatch.setattr(lazy, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    monkeypatch.setattr(lazy, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["edge", str(unet_bundle), "--runtime", "litert"])
    assert done.exit_code == 7 and "exporting to LiteRT needs litert_torch, which is not installed" in done.stderr


def test_a_failed_conversion_changes_nothing(
    unet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    bundle = Path(shutil.copytree(unet_bundle, tmp_path / "bundle"))
    before = tree(bundle)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(openvino, "save_model", fail)
    with pytest.raises(ExportError, match=r"openvino .* cannot convert .*model\.onnx: no room"):
        add_edge(bundle, "openvino_ir")
    assert tree(bundle) == before


def test_half_precision_is_smaller_and_passes_its_gate(unet_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    bundle = with_edge(unet_bundle, "openvino_ir", tmp_path / "bundle", precisions=["fp32", "fp16"], steps=[1])
    full, half = ((bundle / RUNTIMES["openvino_ir"].path(p, 1)).with_suffix(".bin") for p in ("fp32", "fp16"))
    assert half.stat().st_size < 0.7 * full.stat().st_size
    done = CliRunner().invoke(main, ["validate", str(bundle), "--backend", "openvino_ir"])
    assert done.exit_code == 0 and "fp16/1step" in done.stderr, done.output


@pytest.mark.slow
@pytest.mark.parametrize("runtime", edge_params())
def test_the_shipped_model_passes_and_stores_its_weights_once(
    runtime: str, avatars_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(avatars_bundle, tmp_path / "bundle"))
    (made,) = add_edge(bundle, runtime)
    graph = (bundle / "onnx/fp32/2step/model.onnx").stat().st_size
    assert made.num_inference_steps == 2 and made.bytes < 1.3 * graph
    assert not [note for note in made.notes if "stores its weights" in note]
    done = CliRunner().invoke(main, ["validate", str(bundle), "--backend", runtime])
    assert done.exit_code == 0, done.output


def test_weights_that_are_stored_twice_are_said(
    avatars_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = import_module("scm_sdk.export.edge.openvino_ir")
    real = exporter.export

    def twice(source: EdgeSource, path: Path) -> tuple[str, ...]:
        notes = real(source, path)
        path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes() * 2)
        return tuple(notes)

    monkeypatch.setattr(exporter, "export", twice)
    bundle = Path(shutil.copytree(avatars_bundle, tmp_path / "bundle"))
    (made,) = add_edge(bundle, "openvino_ir")
    assert [note for note in made.notes if re.match(r"stores its weights 2\.\d times", note)]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", edge_params())
def test_a_sana_pipeline_is_converted(runtime: str, sana_bundle: Path, tmp_path: Path) -> None:
    bundle = with_edge(sana_bundle, runtime, tmp_path / "bundle", steps=[1, 2])
    done = CliRunner().invoke(main, ["validate", str(bundle), "--backend", runtime])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_executorch_computes_each_gelu_as_pytorch(approximate: str, tmp_path: Path) -> None:
    """Its lowering to XNNPACK drops the argument: 4.7e-4 off."""
    pytest.importorskip("executorch", reason="executorch is not installed: make test-edge installs it")
    torch = pytest.importorskip("torch")
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    from scm_sdk.export.edge.executorch import partitioner

    class Gelu(torch.nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, x: object) -> object:
            return torch.nn.functional.gelu(x, approximate=approximate)

    x = torch.linspace(-4, 4, 101)[None]
    program = torch.export.export(Gelu(), (x,), strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner()]).to_executorch()
    (tmp_path / "model.pte").write_bytes(lowered.buffer)
    (found,) = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward").execute([x])
    np.testing.assert_allclose(found.numpy(), Gelu()(x).numpy(), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_core_ml_package_has_the_samplers_names_and_what_checks_it(
    precision: Precision, unet_bundle: Path, tmp_path: Path
) -> None:
    """It runs on Apple's systems alone: what is looked at here is the package and the files of its checkers."""
    coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed: make test-edge installs it")
    bundle = with_edge(unet_bundle, "coreml", tmp_path / "bundle", steps=[2], precisions=[precision])
    opened = Bundle.open(bundle)
    (artifact,) = opened.artifacts(format="coreml")
    assert artifact.precision == precision and artifact.path.endswith("2step/model.mlpackage")
    folder = bundle / Path(artifact.path).parent
    model = coremltools.models.MLModel(str(folder / "model.mlpackage"), skip_model_load=True)
    description = model.get_spec().description
    assert {each.name: list(each.type.multiArrayType.shape) for each in description.input} == {
        "noise_0": [1, 3, 8, 8], "noise_1": [1, 3, 8, 8], "class_labels": [1],
    }  # fmt: skip
    assert [each.name for each in description.output] == ["images"]
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    assert (expected["max_abs"] is None) == (precision == "fp16") and expected["shape"] == [4, 3, 8, 8]
    golden = opened.goldens()[2]
    np.testing.assert_array_equal(np.fromfile(folder / "images.bin", "<f4"), golden.images.ravel())
    np.testing.assert_array_equal(np.fromfile(folder / "class_labels.bin", "<i8"), golden.class_labels)
    compile((folder / "check.py").read_text("utf-8"), "check.py", "exec")
    assert (folder / "check.swift").is_file() and Bundle.open(bundle, verify="digest")


@pytest.mark.slow
def test_mnn_computes_the_recorded_samples_in_the_portable_form_alone(
    avatars_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MNN's converter reports success for ReduceL2 and gets it wrong; weights that steps share are stored again."""
    pytest.importorskip("MNN", reason="MNN is not installed: make test-edge installs it")
    bundle = Path(shutil.copytree(avatars_bundle, tmp_path / "bundle"))
    (made,) = add_edge(bundle, "mnn")
    assert made.notes[0].startswith("recorded samples: largest difference")
    assert any(re.match(r"stores its weights [12]\.\d times", note) for note in made.notes)
    assert Bundle.open(bundle).artifacts(format="mnn")[0].recipe["runtime"] == "mnn"
    wrong = Path(shutil.copytree(avatars_bundle, tmp_path / "wrong"))
    before = tree(wrong)
    monkeypatch.setattr("scm_sdk.export.edge.mnn.portable_form", lambda model, _: model)
    with pytest.raises(ParityError, match=r"MNN .*recorded samples"):
        add_edge(wrong, "mnn")
    assert tree(wrong) == before
