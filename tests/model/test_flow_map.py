"""Flow maps: a second time input r, a constant of each step, held to diffusers' scheduler and to the formula."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from helpers.few_step_fixtures import SIZES, STEPS, TOKENS, draw_prompts, frames_of_any_flow, make_pipeline  # noqa: E402
from scm_sdk.errors import ExportError  # noqa: E402
from scm_sdk.export.graph.network import export_samplers  # noqa: E402
from scm_sdk.model.consistency import ConsistencyModel  # noqa: E402
from scm_sdk.model.conversions import FLOW  # noqa: E402
from scm_sdk.model.foreign.denoiser import ModuleDenoiser, TrigFlowNetwork  # noqa: E402
from scm_sdk.model.networks.check import check_network  # noqa: E402
from scm_sdk.model.sampler import Sampler  # noqa: E402
from scm_sdk.spec import flow_times  # noqa: E402


class MeanVelocity(nn.Module):
    """u(x, time, r) of a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, time: Tensor, r: Tensor) -> Tensor:
        times = torch.stack([time, r], dim=1).to(x.dtype)
        return self.last(torch.tanh(self.first(torch.cat([x, times], dim=1))))


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    torch.manual_seed(3)
    network = TrigFlowNetwork(ModuleDenoiser(MeanVelocity(), FLOW), sigma_data=1.0)
    return (
        ConsistencyModel(network=network, sample_shape=(6,), sigma_data=1.0, flow_map=True).eval().requires_grad_(False)
    )


SIGMAS = (1.0, 0.9, 0.62, 0.3)


def by_formula(u: Any, noise: np.ndarray, sigmas: tuple[float, ...]) -> Tensor:
    """``x' = x - (sigma - sigma') u(x, sigma, sigma')``, in float64."""
    u, x = u.double(), torch.from_numpy(noise).double() * sigmas[0]
    for now, then in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        times = (torch.full((len(x),), each, dtype=torch.float64) for each in (now, then))
        x = x - (now - then) * u(x, *times)
    u.float()
    return x


def test_the_sampler_follows_the_flow_map_in_torch_and_in_onnx(model: ConsistencyModel, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    noise = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    spec = model.spec(times=flow_times(SIGMAS), renoise="ode")
    wanted = by_formula(model.get_submodule("network.denoiser.module"), noise, SIGMAS)
    with torch.no_grad():
        found = Sampler(model, spec).eval()(torch.from_numpy(noise))
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=0)
    (graph,) = export_samplers(model, [spec], tmp_path)
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["noise_0"], "both times are constants"
    np.testing.assert_allclose(session.run(None, {"noise_0": noise})[0], wanted.numpy(), atol=1e-5)


def test_r_is_the_next_time_of_the_ode_and_zero_where_noise_is_added(model: ConsistencyModel) -> None:
    times = flow_times(SIGMAS)
    assert model.spec(times=times, renoise="ode").targets == (*times[1:], 0.0)
    assert model.spec(times=times).targets == (0.0,) * 4 == model.spec(times=times, renoise="same").targets
    x, t = torch.randn(2, 6), torch.tensor([0.7])
    u = model.get_submodule("network.denoiser.module")
    sigma = math.sin(0.7) / (math.sin(0.7) + math.cos(0.7))
    state = x / (math.sin(0.7) + math.cos(0.7))
    with torch.no_grad():
        wanted = state - sigma * u(state, torch.full((2,), sigma), torch.zeros(2))
        torch.testing.assert_close(model(x, t), wanted, atol=2e-6, rtol=1e-5)


def test_the_checks_of_a_network_know_r(model: ConsistencyModel) -> None:
    check_network(model)


def test_a_flow_map_must_take_r(tmp_path: Path) -> None:
    class NoTarget(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    wrong = ConsistencyModel(network=NoTarget(), sample_shape=(6,), flow_map=True).eval()
    with pytest.raises(ExportError, match=r"NoTarget fails on an example.*'r'"):
        export_samplers(wrong, [wrong.spec(1)], tmp_path)


def any_flow(folder: Path) -> Any:
    from scm_sdk.model.foreign.few_step import load_few_step
    from scm_sdk.model.foreign.few_step_folder import Settings

    return load_few_step(folder, Settings(max_sequence_length=TOKENS, **SIZES["AnyFlowPipeline"]))


def test_each_step_of_any_flow_is_that_of_diffusers(
    flow_folders: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    """Step for step against ``FlowMapEulerDiscreteScheduler``, then the frames against the pipeline's own call."""
    pytest.importorskip("diffusers")
    pipeline, steps = make_pipeline("AnyFlowPipeline"), STEPS["AnyFlowPipeline"]
    model = any_flow(flow_folders("AnyFlowPipeline"))
    spec = model.spec(steps)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    levels = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in spec.times]
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy()[:-1], rtol=1e-12)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *spec.sample_shape)).astype(np.float32))
    embeds = torch.from_numpy(draw_prompts(8))
    with torch.no_grad():
        estimates = Sampler(model, spec).eval().estimates(noise, embeds)
        frames = Sampler(model, spec).eval()(noise, embeds)
        x = noise
        for i, t in enumerate(scheduler.timesteps):
            times = {"timestep": t, "r_timestep": scheduler.sigmas[i + 1] * 1000}
            given = {name: time.expand(2, spec.sample_shape[1]).float() for name, time in times.items()}
            v = pipeline.transformer(
                hidden_states=x.transpose(1, 2), encoder_hidden_states=embeds, return_dict=False, **given
            )[0].transpose(1, 2)
            torch.testing.assert_close(estimates[i], x - levels[i] * v, atol=1e-5, rtol=0)
            x = scheduler.step(v, t, x, return_dict=False)[0].float()
        wanted = frames_of_any_flow({"noise_0": noise.numpy(), "prompt_embeds": embeds.numpy()}, steps)
    found = np.moveaxis((frames.numpy() / 2 + 0.5).clip(0, 1), 1, -1)
    record_property("difference", float(np.abs(found - wanted).max()))
    assert np.abs(found - wanted).max() <= 1e-5 and wanted.std() > 0.05


@pytest.mark.slow
def test_the_graph_of_any_flow_gives_the_frames_of_diffusers(
    flow_folders: Callable[[str], Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = any_flow(flow_folders("AnyFlowPipeline"))
    spec = model.spec(2)
    noise = np.random.default_rng(0).standard_normal((2, *spec.sample_shape)).astype(np.float32)
    (graph,) = export_samplers(model, [spec], tmp_path)
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    feeds = {"noise_0": noise, "prompt_embeds": draw_prompts(8)}
    (found,) = session.run(None, feeds)
    wanted = frames_of_any_flow(feeds, 2)
    gap = np.abs(np.moveaxis((found / 2 + 0.5).clip(0, 1), 1, -1) - wanted).max()
    record_property("difference", float(gap))
    assert gap <= 1e-4
