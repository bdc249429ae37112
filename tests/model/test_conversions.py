"""Every source convention against a denoiser that is known exactly: a mixture of Gaussians.

For x' = a x_0 + b eps the posterior means of x_0 and of eps are closed forms, so the output of a
perfect model of any convention is written down from that convention's own definition, in its own
time, and must turn into the same TrigFlow F.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.model.conversions import CONVENTIONS, Convention, trigflow_state, trigflow_time

NAMES = sorted(CONVENTIONS)
DIM = 3
angles = st.floats(0.01, 1.56)
sigmas = st.floats(0.2, 3.0)
seeds = st.integers(0, 10**6)


def posterior(x: Tensor, a: float, b: float, scale: float) -> tuple[Tensor, Tensor]:
    """E[x_0 | x] and E[eps | x] for x = a x_0 + b eps, (B, DIM) float64; the data has size ``scale``."""
    gen = torch.Generator().manual_seed(7)
    means = scale * torch.randn(4, DIM, generator=gen, dtype=torch.float64)
    stds = scale * torch.tensor([0.3, 0.6, 0.9, 0.2], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    variance = (a * stds) ** 2 + b**2
    gap = x[:, None] - a * means
    logits = weights.log() - DIM / 2 * variance.log() - (gap**2).sum(-1) / (2 * variance)
    share = logits.softmax(dim=1)[..., None]
    x_0 = (share * (means + (a * stds**2 / variance)[:, None] * gap)).sum(1)
    eps = (share * (b / variance)[:, None] * gap).sum(1)
    return x_0, eps


def true_F(x_t: Tensor, t: float, sd: float) -> Tensor:
    """TrigFlow's own target: E[cos(t) z - sin(t) x_0 | x_t] / sigma_data."""
    x_0, eps = posterior(x_t, math.cos(t), sd * math.sin(t), sd)
    return math.cos(t) * eps - math.sin(t) * x_0 / sd


# Each model: (its input, its own time, sigma_data) -> its output, from its own definition alone.


def edm_denoiser(x: Tensor, sigma: float, sd: float) -> Tensor:
    return posterior(x, 1.0, sigma, sd)[0]


def edm_network(x_in: Tensor, c_noise: float, sd: float) -> Tensor:
    sigma = math.exp(4 * c_noise)
    total = math.hypot(sigma, sd)  # c_in = 1 / total
    denoised = posterior(x_in * total, 1.0, sigma, sd)[0]
    return (denoised - (sd / total) ** 2 * x_in * total) / (sigma * sd / total)


def flow(x: Tensor, u: float, sd: float) -> Tensor:
    x_0, eps = posterior(x, 1 - u, u, sd)
    return eps - x_0


def sana(x: Tensor, u: float, sd: float) -> Tensor:
    latent, eps = posterior(x, 1 - u, u, 1.0)  # trained on x_0 / sigma_data
    return eps - latent


def vp_noise(x: Tensor, alpha: float, sd: float) -> Tensor:
    return posterior(x, alpha, math.sqrt((1 - alpha) * (1 + alpha)), sd)[1]


def vp_velocity(x: Tensor, alpha: float, sd: float) -> Tensor:
    noise = math.sqrt((1 - alpha) * (1 + alpha))
    x_0, eps = posterior(x, alpha, noise, sd)
    return alpha * eps - noise * x_0


MODELS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "edm_denoiser": edm_denoiser,
    "edm_network": edm_network,
    "flow": flow,
    "sana": sana,
    "vp_noise": vp_noise,
    "vp_velocity": vp_velocity,
}


def state(seed: int, t: float, sd: float) -> tuple[Tensor, Tensor]:
    """Four TrigFlow states of plausible size, and their one time."""
    x_t = sd * torch.randn(4, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x_t, torch.tensor([t], dtype=torch.float64)


def tolerance(name: str, t: float, sd: float) -> float:
    """1e-12, but where the time itself cannot carry it.

    alpha near 1 (and the exponent of c_noise) hold sigma to few digits: d sigma / sigma = rounding / sigma^2.
    """
    if name.startswith("vp"):
        return 1e-12 * max(1, 1e-2 / (sd * math.sin(t)) ** 2, 1e-2 / math.cos(t))
    return 1e-12 * max(1, 0.1 / math.sin(t) if name == "edm_denoiser" else 1)


def test_every_convention_has_a_model() -> None:
    assert sorted(MODELS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@given(seeds, angles, sigmas)
@settings(max_examples=60, deadline=None)
def test_a_perfect_model_becomes_the_perfect_F(name: str, seed: int, t: float, sd: float) -> None:
    convention, (x_t, time) = CONVENTIONS[name], state(seed, t, sd)
    source_time = convention.time(time, sd).item()
    output = MODELS[name](convention.model_input(x_t, time, sd), source_time, sd)
    found, expected = convention.to_trigflow(x_t, output, time, sd), true_F(x_t, t, sd)
    scale = 1 + expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=scale * tolerance(name, t, sd))
    # And back: a perfect TrigFlow network serves the source's own sampler.
    back = convention.from_trigflow(x_t, expected, time, sd)
    scale = 1 + output.abs().max().item()
    torch.testing.assert_close(back, output, rtol=0, atol=scale * tolerance(name, t, sd))


@pytest.mark.parametrize("name", NAMES)
@given(seeds, angles, sigmas)
@settings(max_examples=40, deadline=None)
def test_round_trips(name: str, seed: int, t: float, sd: float) -> None:
    convention, (x_t, time) = CONVENTIONS[name], state(seed, t, sd)
    F = torch.randn(4, DIM, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    again = convention.to_trigflow(x_t, convention.from_trigflow(x_t, F, time, sd), time, sd)
    torch.testing.assert_close(again, F, rtol=1e-12, atol=1e-12 * max(1, 0.1 / math.sin(t), 0.1 / math.cos(t)))
    back = convention.time_to_trigflow(convention.time(time, sd), sd)
    torch.testing.assert_close(back, time, rtol=0, atol=tolerance(name, t, sd))


@given(seeds, angles, sigmas, st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_any_process_maps_to_its_trigflow_state(seed: int, t: float, sd: float, gain: float) -> None:
    x_t, time = state(seed, t, sd)
    a, b = gain * time.cos(), gain * sd * time.sin()
    torch.testing.assert_close(trigflow_time(a, b, sd), time, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trigflow_state(gain * x_t, a, b, sd), x_t, rtol=1e-12, atol=1e-12)


@given(seeds, angles, sigmas)
@settings(max_examples=40, deadline=None)
def test_known_special_cases(seed: int, t: float, sd: float) -> None:
    """The printed formulas of the papers, where ours are simplified forms of them."""
    x_t, time = state(seed, t, sd)
    v = torch.randn(4, DIM, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    torch.testing.assert_close(CONVENTIONS["vp_velocity"].to_trigflow(x_t, v, time, 1.0), v, rtol=1e-12, atol=1e-12)
    # SANA-Sprint's scheduler.
    u = math.sin(t) / (math.cos(t) + math.sin(t))
    root = math.hypot(u, 1 - u)
    latent = x_t / sd * root
    printed = ((1 - 2 * u) * latent + (1 - 2 * u + 2 * u**2) * v) / root
    sana_convention = CONVENTIONS["sana"]
    torch.testing.assert_close(sana_convention.model_input(x_t, time, sd), latent, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sana_convention.to_trigflow(x_t, v, time, sd), printed, rtol=1e-12, atol=1e-12)
    # EDM's scaling around its raw network: D = c_skip x + c_out F_edm(c_in x).
    sigma = sd * math.tan(t)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.hypot(sigma, sd)
    denoised = c_skip * CONVENTIONS["edm_denoiser"].model_input(x_t, time, sd) + c_out * v
    F = CONVENTIONS["edm_denoiser"].to_trigflow(x_t, denoised, time, sd)
    torch.testing.assert_close(F, CONVENTIONS["edm_network"].to_trigflow(x_t, v, time, sd), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [0.0, 1e-30, 1e-8, math.pi / 2 - 1e-9, math.pi / 2, 1.57080])
@pytest.mark.parametrize("name", NAMES)
def test_finite_at_both_ends(name: str, t: float, dtype: torch.dtype) -> None:
    convention, time = CONVENTIONS[name], torch.tensor([t], dtype=dtype)
    x_t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in (
        convention.time(time, 0.5),
        convention.model_input(x_t, time, 0.5),
        convention.to_trigflow(x_t, x_t / 3, time, 0.5) if (name, t) != ("edm_denoiser", 1e-30) else x_t,
        convention.from_trigflow(x_t, x_t / 3, time, 0.5),
    ):
        assert value.dtype == dtype and value.isfinite().all()


@given(seeds, sigmas, st.sampled_from(["edm_network", "flow", "sana", "vp_noise", "vp_velocity"]))
@settings(max_examples=40, deadline=None)
def test_exact_at_time_zero(seed: int, sd: float, name: str) -> None:
    """At t = 0 the state is data: E[eps] = 0, so F = 0, and the closed forms get there without 0/0."""
    convention, (x_0, time) = CONVENTIONS[name], state(seed, 0.0, sd)
    if name == "edm_network":
        output = torch.zeros_like(x_0)
    else:
        output = MODELS[name](convention.model_input(x_0, time, sd), convention.time(time, sd).item(), sd)
    found = convention.to_trigflow(x_0, output, time, sd)
    torch.testing.assert_close(found, torch.zeros_like(x_0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["flow", "sana", "vp_velocity"])
def test_exact_at_pure_noise(name: str) -> None:
    """At t = pi/2 F is minus the mean of the data over sigma_data, also for outputs that hide x_0."""
    convention, sd = CONVENTIONS[name], 0.7
    x_t, time = state(3, math.pi / 2, sd)
    output = MODELS[name](convention.model_input(x_t, time, sd), convention.time(time, sd).item(), sd)
    found = convention.to_trigflow(x_t, output, time, sd)
    torch.testing.assert_close(found, true_F(x_t, math.pi / 2, sd), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_network_is_differentiable_in_time(name: str) -> None:
    """The JVP that trains a consistency model passes through a wrapped teacher."""
    convention, sd = CONVENTIONS[name], 0.5
    x_t, time = state(5, 0.9, sd)
    weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def wrapped(t: Tensor) -> Tensor:
        source = convention.model_input(x_t, t, sd) * convention.time(t, sd).reshape(-1, 1)
        return convention.to_trigflow(x_t, torch.tanh(source @ weight), t, sd)

    tangent = torch.func.jvp(wrapped, (time,), (torch.ones_like(time),))[1]
    step = 1e-5
    numeric = (wrapped(time + step) - wrapped(time - step)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments(name: str) -> None:
    convention: Convention = CONVENTIONS[name]
    x_t = torch.zeros(4, 2)
    if name != "edm_network":  # its output needs neither t nor sigma_data
        with pytest.raises(ShapeError, match=r"t has shape \(3,\), expected \(4,\)"):
            convention.to_trigflow(x_t, x_t, torch.ones(3), 0.5)
    if name != "sana":  # its time does not depend on sigma_data
        with pytest.raises(ConfigError, match=r"sigma_data is 0\.0, expected a number greater than 0"):
            convention.time(torch.ones(4), 0.0)
    with pytest.raises(ConfigError, match=r"sigma_data is -1\.0"):
        trigflow_time(x_t[:, 0], x_t[:, 0], -1.0)
