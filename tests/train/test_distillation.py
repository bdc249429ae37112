"""Distillation without a tangent: in discrete time, and onto the ends of the teacher's trajectories."""

import pytest
import torch
from torch import nn

from scm_sdk.errors import ConfigError
from scm_sdk.model.networks.presets import tiny
from scm_sdk.model.trigflow import add_noise, expand_time
from scm_sdk.train.config import TrainConfig
from scm_sdk.train.objectives.base import Batch, LogVariance
from scm_sdk.train.objectives.discrete import MIN_TIME, Anchor, DiscreteDraw, discrete_loss, teacher_step
from scm_sdk.train.objectives.trajectory import Trajectories, trajectory_loss

SIGMA, MEAN, SPREAD = 0.5, 0.3, 0.2


def spread_at(t):
    return torch.sqrt(torch.cos(t) ** 2 * SPREAD**2 + torch.sin(t) ** 2 * SIGMA**2)


class Denoiser(nn.Module):
    """The exact diffusion model of N(MEAN, SPREAD^2)."""

    def forward(self, x, t, class_labels=None):
        t = expand_time(t, x)
        cos, sin, x_t = torch.cos(t), torch.sin(t), x * SIGMA
        x_0 = MEAN + cos * SPREAD**2 / spread_at(t) ** 2 * (x_t - cos * MEAN)
        return (cos * x_t - x_0) / (sin * SIGMA)


class Endpoint(nn.Module):
    """Its exact consistency function, wrong by a factor that grows with time and can be learned."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t, class_labels=None):
        t = expand_time(t, x)
        x_t = x * SIGMA
        x_0 = MEAN + torch.exp(self.error * t) * SPREAD / spread_at(t) * (x_t - torch.cos(t) * MEAN)
        return (torch.cos(t) * x_t - x_0) / (torch.sin(t) * SIGMA)


def batch(t: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x_0 = MEAN + SPREAD * torch.randn(len(t), 1, 4, 4, generator=generator, dtype=torch.float64)
    z = SIGMA * torch.randn(len(t), 1, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(x_0=x_0, z=z, t=t, class_labels=None)


TIMES = torch.tensor([0.2, 0.5, 0.9, 1.3, 1.55], dtype=torch.float64)


def test_a_step_follows_the_trajectory_to_the_third_order() -> None:
    b = batch(TIMES)
    x_t = add_noise(b.x_0, b.z, b.t)

    def error(length: float) -> torch.Tensor:
        s = b.t - length
        exact = torch.cos(s).view(-1, 1, 1, 1) * MEAN + (spread_at(s) / spread_at(b.t)).view(-1, 1, 1, 1) * (
            x_t - torch.cos(b.t).view(-1, 1, 1, 1) * MEAN
        )
        return (teacher_step(Denoiser(), x_t, b.t, s, sigma_data=SIGMA)[0] - exact).abs().amax(dim=(1, 2, 3))

    ratio = error(0.02) / error(0.01)
    assert ((ratio > 6.5) & (ratio < 9.5)).all(), ratio


def test_the_consistency_function_is_the_fixed_point() -> None:
    b, step = batch(TIMES), torch.full((5,), 0.02, dtype=torch.float64)

    def residual(error: float) -> float:
        return float(discrete_loss(Endpoint(error), Denoiser(), None, b, step, sigma_data=SIGMA)[1])

    assert residual(0.0) < 1e-8
    assert residual(0.2) > 1e3 * residual(0.0)


def test_the_loss_moves_a_student_to_it() -> None:
    student = Endpoint(0.3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    step = torch.full((5,), 0.15, dtype=torch.float64)
    for _ in range(100):
        optimizer.zero_grad()
        discrete_loss(student, Denoiser(), None, batch(TIMES), step, sigma_data=SIGMA)[0].backward()
        optimizer.step()
    assert abs(student.error.item()) < 0.05


def test_below_the_least_time_the_teacher_is_followed() -> None:
    """A student that continues from its own errors there drifts, and all larger times with it."""
    b = batch(torch.full((5,), MIN_TIME / 2, dtype=torch.float64))

    def loss(network: nn.Module) -> float:
        step = torch.full((5,), 0.4, dtype=torch.float64)
        return float(discrete_loss(network, Denoiser(), None, b, step, sigma_data=SIGMA)[1])

    assert loss(Denoiser()) < 1e-20
    assert loss(Endpoint(3.0)) > 1e-3


def run(**changes) -> TrainConfig:
    base = {"objective": "cd", "teacher": "runs/teacher", "network": tiny(num_classes=3), "batch_size": 8}
    return TrainConfig.from_settings({**base, **changes})


def test_a_draw_is_a_function_of_seed_and_iteration() -> None:
    config, shape = run(discrete_step=0.3, anchor_weight=1.0), torch.Size((8, 1, 8, 8))
    one, same, other = (DiscreteDraw.of(config, shape, i) for i in (5, 5, 6))
    assert torch.equal(one.step, same.step) and torch.equal(one.z, same.z) and torch.equal(one.t, same.t)
    assert not torch.equal(one.step, other.step) and not torch.equal(one.z, other.z)
    assert one.step.min() >= 0.1 and one.step.max() <= 0.3


def test_the_anchor_is_the_diffusion_loss_of_the_data() -> None:
    config = run(anchor_weight=1.0, anchor_p_mean=0.0)
    anchor, labels = Anchor(config, None), None
    x_0 = torch.full((8, 1, 4, 4), MEAN)
    draw = DiscreteDraw.of(config, x_0.shape, 0)
    b = Batch(x_0=x_0, z=torch.zeros_like(x_0), t=torch.ones(8), class_labels=labels)

    def exact(x, t, class_labels=None):
        t = expand_time(t, x)
        return (torch.cos(t) * x * SIGMA - MEAN) / (torch.sin(t) * SIGMA)

    assert float(anchor(exact, b, draw).detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(anchor(lambda x, t, _=None: exact(x, t) + 1, b, draw).detach()) == pytest.approx(SIGMA**2, rel=1e-3)
    assert isinstance(anchor.logvar, LogVariance)


def trajectories(**changes) -> Trajectories:
    return Trajectories(run(objective="trajectory", **changes), Denoiser(), (1, 4, 4), 3)


def test_the_exact_consistency_function_has_no_loss_at_any_point_of_a_trajectory() -> None:
    points = trajectories(trajectory_steps=60, batch_size=64)(0)

    def loss(error: float, huber: float = 0.0) -> float:
        return float(trajectory_loss(Endpoint(error), None, points, sigma_data=SIGMA, huber=huber)[1])

    assert loss(0.0) < 1e-6  # what the solver's steps leave
    assert loss(0.2) > 1e3 * loss(0.0)


@pytest.mark.parametrize("huber", [0.0, 0.03])
def test_the_loss_of_the_ends_moves_a_student_to_it(huber: float) -> None:
    errors = []
    for seed in range(3):
        student, source, logvar = Endpoint(0.3), trajectories(trajectory_steps=40, seed=seed), LogVariance()
        optimizer = torch.optim.Adam([student.error, *logvar.parameters()], lr=0.02)
        for iteration in range(50):
            optimizer.zero_grad()
            trajectory_loss(student, logvar, source(iteration), sigma_data=SIGMA, huber=huber)[0].backward()
            optimizer.step()
            if iteration >= 20:
                errors.append(abs(student.error.item()))
    assert sum(errors) / len(errors) < 0.3 / 4, "a quarter of the error that it started with"


def test_points_are_a_function_of_seed_and_iteration_and_every_state_comes_once() -> None:
    one, other = trajectories(trajectory_steps=4), trajectories(trajectory_steps=4)
    other(2000)  # another block
    for iteration in (5, 511, 512):
        a, b = one(iteration), other(iteration)
        assert torch.equal(a.x_t, b.x_t) and torch.equal(a.end, b.end) and torch.equal(a.t, b.t)
        assert torch.equal(a.class_labels, b.class_labels) and a.class_labels.unique().tolist() == [0, 1, 2]
    block = torch.cat([one(iteration).x_t.flatten(1) for iteration in range(512)])
    assert len(block.unique(dim=0)) == len(block) == 512 * 8


def test_a_trajectory_begins_where_the_sampler_does_and_blocks_move_the_times_between() -> None:
    source = trajectories(trajectory_steps=12)
    first, moved = source.times(0.0), source.times(0.7)
    assert first[0] == moved[0] == pytest.approx(1.5645465, abs=1e-6) and first[-1] == moved[-1] == 0
    assert all(a < b for a, b in zip(first[1:-1], moved[1:-1], strict=True))
    assert all(b < a for a, b in zip(first[:-2], moved[1:-1], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "", "init_from": "x"}, "scd, cd, trajectory distill a teacher"),
        ({"discrete_step": 0.0}, "discrete_step is 0.0, expected more than 0"),
        ({"objective": "trajectory", "trajectory_steps": 0}, r"trajectory\.steps is 0, expected 1 or more"),
        ({"objective": "trajectory", "huber": -0.1}, "huber is -0.1, expected 0 or more"),
        ({"objective": "trajectory", "stable_targets": True}, "'trajectory' follows its teacher's"),
        ({"anchor_weight": -1.0}, r"anchor\.weight is -1\.0, expected 0 or more"),
        ({"objective": "scd", "anchor_weight": 1.0}, "it goes with 'cd'"),
    ],
)
def test_impossible_settings_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run().with_settings(changes)
        run(**changes)
