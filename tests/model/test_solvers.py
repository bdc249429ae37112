"""The teacher's samplers against the EDM algorithms, and against a flow that is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scm_sdk._util.events import EventLines
from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.presets import tiny
from scm_sdk.model.solvers import VelocityFn, ddim_step, karras_times, sample_ode
from scm_sdk.train.data.samples import sample_teacher

Denoiser = Callable[[Tensor, float], Tensor]


def random_network(seed: int) -> VelocityFn:
    """A fixed smooth nonlinear F, float64; nothing about it is special."""
    gen = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(6, 6, generator=gen, dtype=torch.float64) / 2.5 for _ in range(3))

    def network(x: Tensor, t: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1)
        wave = torch.sin(2 * t)[:, None] * (flat @ c)
        out: Tensor = torch.tanh(flat @ a + t[:, None].cos()) @ b + wave
        return out.reshape(x.shape)

    return network


def edm_denoiser(network: VelocityFn, sigma_data: float) -> Denoiser:
    """D(x; sigma) of the TrigFlow network, from x = x_t / cos(t)."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = math.atan(sigma / sigma_data)
        x_t = math.cos(t) * x
        F = network(x_t / sigma_data, torch.full((len(x),), t, dtype=x.dtype))
        return math.cos(t) * x_t - math.sin(t) * sigma_data * F

    return denoise


def edm_sampler(denoise: Denoiser, noise: Tensor, sigmas: list[float], heun: bool) -> Tensor:
    """Algorithm 1 of arXiv 2206.00364 with S_churn = 0, written out again."""
    x = sigmas[0] * noise
    for now, after in pairwise(sigmas):
        d = (x - denoise(x, now)) / now
        guess = x + (after - now) * d
        if heun and after > 0:
            d = (d + (guess - denoise(guess, after)) / after) / 2
            guess = x + (after - now) * d
        x = guess
    return x


@given(st.integers(0, 10**6), st.floats(0.2, 2.0), st.sampled_from([1, 4, 5, 9, 18]), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_equals_the_edm_samplers(seed: int, sigma_data: float, num_steps: int, order: Any) -> None:
    # Not 2 or 3 steps: Heun's own slope from 80 to .002, divided by .002, leaves no 12 digits to compare.
    network = random_network(seed)
    noise = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = karras_times(num_steps, sigma_data)
    calls = 0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x / sigma_data, t)

    ours = sample_ode(velocity, noise, times, sigma_data=sigma_data, order=order)
    sigmas = [sigma_data * math.tan(t) for t in times]
    theirs = edm_sampler(edm_denoiser(network, sigma_data), noise, sigmas, heun=order == 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert calls == (num_steps if order == 1 else 2 * num_steps - 1)


def gaussian_velocity(std: float, sigma_data: float) -> VelocityFn:
    """F of data N(0, std^2): the posterior means are linear in x_t."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = t.cos()[:, None], t.sin()[:, None]
        return cos * sin * (sigma_data**2 - std**2) / (cos**2 * std**2 + sin**2 * sigma_data**2) * x / sigma_data

    return velocity


@pytest.mark.parametrize(("order", "rate"), [(1, 1.0), (2, 2.0)])
def test_order_of_convergence(order: Any, rate: float) -> None:
    """The exact flow keeps x_t / std(x_t); halving the step divides the error by 2^order."""
    std, sigma_data, end = 1.3, 0.5, 0.05
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = 1.4

    def spread(t: float) -> float:
        return math.hypot(math.cos(t) * std, math.sin(t) * sigma_data)

    # The last step to 0 is first order by construction; it is made with the exact flow instead.
    exact = noise * sigma_data * math.sin(start) * spread(end) / spread(start)
    errors = []
    for steps in (32, 64, 128, 256):
        times = [start + (end - start) * i / steps for i in range(steps + 1)]
        seen: list[Tensor] = []

        def velocity(x: Tensor, t: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return gaussian_velocity(std, sigma_data)(x, t)

        sample_ode(velocity, noise, [*times, 0.0], sigma_data=sigma_data, order=order)
        errors.append((seen[-1] - exact).abs().max().item())  # the last call sees x at time `end`
    rates = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(r - rate) < 0.15 for r in rates), (errors, rates)


@pytest.mark.parametrize(("order", "tolerance"), [(1, 5e-2), (2, 4e-3)])
def test_reaches_the_data_distribution(order: Any, tolerance: float) -> None:
    std, sigma_data = 0.3, 0.5
    noise = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    times = karras_times(80, sigma_data)
    ours = sample_ode(gaussian_velocity(std, sigma_data), noise, times, sigma_data=sigma_data, order=order)
    torch.testing.assert_close(ours, noise * std, rtol=tolerance, atol=0)


def test_one_step_with_the_true_velocity_is_exact() -> None:
    x_0, z = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s, sigma_data = 1.2, 0.7
    x_s, F = math.cos(s) * x_0 + math.sin(s) * z, (math.cos(s) * z - math.sin(s) * x_0) / sigma_data
    for t in (0.0, 0.4, 1.5):
        expected = math.cos(t) * x_0 + math.sin(t) * z
        torch.testing.assert_close(ddim_step(x_s, F, s, t, sigma_data=sigma_data), expected)


def test_karras_times_golden() -> None:
    times = karras_times(18, 0.5)
    assert len(times) == 19 and times[-1] == 0
    sigmas = [0.5 * math.tan(t) for t in times[:3]] + [0.5 * math.tan(t) for t in times[15:18]]
    # The formula in 40-digit decimals.
    golden = [80.0, 57.58598472124816, 40.78557379650796, 0.02293451837233337, 0.007528019962784071, 0.002]
    assert sigmas == pytest.approx(golden, rel=1e-11)
    assert all(s > t for s, t in pairwise(times))
    assert karras_times(1, 0.5) == (math.atan(160), 0.0)


def test_keeps_dtype_reports_progress_and_makes_no_graph() -> None:
    lines: list[str] = []
    weight = torch.ones(1, requires_grad=True)
    noise = torch.randn(2, 3, 4, 4)
    out = sample_ode(
        lambda x, t: weight * x,
        noise,
        karras_times(3, 0.5),
        sigma_data=0.5,
        events=EventLines(lines.append),
    )
    assert out.dtype == torch.float32 and out.shape == noise.shape and not out.requires_grad
    assert lines == ["1 of 3: steps", "2 of 3: steps", "3 of 3: steps"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"times": (1.5, 0.5)}, ConfigError, r"times are \(1.5, 0.5\), expected radians that fall strictly"),
        ({"times": (0.5, 1.0, 0.0)}, ConfigError, "karras_times"),
        ({"times": (0.0,)}, ConfigError, "fall strictly"),
        ({"times": (2.0, 0.0)}, ConfigError, "at most pi/2"),
        ({"times": (float("nan"), 0.0)}, ConfigError, "fall strictly"),
        (
            {"times": (math.pi / 2, 1.0, 0.0)},
            ConfigError,
            r"divides by cos\(t\). Start a little lower or use order=1",
        ),
        ({"order": 3}, ConfigError, r"order is 3, expected 1 \(DDIM\) or 2 \(2S\)"),
        ({"sigma_data": 0.0}, ConfigError, "sigma_data is 0.0, expected a number greater than 0"),
        ({"noise": torch.zeros(3)}, ShapeError, r"noise is \(3,\).*axis 0 is the batch"),
        ({"noise": torch.zeros(3, 2, dtype=torch.int64)}, ShapeError, "floating dtype"),
        ({"velocity_fn": lambda x, t: x[:1]}, ShapeError, r"returned \(1, 2\), expected \(3, 2\)"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {
        "velocity_fn": lambda x, t: x,
        "noise": torch.zeros(3, 2),
        "times": (1.0, 0.0),
        "sigma_data": 0.5,
        "order": 2,
    }
    with pytest.raises(error, match=text):
        sample_ode(**(arguments | change))


@pytest.mark.parametrize("change", [{"num_steps": 0}, {"sigma_data": 0}, {"sigma_min": 90.0}, {"rho": 0.0}])
def test_wrong_grid(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        arguments: dict[str, Any] = {"num_steps": 4, "sigma_data": 0.5}
        karras_times(**(arguments | change))


def test_the_teachers_sampler_starts_from_the_noise_that_it_is_told() -> None:
    """A network of zeros is the exact model of Gaussian data: its samples are sigma_data times the noise."""
    model = ConsistencyModel(ModelConfig(network=tiny(), sigma_data=0.5)).eval()
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = sample_teacher(model, noise, None, num_steps=40)
    torch.testing.assert_close(samples, 0.5 * noise, rtol=0.02, atol=0.02)
