"""EDM2 and DDPM++ on their way to graphs: plain convolutions, guidance as an input, every precision, engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.engines.targets import resolve_targets
from scm_sdk.errors import ConfigError
from scm_sdk.export.bundle_export import export_bundle
from scm_sdk.export.diagnose.diagnose import diagnose
from scm_sdk.export.engines.add import add_engines
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.half import NORMS, default_plan
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig, make_network
from scm_sdk.model.networks.ddpmpp import DDPMppConfig
from scm_sdk.model.networks.edm2 import EDM2Config
from scm_sdk.model.sampler import Sampler

SHAPE: dict[str, Any] = {
    "image_size": 8,
    "channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_resolutions": (),  # the lowest has one block of it
    "head_channels": 16,
    "num_classes": 3,
    "guidance": True,
}


def make_model(config: Any) -> ConsistencyModel:
    torch.manual_seed(0)
    network: nn.Module = make_network(config)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim > 1 else 0.3))
    return ConsistencyModel(ModelConfig(network=config, default_guidance=1.5), network).eval()


def make_bundle(config: Any, folder: Path) -> ConsistencyModel:
    make_model(config).save_pretrained(folder / "model")
    export_bundle(folder / "model", folder / "bundle", steps=(1,), max_batch=4)
    add_precision(folder / "bundle", default_plan("fp16"), num_samples=0)
    return ConsistencyModel.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def edm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[ConsistencyModel, Path]:
    folder = tmp_path_factory.mktemp("edm2")
    return make_bundle(EDM2Config(**SHAPE), folder), folder / "bundle"


def test_the_graph_holds_plain_convolutions(edm2: tuple[ConsistencyModel, Path]) -> None:
    model, bundle = edm2
    graph = read_model(bundle / "onnx/fp32/1step/model.onnx").graph
    weighted = [node for node in graph if node.op_type in ("Conv", "Gemm")]
    assert len([n for n in weighted if n.op_type == "Conv"]) == 29
    assert all(node.inputs[1] is not None and node.inputs[1].is_initializer() for node in weighted)
    stored = [n.name for n in graph if all(v is None or v.is_initializer() for v in n.inputs)]
    assert not stored  # nothing is computed from weights alone
    names = set(graph.initializers) & set(model.network.state_dict())
    tensors = [graph.initializers[name].const_value for name in names]
    weights = [p.numel() for p in model.network.parameters()]
    assert sum(tensor.size for tensor in tensors if tensor is not None) > 0.9 * sum(weights)


def test_the_graph_computes_what_the_normalized_weights_do(edm2: tuple[ConsistencyModel, Path]) -> None:
    model, bundle = edm2
    x, labels, s = torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 1]), torch.tensor([1.0, 1.5, 2.0])
    with torch.inference_mode():
        expected = Sampler(model, model.spec(1)).eval()(x, labels, s).numpy()
    with Generator.from_pretrained(bundle, backend="onnxruntime", precision="fp32") as gen:
        found = gen(3, labels.tolist(), noise=[x.numpy()], guidance_scale=s.tolist(), output_type="raw").images
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)
        alone = gen(1, [2], noise=[x[1:2].numpy()], output_type="raw").images  # the default, 1.5
        np.testing.assert_allclose(np.asarray(alone), expected[1:2], atol=1e-5)
        with pytest.raises(ConfigError, match=r"guidance_scale is 2.5, expected numbers in 1.0\.\.2.0"):
            gen(1, guidance_scale=2.5)
    with Generator.from_pretrained(bundle, backend="torch", verify="smoke") as gen:
        found = gen(3, labels.tolist(), noise=[x.numpy()], guidance_scale=s.tolist(), output_type="raw").images
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


def test_sums_of_squares_stay_float32_in_fp16(edm2: tuple[ConsistencyModel, Path]) -> None:
    _, bundle = edm2
    model = read_model(bundle / "onnx/fp16/1step/model.onnx")
    norms = [node for node in model.graph if node.op_type == "ReduceL2"]
    assert len(norms) == 34 and {node.outputs[0].dtype.name for node in norms} == {"FLOAT"}  # type: ignore[union-attr]
    assert any(island.pattern == NORMS for island in default_plan("fp16").islands)
    images = {}
    for precision in ("fp32", "fp16"):
        with Generator.from_pretrained(bundle, backend="onnxruntime", precision=precision) as gen:
            images[precision] = np.asarray(gen(4, seed=0, output_type="raw").images)
    np.testing.assert_allclose(images["fp16"], images["fp32"], atol=1e-2)


def test_the_diagnosis_knows_baked_weights(edm2: tuple[ConsistencyModel, Path]) -> None:
    model, bundle = edm2
    spec = Bundle.open(bundle, verify="none").spec(1)
    graph = read_model(bundle / "onnx/fp32/1step/model.onnx")
    found = diagnose(graph, model, spec)
    assert not found.findings and found.stored.compared > 29


@pytest.mark.slow
@pytest.mark.parametrize("config", [EDM2Config(**SHAPE), DDPMppConfig(**SHAPE)], ids=["edm2", "ddpmpp"])
def test_the_whole_way(config: Any, tmp_path: Path) -> None:
    make_bundle(config, tmp_path)
    (int8,) = add_int8(tmp_path / "bundle", QuantizeOptions(num_samples=8))
    assert int8.psnr_db is not None and int8.psnr_db > 25
    for engine in add_engines(tmp_path / "bundle", resolve_targets(["a100"])):
        assert not engine.record.census["mismatches"]
