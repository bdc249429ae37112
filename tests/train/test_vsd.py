"""Variational score distillation: where it pushes, what it resumes, what it refuses."""

import msgspec
import pytest
import torch
from torch import nn

from scm_sdk.errors import ConfigError
from scm_sdk.model.networks.presets import tiny
from scm_sdk.model.trigflow import add_noise, expand_time, predict_data
from scm_sdk.spec import default_times
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.data.images import load_data
from scm_sdk.train.objectives.base import Batch
from scm_sdk.train.objectives.stable_target import StableTarget
from scm_sdk.train.objectives.vsd import Vsd, VsdDraw, exact_score, teacher_score

SIGMA = 0.5


def run(**changes) -> TrainConfig:
    base = {"objective": "vsd", "network": tiny(), "batch_size": 64, "num_iterations": 1000, "stable_targets": True}
    base |= {"learning_rate": 0.03, "warmup_iterations": 0, "decay_fraction": 0.5}
    return TrainConfig.from_settings({**base, **changes})


class Gaussian(nn.Module):
    """The exact diffusion model of N(mean, 0.2^2), with a mean that can be learned."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean, self.s = nn.Parameter(torch.tensor(mean)), 0.2

    def forward(self, x, t, class_labels=None):
        t = expand_time(t, x)
        cos, sin, x_t = torch.cos(t), torch.sin(t), x * SIGMA
        gain = cos * self.s**2 / (cos**2 * self.s**2 + sin**2 * SIGMA**2)
        x_0 = self.mean + gain * (x_t - cos * self.mean)
        return (cos * x_t - x_0) / (sin * SIGMA)


class Shift(nn.Module):
    """A student that makes N(mean, 0.2^2) of noise, whatever the time."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x, t, class_labels=None):
        t = expand_time(t, x)
        return (torch.cos(t) * x * SIGMA - (self.mean + 0.4 * SIGMA * x)) / (torch.sin(t) * SIGMA)


def batch(size: int = 64) -> Batch:
    zeros = torch.zeros(size, 1, 2, 2)
    return Batch(x_0=zeros, z=zeros, t=torch.zeros(size), class_labels=None)


WEIGHTINGS = pytest.mark.parametrize("weighting", ["learned", "error"])


def gradient(plan: TrainConfig, *, student: float, data: float, iteration: int) -> float:
    """Return the gradient of the student's mean where the fake score knows what the student makes."""
    module = Shift(student)
    vsd = Vsd(plan, Gaussian(student), teacher_score(Gaussian(data), sigma_data=SIGMA))
    vsd(module, batch(), iteration)[0].backward()
    assert module.mean.grad is not None
    return module.mean.grad.item()


@WEIGHTINGS
def test_a_student_that_makes_the_data_is_not_pushed(weighting: str) -> None:
    plan = run(vsd_weighting=weighting, learning_rate=1e-12)
    assert [gradient(plan, student=-0.5, data=-0.5, iteration=i) for i in range(20)] == [0.0] * 20


@WEIGHTINGS
def test_a_student_is_pushed_to_the_data_from_either_side(weighting: str) -> None:
    plan = run(vsd_weighting=weighting, learning_rate=1e-12)
    for mean in (-2.0, -0.6, -0.4, 0.0, 0.8):
        pushes = [gradient(plan, student=mean, data=-0.5, iteration=i) for i in range(20)]
        assert all(push * (mean + 0.5) > 0 for push in pushes), (mean, pushes)


def test_the_fake_score_learns_what_the_student_makes() -> None:
    """The student does not move, so this is a plain regression that ends where it should."""
    vsd = Vsd(run(num_iterations=300), Gaussian(0.8), teacher_score(Gaussian(-0.5), sigma_data=SIGMA))
    for iteration in range(300):
        vsd(Shift(0.1), batch(), iteration)
    assert vsd.fake.mean.item() == pytest.approx(0.1, abs=0.05)


@WEIGHTINGS
def test_the_student_comes_nearer_to_the_data(weighting: str) -> None:
    """Only that: near the data the two chase each other, and the state of one run then depends on rounding alone."""
    distances = []
    for seed in range(4):
        student, plan = Shift(0.8), run(vsd_weighting=weighting, seed=seed, learning_rate=0.01)
        vsd = Vsd(plan, Gaussian(0.8), teacher_score(Gaussian(-0.5), sigma_data=SIGMA))
        optimizer = torch.optim.Adam([student.mean, *vsd.logvar.parameters()], lr=plan.optimizer.learning_rate)
        for iteration in range(200):
            optimizer.zero_grad()
            vsd(student, batch(), iteration)[0].backward()
            optimizer.step()
            if iteration >= 150:
                distances.append(abs(student.mean.item() + 0.5))
    assert sum(distances) / len(distances) < 1.3 / 2, "half the distance that it started at"


def drawn_and_made(student: nn.Module, plan: TrainConfig, vsd: Vsd) -> tuple[VsdDraw, torch.Tensor]:
    """Return what iteration 5 drew, and the samples that the student made of it in one step."""
    draw = VsdDraw.of(plan, batch().x_0.shape, 5)
    t = torch.full((64,), vsd._times[0])
    x_t = add_noise(torch.zeros_like(draw.z), draw.noises[0], t)
    return draw, predict_data(x_t, student(x_t / SIGMA, t), t, sigma_data=SIGMA).detach()


def test_the_gradient_is_the_papers() -> None:
    """d/dtheta = 2 e^w / D (F_real - F_fake) dg/dtheta, averaged over the batch; nothing flows through the scores."""
    student, plan = Shift(0.3), run(learning_rate=1e-12)
    vsd = Vsd(plan, Gaussian(0.1), teacher_score(Gaussian(-0.5), sigma_data=SIGMA))
    with torch.no_grad():
        vsd.logvar.linear.weight.normal_(std=0.6, generator=torch.Generator().manual_seed(0))
    loss, square = vsd(student, batch(), 5)
    loss.backward()
    draw, g = drawn_and_made(student, plan, vsd)
    noisy = add_noise(g, draw.z, draw.t) / SIGMA
    difference = (Gaussian(-0.5)(noisy, draw.t) - vsd.fake(noisy, draw.t)).detach()
    weight = torch.exp(-vsd.logvar(draw.t)).detach()
    assert weight.max() > 2 * weight.min()
    expected = 2 * (expand_time(weight, difference) * difference).mean().item()
    assert student.mean.grad == pytest.approx(expected, rel=1e-4), "dg/dmean is 1"
    assert square.item() == pytest.approx(difference.square().mean().item(), rel=1e-4)


def test_a_difference_may_be_weighted_by_the_teachers_error_on_the_sample() -> None:
    """Eq. 8 of DMD: estimates of the sample, the fake score's less the teacher's, over the teacher's mean error."""
    student, plan = Shift(0.3), run(learning_rate=1e-12, vsd_weighting="error")
    teacher, vsd = Gaussian(-0.5), Vsd(plan, Gaussian(0.1), teacher_score(Gaussian(-0.5), sigma_data=SIGMA))
    loss, square = vsd(student, batch(), 5)
    loss.backward()
    draw, g = drawn_and_made(student, plan, vsd)
    noisy = add_noise(g, draw.z, draw.t)
    theirs, fakes = (
        predict_data(noisy, F(noisy / SIGMA, draw.t), draw.t, sigma_data=SIGMA).detach() for F in (teacher, vsd.fake)
    )
    difference = (fakes - theirs) / (g - theirs).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert student.mean.grad == pytest.approx(2 * difference.mean().item(), rel=1e-4), "away from the fake's"
    assert square.item() == pytest.approx(difference.square().mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(square.item()), "nothing else is learned"


def test_it_looks_at_the_times_of_the_models_own_sampler() -> None:
    vsd = Vsd(run(vsd_steps=2, mid_time=0.6), Gaussian(0.0), teacher_score(Gaussian(0.0), sigma_data=SIGMA))
    assert vsd._times == default_times(2, sigma_data=SIGMA, mid_time=0.6)


def test_the_exact_score_of_one_picture_is_known(npz) -> None:
    data = load_data(DataConfig(source=str(npz), rows=(0, 1)))
    score = exact_score(StableTarget(data, sigma_data=SIGMA), sigma_data=SIGMA)
    x_0 = torch.randn(3, *data.images.shape[3:], *data.images.shape[1:3])
    noisy = Batch(x_0=x_0, z=torch.randn_like(x_0) * SIGMA, t=torch.tensor([0.3, 0.9, 1.5]), class_labels=None)
    x_t = add_noise(noisy.x_0, noisy.z, noisy.t)
    denoised = predict_data(x_t, score(noisy), noisy.t, sigma_data=SIGMA)
    wanted = torch.from_numpy(data.normalized([0])).expand_as(denoised)
    torch.testing.assert_close(denoised, wanted, atol=1e-5, rtol=0)


def test_each_sampler_step_is_trained_in_turn_through_its_own_call_only() -> None:
    calls: list[bool] = []

    def student(x, t, class_labels=None):
        calls.append(torch.is_grad_enabled())
        return x * torch.ones(1, requires_grad=True)

    vsd = Vsd(run(vsd_steps=2), Gaussian(0.0), teacher_score(Gaussian(0.0), sigma_data=SIGMA))
    vsd(student, batch(), 0)
    assert calls == [True]
    vsd(student, batch(), 1)
    assert calls == [True, False, True]


def test_only_the_fake_score_learns_during_its_warmup() -> None:
    student = Shift(0.8)
    vsd = Vsd(run(vsd_warmup=3), Gaussian(0.1), teacher_score(Gaussian(-0.5), sigma_data=SIGMA))
    before = vsd.fake.mean.item()
    vsd(student, batch(), 2)[0].backward()
    assert student.mean.grad is None and vsd.fake.mean.item() != before
    vsd(student, batch(), 3)[0].backward()
    assert student.mean.grad != 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stable_targets": False}, "VSD follows one score"),
        ({"teacher": "x"}, "VSD follows one score"),
        ({"objective": "diffusion", "vsd_weight": 1.0}, r"vsd\.weight is 1\.0 for a diffusion model"),
        ({"objective": "sct", "vsd_weight": -1.0}, r"vsd\.weight is -1\.0, expected 0 or more"),
        ({"vsd_steps": 0}, r"vsd\.steps is 0, expected 1 or more"),
    ],
)
def test_impossible_configs(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)
    assert msgspec.json.decode(run().to_json())["vsd"]["noise"] == {"p_mean": 0.4, "p_std": 2.0}
