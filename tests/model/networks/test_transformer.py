"""The transformer: its shape, what it refuses, and its way to graphs of every precision."""

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.export.bundle_export import export_bundle
from scm_sdk.export.diagnose.diagnose import diagnose
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.half import PrecisionPlan
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.presets import avatars16
from scm_sdk.model.networks.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(
    image_size=8, in_channels=1, channels=16, depth=2, head_channels=8, patch_size=2, num_classes=3
)


def randomized(config: TransformerConfig) -> Transformer:
    torch.manual_seed(0)
    network = Transformer(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return network


def test_the_preset_fits_eight_megabytes() -> None:
    count = sum(p.numel() for p in Transformer(avatars16(num_classes=11)).parameters())
    assert count == 1_857_072 and 4 * count < 8e6


def test_a_sample_does_not_depend_on_its_batch() -> None:
    network = randomized(TINY)
    x, t, labels = torch.randn(5, 1, 8, 8), torch.linspace(0.1, 1.5, 5), torch.arange(5) % 3
    with torch.inference_mode():
        together = network(x, t, labels)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(5)])
    assert together.shape == x.shape
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_double_normalization_alone_ignores_the_size_of_scales_and_shifts() -> None:
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.2]), torch.tensor([0, 2])
    for double, alike in ((True, True), (False, False)):
        network = randomized(msgspec.structs.replace(TINY, double_norm=double))
        with torch.inference_mode():
            before = network(x, t, labels)
            network.modulation_out.weight.mul_(3)
            network.modulation_out.bias.mul_(3)
            after = network(x, t, labels)
        assert torch.allclose(before, after, atol=1e-5) == alike


def test_time_label_and_every_place_count() -> None:
    network = randomized(TINY)
    x, t, labels = torch.randn(1, 1, 8, 8), torch.tensor([0.7]), torch.tensor([1])
    with torch.inference_mode():
        base = network(x, t, labels)
        moved = x.clone()
        moved[..., 0, 0] += 1
        assert not torch.allclose(network(moved, t, labels)[..., 7, 7], base[..., 7, 7])
        assert not torch.allclose(network(x, t + 0.1, labels), base)
        assert not torch.allclose(network(x, t, labels + 1), base)
        torch.testing.assert_close(network(x, t), network(x, t, torch.tensor([3])))  # the last row is "no label"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "expected a multiple of patch_size 3"),
        ({"channels": 20}, "expected an even multiple of head_channels 8"),
        ({"depth": 0}, "depth is 0, expected 1 to 512"),
        ({"dropout": 1.0}, "expected a share"),
    ],
)
def test_impossible_shapes_are_refused(changes, message) -> None:
    fields = {"image_size": 8, "channels": 16, "head_channels": 8, "patch_size": 2}
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**{**fields, **changes})


def test_labels_without_classes_are_refused() -> None:
    network = Transformer(TransformerConfig(image_size=8, channels=16, head_channels=8, patch_size=2))
    with pytest.raises(ShapeError, match="num_classes = 0"):
        network(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))


def test_it_is_saved_exported_and_lowered_like_any_network(tmp_path) -> None:
    config = ModelConfig(network=TINY, class_names=("a", "b", "c"), mid_time=0.7)
    network = randomized(TINY)
    ConsistencyModel(config, network).save_pretrained(tmp_path / "model")
    assert ConsistencyModel.from_pretrained(tmp_path / "model").config == config
    export_bundle(tmp_path / "model", tmp_path / "bundle", steps=(2,))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.spec(2).times[1] == 0.7 and bundle.spec(2).with_steps(2).times[1] == 0.7
    weight = "blocks.1.mlp0/MatMul.in1"
    graph, model = read_model(tmp_path / "bundle/onnx/fp32/2step/model.onnx"), ConsistencyModel(config, network)
    found = diagnose(graph, model, bundle.spec(2))
    assert not found.findings and weight not in found.stored.unchecked
    stored = graph.graph.initializers[weight]
    stored.const_value = ir.tensor(stored.const_value.numpy() * np.float32(1.5), name=weight)
    assert [(f.fault, f.value) for f in diagnose(graph, model, bundle.spec(2)).findings] == [("weights", weight)]
    add_precision(tmp_path / "bundle", PrecisionPlan(precision="fp16"))
    images = {}
    for backend, precision in (("torch", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "fp16")):
        with Generator.from_pretrained(tmp_path / "bundle", backend=backend, precision=precision) as gen:
            out = gen(num_images=3, class_labels=["a", "c", "b"], num_inference_steps=2, seed=5, output_type="np")
            images[backend, precision] = np.asarray(out.images)
    reference = images["torch", "fp32"]
    np.testing.assert_allclose(images["onnxruntime", "fp32"], reference, atol=1e-5)
    np.testing.assert_allclose(images["onnxruntime", "fp16"], reference, atol=1e-2)
