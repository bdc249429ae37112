"""TrigFlow's algebra, the network's shapes and the sampler against the definition."""

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig, make_network
from scm_sdk.model.networks.conditioning import PositionalEmbedding
from scm_sdk.model.networks.layers import AdaptiveDoubleNorm, GroupNorm, pixel_norm
from scm_sdk.model.networks.presets import PRESETS, pixels16, tiny
from scm_sdk.model.networks.unet import UNet, UNetConfig
from scm_sdk.model.sampler import Sampler
from scm_sdk.model.trigflow import add_noise, predict_data, predict_noise, true_velocity

angles = st.floats(0, math.pi / 2)


def pair(shape=(2, 3, 4, 4)):
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)


@given(angles, st.floats(0.01, 10))
@settings(deadline=None)
def test_true_velocity_recovers_data_and_noise(t, sigma_data):
    x_0, z = pair()
    z, time = z * sigma_data, torch.full((2,), t, dtype=torch.float64)
    x_t, F = add_noise(x_0, z, time), true_velocity(x_0, z, time) / sigma_data
    torch.testing.assert_close(predict_data(x_t, F, time, sigma_data=sigma_data), x_0)
    torch.testing.assert_close(predict_noise(x_t, F, time, sigma_data=sigma_data), z)


@given(st.floats(-100, 100))
@settings(deadline=None)
def test_at_time_zero_the_sample_comes_back_whatever_the_network_says(value):
    x, F = pair()
    assert torch.equal(predict_data(x, F * value, torch.zeros(2, dtype=torch.float64), sigma_data=0.5), x)


def test_any_rank():
    x_0, z = pair((2, 5))
    time = torch.tensor([0.3, 0.9], dtype=torch.float64)
    expected = torch.stack([math.cos(t) * a + math.sin(t) * b for a, b, t in zip(x_0, z, time.tolist(), strict=True)])
    torch.testing.assert_close(add_noise(x_0, z, time), expected)


def test_one_time_per_sample():
    x_0, z = pair()
    with pytest.raises(ShapeError, match=r"t has shape \(3,\), expected \(2,\)"):
        add_noise(x_0, z, torch.zeros(3, dtype=torch.float64))


def test_positional_embedding_golden():
    emb = PositionalEmbedding(4, max_period=100.0)(torch.tensor([1.5]))
    expected = [math.cos(1.5), math.cos(0.015), math.sin(1.5), math.sin(0.015)]
    np.testing.assert_allclose(emb.numpy()[0], expected, rtol=1e-6)


def test_pixel_norm_has_unit_mean_square():
    x = torch.randn(2, 16, 3, 3) * 7
    torch.testing.assert_close(pixel_norm(x).square().mean(dim=1), torch.ones(2, 3, 3), rtol=1e-4, atol=1e-4)


def test_double_norm_ignores_the_size_of_scale_and_shift():
    layer = AdaptiveDoubleNorm(8, 4)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    with torch.no_grad():
        before = layer(x, emb)
        layer.affine.weight.mul_(5), layer.affine.bias.mul_(5)
        torch.testing.assert_close(layer(x, emb), before, rtol=1e-4, atol=1e-4)


def test_group_norm_accepts_channels_last():
    norm, x = GroupNorm(2, 8), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(norm(x.to(memory_format=torch.channels_last)), norm(x))


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith(("cifar", "imagenet"))])
def test_presets_start_as_zero_and_keep_the_shape(name):
    net = make_network(PRESETS[name](num_classes=3))
    x = torch.randn(2, *net.config.sample_shape)  # pyright: ignore[reportGeneralTypeIssues]
    with torch.inference_mode():
        F = net(x, torch.tensor([0.2, 1.5]), torch.tensor([0, 3]))
    assert F.shape == x.shape and torch.equal(F, torch.zeros_like(x))


def test_pixels16_size():
    assert sum(p.numel() for p in UNet(pixels16(11)).parameters()) == 1_532_748


def test_time_and_labels_reach_the_output(model):
    x = torch.randn(1, *model.config.sample_shape)

    def F(t, label):
        return model.network(x, torch.tensor([t]), torch.tensor([label]))

    with torch.inference_mode():
        assert not torch.allclose(F(0.3, 0), F(1.2, 0))
        assert not torch.allclose(F(0.3, 0), F(0.3, 1))
        unlabeled = model.network(x, torch.tensor([0.3]))
        torch.testing.assert_close(unlabeled, F(0.3, model.config.num_classes))


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    torch.manual_seed(0)
    made = ConsistencyModel(ModelConfig(network=tiny(num_classes=3), class_names=("a", "b", "c")))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampler_is_repeated_denoising(model, steps):
    """Against the paper's loop in float64 trigonometry, through the model's own f(x, t)."""
    spec = model.spec(steps)
    noise = [torch.randn(3, *spec.sample_shape) for _ in range(steps)]
    labels = torch.tensor([0, 1, 2])
    with torch.inference_mode():
        x_0 = torch.zeros(3, *spec.sample_shape)
        for t, z in zip(spec.times, noise, strict=True):
            x_t = math.cos(t) * x_0 + math.sin(t) * spec.sigma_data * z
            x_0 = model(x_t, torch.full((3,), t), labels)
        torch.testing.assert_close(Sampler(model, spec)(*noise, labels), x_0, rtol=1e-5, atol=1e-5)


def test_default_times_are_the_papers(model):
    assert model.spec(1).times == pytest.approx((1.5645464,), abs=1e-7)
    assert model.spec(2).times == (math.atan(160), 1.1)


def test_sampler_refuses_another_models_spec_and_missing_inputs(model):
    other = msgspec.structs.replace(model.spec(1), sample_shape=(1, 4, 4))
    with pytest.raises(ShapeError, match=r"Make the spec with model\.spec"):
        Sampler(model, other)
    with pytest.raises(ShapeError, match="got 1 inputs, expected 2: noise_0, class_labels"):
        Sampler(model, model.spec(1))(torch.zeros(1, 1, 8, 8))


def test_labels_for_an_unconditional_network_are_refused():
    net = UNet(tiny())
    with pytest.raises(ShapeError, match="num_classes = 0"):
        net(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 10, "channel_mult": (1, 2, 4)}, "multiple of 4"),
        ({"image_size": 8, "channels": 12}, "channels is 12"),
        ({"image_size": 8, "dropout": 1.0}, "dropout is 1.0"),
        ({"image_size": 8, "attention_resolutions": (3,)}, r"attention_resolutions holds \[3\]"),
        ({"image_size": 8, "num_blocks": 0}, "num_blocks is 0, expected 1 to 64"),
    ],
)
def test_impossible_networks(changes, message):
    with pytest.raises(ConfigError, match=message):
        UNetConfig(**changes)
