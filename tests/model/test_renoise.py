"""The rules for the noise of later steps: fresh, the first step's, the trajectory's own."""

import functools
import math

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.scheduler import SCHEDULER_PATH, diffusers_scheduler
from scm_sdk.errors import ConfigError
from scm_sdk.export.bundle_export import export_bundle, is_current
from scm_sdk.export.cli import main
from scm_sdk.export.diagnose.diagnose import diagnose
from scm_sdk.export.graph.compose import compose_sampler
from scm_sdk.export.graph.network import NetworkGraph, export_network
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.conversions import FLOW
from scm_sdk.model.foreign.denoiser import ModuleDenoiser, TrigFlowNetwork
from scm_sdk.model.sampler import Sampler
from scm_sdk.noise import draw_noise
from scm_sdk.spec import Renoise, SamplerSpec, flow_times

RULES: tuple[Renoise, ...] = ("fresh", "same", "ode")
LEVELS = st.lists(st.floats(0.02, 1.0), min_size=1, max_size=8, unique_by=lambda u: round(u, 6)).map(
    lambda u: sorted(u, reverse=True)
)


class Flow(nn.Module):
    """A velocity that depends on both of its inputs: no trained network, so that float64 loops are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[0.6, -0.3, 0.1], [0.2, 0.5, -0.4], [-0.1, 0.3, 0.7]]))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix.to(x.dtype)) * (1 + u[:, None])


def flow_model(sigma_data: float = 1.0) -> ConsistencyModel:
    network = TrigFlowNetwork(ModuleDenoiser(Flow(), FLOW), sigma_data=sigma_data)
    return ConsistencyModel(network=network, sigma_data=sigma_data, sample_shape=(3,)).eval()


@functools.cache
def exported() -> tuple[ConsistencyModel, NetworkGraph]:
    model = flow_model(0.5)
    return model, export_network(model)


def flow_loop(levels: list[float], noise: list[np.ndarray], renoise: Renoise) -> np.ndarray:
    """The sampler of flow matching in float64: x' = (1 - u') x_0 + u' n, from its formula alone."""
    flow = Flow().double()
    x = levels[0] * noise[0]
    for step, (u, following) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        with torch.no_grad():
            v = flow(torch.from_numpy(x), torch.full((len(x),), u, dtype=torch.float64)).numpy()
        x_0 = x - u * v
        if renoise == "fresh":
            n = noise[min(step + 1, len(noise) - 1)]
        else:
            n = noise[0] if renoise == "same" else x + (1 - u) * v
        x = (1 - following) * x_0 + following * n
    return x


@pytest.mark.parametrize("renoise", RULES)
@given(levels=LEVELS, sigma_data=st.floats(0.25, 4), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_equals_the_flow_matching_loop(renoise: Renoise, levels: list[float], sigma_data: float, seed: int) -> None:
    """TrigFlow's sampler at the times of the levels is flow matching's, whatever the scale of the data."""
    model = flow_model(sigma_data)
    spec = model.spec(times=flow_times(levels, sigma_data=sigma_data), renoise=renoise)
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal((2, 3)) for _ in spec.noise_inputs]
    with torch.no_grad():
        found = Sampler(model, spec).double()(*map(torch.from_numpy, noise)).numpy()
    np.testing.assert_allclose(found, flow_loop(levels, noise, renoise), rtol=0, atol=1e-7)


@pytest.mark.parametrize("stochastic", [False, True])
def test_step_for_step_with_the_flow_scheduler_of_diffusers(stochastic: bool) -> None:
    """``ode`` is FlowMatchEulerDiscreteScheduler; ``fresh`` the same with ``stochastic_sampling``."""
    diffusers = pytest.importorskip("diffusers")
    levels = [1.0, 0.9375, 0.8333, 0.625]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=levels)
    levels = [float(level) for level in scheduler.sigmas[:-1]]
    model, flow = flow_model(), Flow()
    spec = model.spec(times=flow_times(levels), renoise="fresh" if stochastic else "ode")
    with torch.random.fork_rng():  # the oldest diffusers takes a generator and does not use it
        torch.manual_seed(3)
        noise = [torch.randn(2, 3) for _ in range(1 + len(levels))]
        torch.manual_seed(3)
        sample = torch.randn(2, 3)
        for t, u in zip(scheduler.timesteps, levels, strict=True):
            with torch.no_grad():
                v = flow(sample, torch.full((2,), u))
            sample = scheduler.step(v, t, sample, return_dict=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(Sampler(model, spec)(*noise[: len(spec.noise_inputs)]), sample, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renoise", RULES)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_graph_equals_the_definition_and_passes_the_diagnosis(renoise: Renoise, steps: int) -> None:
    model, network = exported()
    levels = np.linspace(1, 0.1, steps).tolist()
    spec = model.spec(times=flow_times(levels, sigma_data=0.5), renoise=renoise)
    graph = compose_sampler(network, spec)
    noise = draw_noise(spec, [1, 2, 3])
    assert len(noise) == (steps if renoise == "fresh" else 1)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {tensor.name: array for tensor, array in zip(spec.inputs, noise, strict=True)})
    with torch.no_grad():
        wanted = Sampler(model, spec)(*map(torch.from_numpy, noise)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    assert diagnose(graph, model, spec).findings == ()


def test_diagnosis_names_a_wrong_noise_of_the_trajectory() -> None:
    model, network = exported()
    spec = model.spec(3, renoise="ode")
    graph = compose_sampler(network, spec)
    factor = graph.graph.initializers["step1/sampler/noise_of_F.factor"]
    factor.const_value = ir.tensor(factor.const_value.numpy() * np.float32(1.01), name=factor.name)
    first = diagnose(graph, model, spec).findings[0]
    assert (first.step, first.value) == (1, "noise")


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize("renoise", ["same", "ode"])
def test_bundle_keeps_the_rule_in_every_backend(unet_checkpoint, tmp_path, renoise: Renoise) -> None:
    report = export_bundle(unet_checkpoint, tmp_path / "bundle", steps=(2, 3), renoise=renoise)
    spec = Bundle.open(report.path).spec(3)
    assert spec.renoise == renoise and [tensor.name for tensor in spec.noise_inputs] == ["noise_0"]
    assert not (report.path / SCHEDULER_PATH).exists(), "SCMScheduler draws fresh noise"
    assert is_current(unet_checkpoint, report.path, steps=(2, 3), renoise=renoise)
    assert not is_current(unet_checkpoint, report.path, steps=(2, 3), renoise="fresh")
    images = []
    for backend in ("torch", "onnxruntime"):
        with Generator.from_pretrained(report.path, backend=backend) as gen:
            images.append(gen(2, seed=5, num_inference_steps=3, output_type="raw").images)
            given = draw_noise(spec, [5, 6])
            again = gen(2, noise=given, class_labels=[0, 1], num_inference_steps=3, output_type="raw").images
            seeded = gen(2, seed=5, class_labels=[0, 1], num_inference_steps=3, output_type="raw").images
            np.testing.assert_array_equal(again, seeded)
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-4)


def test_rules_differ_and_agree_where_they_must() -> None:
    """One step has no later noise; at two or more, the three give other samples."""
    model = flow_model()

    def sample(steps: int, renoise: Renoise) -> np.ndarray:
        spec = model.spec(steps, renoise=renoise)
        with torch.no_grad():
            return Sampler(model, spec)(*map(torch.from_numpy, draw_noise(spec, [7]))).numpy()

    ones = [sample(1, rule) for rule in RULES]
    np.testing.assert_array_equal(ones[0], ones[1])
    np.testing.assert_array_equal(ones[0], ones[2])
    twos = [sample(2, rule) for rule in RULES]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in ((twos[0], twos[1]), (twos[0], twos[2]), (twos[1], twos[2])))


def test_specs_without_the_field_are_fresh() -> None:
    text = SamplerSpec(times=(1.5, 1.1), sample_shape=(3,)).to_json().replace(',"renoise":"fresh"', "")
    assert "renoise" not in text and SamplerSpec.from_json(text).renoise == "fresh"


@pytest.mark.parametrize("levels", [[], [0.5, 0.5], [0.5, 0.9], [1.1], [0.0], [1.0, math.nan]])
def test_wrong_noise_levels_are_refused(levels: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"sigmas are .*expected .*\(0, 1\]"):
        flow_times(levels)


def test_wrong_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"renoise is 'old'.*fresh, same, ode"):
        SamplerSpec(times=(1.5,), sample_shape=(3,), renoise="old")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"renoise 'ode', expected 'fresh'"):
        diffusers_scheduler(SamplerSpec(times=(1.5, 1.1), sample_shape=(3,), renoise="ode"))


def test_options_of_the_command(unet_checkpoint, tmp_path) -> None:
    arguments = ["onnx", str(unet_checkpoint), "-o", str(tmp_path / "bundle"), "--dry-run"]
    chosen = [*arguments, "--renoise", "ode", "--sigmas", "1.0", "--sigmas", "0.5"]
    run = CliRunner().invoke(main, chosen)
    assert run.exit_code == 0, run.output
    assert '"renoise": "ode"' in run.stdout and "0.785398" in run.stdout, "0.5 is pi / 4"
    both = CliRunner().invoke(main, [*chosen, "--times", "1.2"])
    assert both.exit_code == 2 and "--times and --sigmas" in both.output
    wrong = CliRunner().invoke(main, [*arguments, "--renoise", "sane"])
    assert wrong.exit_code == 2 and "Did you mean same?" in wrong.output
