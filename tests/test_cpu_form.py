"""``fp32-cpu``: float32 in the operators that CPUs are fastest with, from graph to ``Generator``."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from scm_sdk.bundle import Bundle
from scm_sdk.errors import ConfigError
from scm_sdk.evaluate.gate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.cpu_form import cpu_form
from scm_sdk.export.diagnose import diagnose
from scm_sdk.export.engines import add_engines
from scm_sdk.export.fused_norms import norms_that_fuse
from scm_sdk.export.graph import export_network
from scm_sdk.export.variants import add_cpu_form
from scm_sdk.export.write import read_model, write_model
from scm_sdk.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.transformer import TransformerConfig
from scm_sdk.targets import resolve_target

GRAPH = "onnx/fp32-cpu/2step/model.onnx"
NORMS = 9
"""Of ``small_transformer``: two of the trunk, four of the conditioning, and three at the end."""


@pytest.fixture(scope="module")
def small_transformer() -> ir.Model:
    """Return the network's graph."""
    torch.manual_seed(0)
    shape = TransformerConfig(image_size=8, channels=32, depth=1, head_channels=16, num_classes=3)
    model = ConsistencyModel(ModelConfig(network=shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return export_network(model.eval()).model


def run(model: ir.Model, folder: Path, x: np.ndarray, label: int = 0, *, optimized: str = "") -> np.ndarray:
    path = write_model(model, folder / "graph.onnx").path
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = optimized
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = (x, np.full(1, 1.1, np.float32), (label + np.arange(len(x))) % 3)
    return np.asarray(session.run(None, dict(zip((i.name for i in session.get_inputs()), given, strict=True)))[0])


def test_a_transformers_norms_are_the_same_and_safe_at_zero(small_transformer: ir.Model, tmp_path: Path) -> None:
    model = small_transformer.clone()
    assert norms_that_fuse(model) == NORMS
    ops = [node.op_type for node in model.graph]
    assert ops.count("ReduceMean") == NORMS and not {"ReduceL2", "Max"} & set(ops), (
        "and nothing is left of the old ones"
    )
    x = np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)
    x[3] = 0
    together = run(model, tmp_path, x)
    np.testing.assert_allclose(together, run(small_transformer, tmp_path, x), rtol=0, atol=2e-5)
    for i in range(7):
        np.testing.assert_array_equal(run(model, tmp_path, x[i : i + 1], i)[0], together[i])


def test_both_cpu_libraries_make_one_kernel_of_each(small_transformer: ir.Model, tmp_path: Path) -> None:
    import openvino

    model = small_transformer.clone()
    norms_that_fuse(model)
    run(model, tmp_path, np.zeros((1, 3, 8, 8), np.float32), optimized=str(tmp_path / "optimized.onnx"))
    fused = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    kinds = [
        op.get_rt_info()["layerType"].astype(str)
        for op in openvino.Core().compile_model(tmp_path / "graph.onnx", "CPU").get_runtime_model().get_ops()
    ]
    assert (fused.count("SimplifiedLayerNormalization"), kinds.count("RMS")) == (NORMS, NORMS)


def test_norms_over_other_axes_stay(unet_bundle: Path) -> None:
    model = read_model(unet_bundle / "onnx/fp32/1step/model.onnx")
    assert norms_that_fuse(model) == 0


@pytest.mark.usefixtures("any_size")
def test_a_bundle_gains_it_and_every_cpu_backend_passes(unet_copy: Path) -> None:
    variants = add_cpu_form(unet_copy, num_samples=4)
    assert [v.path for v in variants] == ["onnx/fp32-cpu/1step/model.onnx", GRAPH]
    assert all(v.psnr_db is not None and 100 < v.psnr_db < 200 for v in variants), "rounding, and no more than that"
    assert "convolutions as Winograd's products" in variants[0].notes[0]
    assert all(v.unchanged for v in add_cpu_form(unet_copy, num_samples=4))

    results = validate_bundle(unet_copy, precisions=["fp32-cpu"], num_seeds=4, batches=[1, 3])
    assert {r.candidate_backend for r in results} == {"onnxruntime", "openvino"} and all(results)
    assert {(r.gate, r.threshold) for r in results} == {("psnr_db", 100.0)}
    with Generator.from_pretrained(unet_copy, precision="fp32-cpu", num_inference_steps=2) as gen:
        out = gen(2, class_labels=[0, 1], seed=5, output_type="raw")
        assert out.info.artifact == GRAPH and out.info.precision == "fp32-cpu"
        assert "parity passed" in gen.plan().chosen.reason
    with Generator.from_pretrained(unet_copy, backend="torch", num_inference_steps=2) as gen:
        np.testing.assert_allclose(out.images, gen(2, class_labels=[0, 1], seed=5, output_type="raw").images, atol=1e-4)
    with Generator.from_pretrained(unet_copy, num_inference_steps=2) as gen:
        assert gen.plan().chosen.precision == "fp32", "what is faster is measured, not supposed"


@pytest.mark.usefixtures("any_size")
def test_a_changed_filter_is_found_in_it(unet_bundle: Path) -> None:
    bundle = Bundle.open(unet_bundle)
    (checkpoint,) = bundle.artifacts(format="safetensors")
    trained = ConsistencyModel.from_pretrained(bundle.file(checkpoint.path)).eval()
    exact = read_model(unet_bundle / "onnx/fp32/2step/model.onnx")
    model, _ = cpu_form(exact)
    sound = diagnose(model, trained, bundle.spec(2), exact=exact)
    assert not sound.findings and sound.psnr_by_step[-1] > 100
    weight = next(v for v in model.graph.initializers.values() if v.shape is not None and list(v.shape)[2:] == [3, 3])
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[0, 0, 1, 1] += 0.05
    weight.const_value = ir.tensor(array, name=weight.name)
    (finding, *_) = diagnose(model, trained, bundle.spec(2), exact=exact).findings
    assert finding.fault == "weights" and finding.value == weight.name


@pytest.mark.usefixtures("any_size")
def test_no_engine_is_built_from_it(unet_copy: Path) -> None:
    add_cpu_form(unet_copy, steps=[1], num_samples=0)
    with pytest.raises(ConfigError, match="expected fp32-cpu"):
        add_engines(unet_copy, [resolve_target("a100")], precisions=["fp32-cpu"])


def test_the_command(unet_copy: Path, any_size: None) -> None:
    made = CliRunner().invoke(
        main, ["precision", str(unet_copy), "--to", "fp32-cpu", "--steps", "1", "--num-samples", "2"]
    )
    assert made.exit_code == 0 and "onnx/fp32-cpu/1step/model.onnx" in made.stderr + made.stdout
    bench = ["bench", str(unet_copy), "--steps", "1", "--batch", "1", "--rounds", "10", "--json"]
    (latency,) = json.loads(CliRunner().invoke(main, bench).stdout)
    names = ["torch", *(f"{name}{kind}" for name in ("onnxruntime", "openvino") for kind in ("", ":fp32-cpu"))]
    assert [timing["name"] for timing in latency["timings"]] == names
    wrong = CliRunner().invoke(main, ["precision", str(unet_copy), "--to", "fp32-cpu", "--target-psnr", "80"])
    assert wrong.exit_code == 2 and "--target-psnr are for fp16 and bf16" in wrong.output


def test_a_network_without_wide_convolutions_is_refused_whole(unet_copy: Path) -> None:
    before = (unet_copy / "scm_manifest.json").read_bytes()
    refused = CliRunner().invoke(main, ["precision", str(unet_copy), "--to", "fp32-cpu"])
    assert refused.exit_code == 5 and "gains as Winograd's products" in refused.stderr
    assert (unet_copy / "scm_manifest.json").read_bytes() == before and not (unet_copy / "onnx/fp32-cpu").exists()
