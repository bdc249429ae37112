"""Denoisers of diffusers as TrigFlow networks: sampling gives what the library's own samplers give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.conversions import FLOW
from scm_sdk.model.foreign.denoiser import ModuleDenoiser, TrigFlowNetwork
from scm_sdk.model.foreign.diffusers_models import DiffusersConfig, make_diffusers_network
from scm_sdk.model.foreign.schedule import VpIndex, VpSchedule
from scm_sdk.model.solvers import sample_ode

diffusers = pytest.importorskip("diffusers")

UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1, "attention_head_dim": 4,
}  # fmt: skip
DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "out_channels": 4, "num_layers": 1,
    "sample_size": 4, "num_embeds_ada_norm": 3, "norm_num_groups": 2,
}  # fmt: skip
SD3: dict[str, Any] = {
    "sample_size": 4, "patch_size": 2, "in_channels": 2, "out_channels": 2, "num_layers": 2, "attention_head_dim": 4,
    "num_attention_heads": 2, "joint_attention_dim": 6, "caption_projection_dim": 8, "pooled_projection_dim": 5,
    "pos_embed_max_size": 4,
}  # fmt: skip
SCHEDULES = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
]


def unet(convention="vp_noise", sigma_data=0.5, **changes):
    schedule = VpSchedule() if convention.startswith("vp_") else None
    config = DiffusersConfig(
        class_name="UNet2DModel", arguments=UNET | changes, convention=convention, sample_shape=(1, 8, 8),
        sigma_data=sigma_data, schedule=schedule,
    )  # fmt: skip
    return wake(make_diffusers_network(config))


def wake(network):
    """Random weights, in float64, of the size of trained ones: what starts at zero would hide its input."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    return network.double().eval()


def noise_like(shape):
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def follow(scheduler, model, x):
    """The library's own loop."""
    with torch.no_grad():
        for i in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, i), i), i, x).prev_sample
    return x


def ours(network, start, times, order=1, sigma_data=0.5, **given):
    return sample_ode(
        lambda x_t, t: network(x_t / sigma_data, t, **given), start, times, sigma_data=sigma_data, order=order
    )


@pytest.fixture
def assert_same(record_property):
    """Compare samples, as a share of the largest; the difference goes into the report that ``parity.py`` reads."""

    def compare(found, wanted, tolerance=1e-6):
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        record_property("difference", difference)
        record_property("allowed", tolerance)
        assert difference < tolerance

    return compare


@pytest.mark.parametrize("options", SCHEDULES, ids=["linear", "scaled", "cosine", "zero_snr", "trained"])
def test_noise_levels_are_the_librarys(options):
    wanted = diffusers.DDIMScheduler(**options).alphas_cumprod.double().sqrt()
    schedule = VpSchedule(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    torch.testing.assert_close(schedule.alphas(), wanted, rtol=0, atol=0)
    index = VpIndex(schedule)(schedule.alphas())
    torch.testing.assert_close(index, torch.arange(len(wanted), dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_index_between_two_levels_moves_smoothly_and_stays_within_the_ends():
    index = VpIndex(VpSchedule())
    alpha = torch.tensor([0.3, 0.7, 0.99], dtype=torch.float64)
    found, slope = torch.func.jvp(index, (alpha,), (torch.ones_like(alpha),))  # pyright: ignore[reportAssignmentType]
    step = 1e-7
    torch.testing.assert_close(slope, (index(alpha + step) - index(alpha - step)) / (2 * step), rtol=1e-4, atol=0)
    assert (slope < 0).all() and (found > 0).all()
    assert index(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist() == [0.0, 999.0]


@pytest.mark.parametrize(
    ("predicts", "convention"), [("epsilon", "vp_noise"), ("v_prediction", "vp_velocity"), ("sample", "vp_data")]
)
def test_ddim_is_the_librarys(predicts, convention, assert_same):
    network, noise = unet(convention), noise_like((1, 8, 8))
    module = network.denoiser.module
    scheduler = diffusers.DDIMScheduler(prediction_type=predicts, clip_sample=False)
    scheduler.set_timesteps(8)
    wanted = follow(scheduler, lambda x, i: module(x, i).sample, noise)
    levels = VpSchedule().alphas()[scheduler.timesteps]
    spread = (1 - levels**2).sqrt()
    times = [math.atan2(float(sg), 0.5 * float(al)) for al, sg in zip(levels, spread, strict=True)]
    # Its sampler takes the first state for noise alone, and so a little too much of it.
    found = ours(network, noise / spread[0], [*times, 0.0])
    assert_same(found, wanted)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, with numpy 2
def test_heun_is_the_second_order_solver(assert_same):
    network, noise = unet(), noise_like((1, 8, 8))
    module = network.denoiser.module
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(10)  # 999 / 9 is whole: each of its steps is one the model was trained at
    x = noise * scheduler.init_noise_sigma
    wanted = follow(scheduler, lambda x, i: module(x, i).sample, x)
    sigmas = sorted({float(sigma) for sigma in scheduler.sigmas}, reverse=True)
    assert_same(ours(network, noise, [math.atan(sigma / 0.5) for sigma in sigmas], order=2), wanted, 1e-4)


def test_edm_euler_is_the_librarys(assert_same):
    network, noise = unet("edm_network"), noise_like((1, 8, 8))
    module = network.denoiser.module
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(8)
    wanted = follow(scheduler, lambda x, i: module(x, i).sample, noise * scheduler.sigmas[0])
    assert_same(ours(network, noise, [math.atan(float(s) / 0.5) for s in scheduler.sigmas]), wanted, 1e-5)


def flow_times(scheduler, sigma_data):
    return [float(FLOW.time_to_trigflow(u.double()[None], sigma_data)) for u in scheduler.sigmas]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_the_librarys(shift, assert_same):
    config = DiffusersConfig(
        class_name="SD3Transformer2DModel", arguments=SD3, convention="flow", sample_shape=(2, 4, 4), sigma_data=1.0,
        text_length=3,
    )  # fmt: skip
    network, noise = wake(make_diffusers_network(config)), noise_like((2, 4, 4))
    given = {tensor.name: torch.randn((2, *tensor.shape), dtype=torch.float64) for tensor in config.conditioning}
    assert {name: tuple(value.shape) for name, value in given.items()} == {
        "encoder_hidden_states": (2, 3, 6), "pooled_projections": (2, 5),
    }  # fmt: skip
    module = network.denoiser.module
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(6)
    x = noise
    with torch.no_grad():
        for i in scheduler.timesteps:
            v = module(hidden_states=x, timestep=i.double().expand(2), return_dict=False, **given)[0]
            x = scheduler.step(v, i, x).prev_sample
    assert_same(ours(network, noise, flow_times(scheduler, 1.0), sigma_data=1.0, **given), x)


def test_dit_keeps_its_labels_and_drops_its_variance(assert_same):
    config = DiffusersConfig(
        class_name="DiTTransformer2DModel", arguments=DIT, convention="vp_noise", sample_shape=(2, 4, 4),
        sigma_data=1.0, schedule=VpSchedule(),
    )  # fmt: skip
    assert (config.num_classes, config.has_null_label) == (3, True)
    network, noise = wake(make_diffusers_network(config)), noise_like((2, 4, 4))
    labels = torch.tensor([1, 3])
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    module = network.denoiser.module
    wanted = follow(
        scheduler,
        lambda x, i: module(x, timestep=i.expand(2), class_labels=labels, return_dict=False)[0][:, :2],
        noise,
    )
    levels = VpSchedule().alphas()[scheduler.timesteps]
    spread = (1 - levels**2).sqrt()
    times = [math.atan2(float(sg), float(al)) for al, sg in zip(levels, spread, strict=True)]
    found = ours(network, noise / spread[0], [*times, 0.0], sigma_data=1.0, class_labels=labels)
    assert_same(found, wanted)
    # A student in training must drop no labels of its own: the JVP and the pass after it see the same.
    x, t = noise_like((2, 4, 4)), torch.tensor([0.5, 1.0], dtype=torch.float64)
    network.train()
    assert torch.equal(network(x, t, labels), network(x, t, labels))


@pytest.mark.parametrize("make", [lambda: unet("flow"), lambda: unet("vp_noise")], ids=["flow", "vp"])
def test_forward_derivatives_are_those_of_finite_differences(make):
    """Diffusers embeds times in float32, which limits the resolution of differences."""
    network = make().requires_grad_(False)
    x, v = noise_like((1, 8, 8)), noise_like((1, 8, 8)).flip(0)
    t, step = torch.tensor([0.5, 1.2], dtype=torch.float64), 3e-5
    slope = torch.func.jvp(network, (x, t), (v, torch.ones_like(t)))[1]
    wanted = (network(x + step * v, t + step) - network(x - step * v, t - step)) / (2 * step)
    assert float((slope - wanted).norm() / wanted.norm()) < 0.05


def test_any_function_is_a_denoiser():
    """A flow model whose time runs the other way and is called by another name."""

    class Reversed(torch.nn.Module):
        def forward(self, sample, level, text):
            return (sample - text[:, :, None]) * level[:, None, None]

    denoiser = ModuleDenoiser(
        Reversed(), FLOW, timestep=lambda u: 1 - u, call=lambda module, x, s, text: -module(x, level=s, text=text)
    )
    network = TrigFlowNetwork(denoiser, sigma_data=0.5)
    x, t, text = torch.randn(2, 3, 4), torch.tensor([0.3, 1.5]), torch.ones(2, 3)
    x_t, u = 0.5 * x, FLOW.time(t.double(), 0.5).float()
    output = -(FLOW.model_input(x_t, t, 0.5) - 1) * (1 - u)[:, None, None]
    torch.testing.assert_close(network(x, t, text=text), FLOW.to_trigflow(x_t, output, t, 0.5))
    with pytest.raises(ShapeError, match=r"returned \(2, 1, 4\) for x of \(2, 3, 4\).*learned variance"):
        cut = ModuleDenoiser(torch.nn.Identity(), FLOW, call=lambda module, x, s: x[:, :1])
        TrigFlowNetwork(cut, sigma_data=0.5)(x, t)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier', expected 'positional'"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep', expected None"),
        ({"out_channels": 3}, "takes 1 channels and returns 3 for samples of 1"),
        ({"heads": 3}, r"UNet2DModel of diffusers .* cannot be made: .*heads"),
    ],
)
def test_networks_that_cannot_be_asked_at_any_time(changes, message):
    with pytest.raises(ConfigError, match=message):
        unet(**changes)


def test_configs_that_contradict_themselves():
    parts = {"class_name": "UNet2DModel", "arguments": UNET, "sample_shape": (1, 8, 8), "sigma_data": 0.5}
    with pytest.raises(ConfigError, match="convention 'vp_noise' comes with no schedule"):
        DiffusersConfig(convention="vp_noise", **parts)
    flow = DiffusersConfig(convention="flow", **parts)
    with pytest.raises(ConfigError, match=r"sigma_data is 1\.0, expected 0\.5"):
        ModelConfig(network=flow, sigma_data=1.0)
    with pytest.raises(ConfigError, match="expected numbers in"):
        VpSchedule(beta_start=0.5, beta_end=0.1)


def test_a_checkpoint_remembers_the_network(tmp_path):
    config = DiffusersConfig(
        class_name="UNet2DModel", arguments=UNET | {"num_class_embeds": 3}, convention="vp_noise",
        sample_shape=(1, 8, 8), sigma_data=0.5, schedule=VpSchedule(beta_schedule="squaredcos_cap_v2"),
    )  # fmt: skip
    model = ConsistencyModel(ModelConfig(network=config)).eval()
    model.save_pretrained(tmp_path)
    again = ConsistencyModel.from_pretrained(tmp_path)
    assert again.config == model.config and again.spec(1).num_classes == 3
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.2]), torch.tensor([0, 2])
    torch.testing.assert_close(again(x, t, labels), model(x, t, labels), rtol=0, atol=0)
