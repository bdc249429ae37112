"""``fp32-cpu``: float32 in the operators that CPUs are fastest with, from graph to ``Generator``."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from scm_sdk._util.processor import cpu_class
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.engines.targets import resolve_target
from scm_sdk.errors import ConfigError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.diagnose.diagnose import diagnose
from scm_sdk.export.engines.add import add_engines
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.cpu import cpu_form, norms_that_fuse
from scm_sdk.export.precision.variants import add_cpu_form
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.selection import FP32_CPU_IS_FASTER
from scm_sdk.model.consistency import ConsistencyModel

GRAPH = "onnx/fp32-cpu/2step/model.onnx"


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
    assert {(r.gate, r.threshold) for r in results} == {("psnr_p05_db", 100.0)}
    with Generator.from_pretrained(unet_copy, precision="fp32-cpu", num_inference_steps=2) as gen:
        out = gen(2, class_labels=[0, 1], seed=5, output_type="raw")
        assert out.info.artifact == GRAPH and out.info.precision == "fp32-cpu"
        assert "parity passed" in gen.plan().chosen.reason
    with Generator.from_pretrained(unet_copy, backend="torch", num_inference_steps=2) as gen:
        np.testing.assert_allclose(out.images, gen(2, class_labels=[0, 1], seed=5, output_type="raw").images, atol=1e-4)
    with Generator.from_pretrained(unet_copy, num_inference_steps=2) as gen:
        measured = cpu_class() in FP32_CPU_IS_FASTER  # by this project; elsewhere the user's own measurement decides
        assert gen.plan().chosen.precision == ("fp32-cpu" if measured else "fp32")


@pytest.mark.usefixtures("any_size")
def test_it_stores_nothing_that_it_does_not_read() -> None:
    """ONNX Runtime warns of each such tensor at every load."""
    from scm_sdk.export.graph.compose import compose_sampler
    from scm_sdk.export.graph.network import export_network
    from scm_sdk.model.consistency import ModelConfig
    from scm_sdk.model.networks.presets import PRESETS

    trained: ConsistencyModel = ConsistencyModel(ModelConfig(network=PRESETS["tiny"](num_classes=0, in_channels=1)))
    exact = compose_sampler(export_network(trained.eval()), trained.spec(1))
    model, _ = cpu_form(exact)
    read = {value for node in model.graph for value in node.inputs} | set(model.graph.outputs)
    assert not [name for name, value in model.graph.initializers.items() if value not in read]


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
    found = {timing["name"] for timing in latency["timings"]}
    found -= {"torch:bf16", "openvino:bf16"}  # timed where the CPU computes it
    others = {name.partition(":")[2] for name in found} - {""}  # next to what auto takes, which depends on the CPU
    assert others and others <= {"fp32", "fp32-cpu"}
    for backend in ("onnxruntime", "openvino"):
        assert len([name for name in found if name.partition(":")[0] == backend]) == 2
    assert len(found) == 5 and "torch" in found
    wrong = CliRunner().invoke(main, ["precision", str(unet_copy), "--to", "fp32-cpu", "--target-psnr", "80"])
    assert wrong.exit_code == 2 and "--target-psnr are for fp16 and bf16" in wrong.output


def test_a_network_without_wide_convolutions_is_refused_whole(unet_copy: Path) -> None:
    before = (unet_copy / "scm_manifest.json").read_bytes()
    refused = CliRunner().invoke(main, ["precision", str(unet_copy), "--to", "fp32-cpu"])
    assert refused.exit_code == 5 and "gains as Winograd's products" in refused.stderr
    assert (unet_copy / "scm_manifest.json").read_bytes() == before and not (unet_copy / "onnx/fp32-cpu").exists()
