"""DDPM++ and EDM2: their sizes as the paper has them, their rules, and what training and inference ask of them."""

from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig, make_network
from scm_sdk.model.networks import presets
from scm_sdk.model.networks.ddpmpp import DDPMppConfig
from scm_sdk.model.networks.edm2 import EDM2Config
from scm_sdk.model.networks.magnitude import (
    MPConv,
    bake_weights_,
    baked,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights_,
    require_unbaked,
)
from scm_sdk.train.objectives.tangent import scaled_jvp

SHAPE: dict[str, Any] = {
    "image_size": 8,
    "channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 16,
    "num_classes": 3,
    "guidance": True,
}
TINY: dict[str, Any] = {"ddpmpp": DDPMppConfig(**SHAPE), "edm2": EDM2Config(**SHAPE)}


def randomized(config: Any) -> nn.Module:
    """A network in which nothing is zero any more."""
    torch.manual_seed(0)
    network = make_network(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.numel() > 1 else 0.5))
    return network


@pytest.fixture(params=sorted(TINY))
def network(request: pytest.FixtureRequest) -> nn.Module:
    return randomized(TINY[request.param])


def count(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make_network(config).parameters())


# Millions, as published or as counted on the published networks; latents and 1000 labels for EDM2.
COUNTS = {
    "cifar10": (55_732_739, 60_066_563, "55.7", "60.1"),
    "imagenet512_s": (280_212_709, 293_926_081, "280.2", "293.9"),
    "imagenet512_m": (497_807_653, 522_187_009, "497.8", "522.2"),
    "imagenet512_l": (777_497_957, 815_590_721, "777.5", "815.6"),
    "imagenet512_xl": (1_119_283_621, 1_174_137_217, "1119.3", "1174.1"),
    "imagenet512_xxl": (1_523_164_645, 1_597_826_497, "1523.2", "1597.8"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    plain, double, plain_millions, double_millions = COUNTS[name]
    config = presets.PRESETS[name]()
    assert count(config) == double and f"{double / 1e6:.1f}" == double_millions
    assert count(msgspec.structs.replace(config, double_norm=False)) == plain and f"{plain / 1e6:.1f}" == plain_millions


def test_pixels_and_latents_have_one_network_for_each_size() -> None:
    for size in ("s", "m", "l", "xl"):
        pixels, latents = presets.PRESETS[f"imagenet64_{size}"](), presets.PRESETS[f"imagenet512_{size}"]()
        assert msgspec.structs.replace(pixels, in_channels=4) == latents


def test_a_sample_does_not_depend_on_its_batch(network: nn.Module) -> None:
    x, t, labels, s = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 2, 3]), 1 + torch.rand(3)
    with torch.inference_mode():
        together = network(x, t, labels, s)
        alone = torch.cat([network(*(part[i : i + 1] for part in (x, t, labels, s))) for i in range(3)])
    assert together.shape == x.shape
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_time_label_and_guidance_count(network: nn.Module) -> None:
    x, t, label, s = torch.randn(1, 3, 8, 8), torch.tensor([0.7]), torch.tensor([1]), torch.tensor([1.5])
    with torch.inference_mode():
        base = network(x, t, label, s)
        for changed in ((t + 0.3, label, s), (t, label + 1, s), (t, label, s + 0.4)):
            assert not torch.allclose(network(x, *changed), base)
        torch.testing.assert_close(
            network(x, t), network(x, t, torch.tensor([3]), torch.ones(1))
        )  # what None stands for


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_student_with_guidance_starts_as_its_teacher(name: str) -> None:
    teacher = randomized(msgspec.structs.replace(TINY[name], guidance=False))
    student = make_network(TINY[name]).eval()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("guidance_") for key in missing)
    x, t, label = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with torch.inference_mode():
        torch.testing.assert_close(student(x, t, label, torch.tensor([1.0, 2.0])), teacher(x, t, label))
        with pytest.raises(ShapeError, match="guidance_scale was given"):
            teacher(x, t, label, torch.ones(2))


@pytest.mark.parametrize("double_norm", [True, False])
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_tangent_is_the_derivative_along_the_trajectory(name: str, double_norm: bool) -> None:
    network = randomized(msgspec.structs.replace(TINY[name], double_norm=double_norm)).double()
    torch.manual_seed(1)
    x, dxdt = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64).unbind(0)
    t, labels, s = torch.tensor([0.4, 1.2], dtype=torch.float64), torch.tensor([0, 3]), torch.ones(2).double() * 1.3
    with torch.no_grad():
        F, dF = scaled_jvp(lambda x, t: network(x, t, labels, s), x, t, dxdt, sigma_data=0.5)
        h = 1e-6
        ahead, behind = (network((x + k * h * dxdt) / 0.5, t + k * h, labels, s) for k in (1, -1))
    speed = (t.cos() * t.sin())[:, None, None, None]
    torch.testing.assert_close(F, network(x / 0.5, t, labels, s).detach())
    torch.testing.assert_close(dF, speed * (ahead - behind) / (2 * h), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(TINY))
def test_dropout_acts_up_to_its_resolution(name: str) -> None:
    config = msgspec.structs.replace(TINY[name], dropout=0.4, dropout_resolution=4)
    shares = [m.p for m in make_network(config).modules() if isinstance(m, nn.Dropout)]
    # Down: 8, 8->4, 4; middle: 4, 4; up: 4, 4, 4->8, 8, 8.
    assert shares == [0.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "image_size is 9, expected a multiple of 2"),
        ({"channels": 12}, "channels is 12, expected a multiple of 8"),
        ({"channel_mult": ()}, "channel_mult holds 0 numbers, expected 1 to 16"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a share"),
        ({"attention_resolutions": (16,)}, r"attention_resolutions holds \[16\], the network has \[8, 4\]"),
        ({"dropout_resolution": 16}, "dropout_resolution is 16, expected 0 or one of"),
        ({"head_channels": 10}, "32 channels cannot be split into heads of head_channels 10"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_impossible_shapes_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        msgspec.structs.replace(TINY[name], **changes).__post_init__()


def test_magnitudes_are_preserved() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 64, 32, 32).unbind(0)
    conv = MPConv(64, 64, 3)
    with torch.no_grad():
        conv.weight.mul_(7.0)  # whatever their scale
        for out in (mp_silu(a), mp_sum(a, b, 0.3), mp_cat(a, b[:, :16], 0.5), normalize(5 * a), conv(a)):
            assert float(out.square().mean().sqrt()) == pytest.approx(1.0, abs=0.03)


def test_forced_normalization_changes_no_output() -> None:
    network = randomized(TINY["edm2"])
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    with torch.no_grad():
        before = network(x, t)
        normalize_weights_(network)
        torch.testing.assert_close(network(x, t), before, atol=1e-3, rtol=1e-3)
    for layer in (m for m in network.modules() if isinstance(m, MPConv)):
        sizes = layer.weight.detach().flatten(1).square().mean(dim=1).sqrt()
        torch.testing.assert_close(sizes, torch.ones_like(sizes), atol=1e-3, rtol=0)


def test_baked_weights_compute_the_same_and_are_final(tmp_path: Any) -> None:
    network = randomized(TINY["edm2"])
    copy = baked(network)
    assert copy is not network and baked(copy) is copy and set(copy.state_dict()) == set(network.state_dict())
    x, t, label, s = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3]), torch.tensor([1.0, 1.7])
    with torch.inference_mode():
        torch.testing.assert_close(copy(x, t, label, s), network(x, t, label, s), atol=1e-5, rtol=1e-5)
        bake_weights_(copy)  # a second time changes nothing
        torch.testing.assert_close(copy(x, t, label, s), network(x, t, label, s), atol=1e-5, rtol=1e-5)
    require_unbaked(network)
    model = ConsistencyModel(ModelConfig(network=TINY["edm2"]), copy)
    with pytest.raises(ConfigError, match="baked for inference, expected those of the checkpoint"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(TINY))
def test_checkpoints_come_back(name: str, tmp_path: Any) -> None:
    network = randomized(TINY[name])
    config = ModelConfig(network=TINY[name], guidance_range=(1.0, 3.0), default_guidance=1.5)
    ConsistencyModel(config, network).save_pretrained(tmp_path)
    model = ConsistencyModel.from_pretrained(tmp_path)
    assert model.config == config and model.spec(2).guidance_range == (1.0, 3.0)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0.5])
    with torch.inference_mode():
        torch.testing.assert_close(model.network(x, t), network(x, t), atol=0, rtol=0)
    with pytest.raises(ConfigError, match=r"default_guidance is 4\.0, .* 1\.0\.\.2\.0"):
        ModelConfig(network=TINY[name], default_guidance=4.0)
