"""The paper's runs by name: tables 4 and 5 as they are printed, and the command line in front of them."""

import json

import pytest
import torch
from click.testing import CliRunner

from scm_sdk.errors import ConfigError
from scm_sdk.export.cli import main
from scm_sdk.model.networks.conditioning import PositionalEmbedding
from scm_sdk.train.config import TrainConfig
from scm_sdk.train.recipes import RECIPES, recipe

# name: iterations, learning rate, dropout, P_mean, P_std, the average's width
TABLES = {
    "imagenet64-s-teacher": (1_048_000, 1e-2, 0.0, -0.8, 1.6, 0.075),
    "imagenet64-xl-teacher": (540_000, 7e-3, 0.1, -0.8, 1.6, 0.04),
    "imagenet64-m-sct": (400_000, 9e-5, 0.45, -1.0, 1.6, 0.05),
    "imagenet64-l-scd": (400_000, 8e-5, 0.0, -1.0, 1.6, 0.05),
    "imagenet512-m-teacher": (1_048_000, 9e-3, 0.1, -0.4, 1.0, 0.03),
    "imagenet512-xxl-teacher": (376_000, 6.5e-3, 0.1, -0.4, 1.0, 0.015),
    "imagenet512-s-sct": (100_000, 1e-4, 0.25, -0.8, 1.6, 0.05),
    "imagenet512-xl-sct": (100_000, 7e-5, 0.35, -0.8, 1.6, 0.05),
    "imagenet512-s-scd": (200_000, 1e-4, 0.0, -0.8, 1.6, 0.05),
    "imagenet512-xxl-scd": (200_000, 6.5e-5, 0.1, -0.8, 1.6, 0.05),
    "imagenet512-m-scd-vsd": (20_000, 9e-5, 0.1, -0.8, 1.6, 0.05),
}


@pytest.mark.parametrize("name", TABLES)
def test_edm2_recipes_are_the_tables(name):
    c = recipe(name)
    its, tangent = c.optimizer, c.tangent
    found = (c.num_iterations, its.learning_rate, c.dropout, c.noise.p_mean, c.noise.p_std, c.averages.sigma_rel)
    assert found == pytest.approx(TABLES[name])
    latents = "512" in name
    assert (c.batch_size, its.betas, its.epsilon, its.name) == (2048, (0.9, 0.99), 1e-11, "adam")
    assert (its.schedule, its.decay_reference) == ("inverse_sqrt", 70_000 if latents else 35_000)
    assert (tangent.norm, tangent.c, tangent.warmup_iterations) == ("l2", 0.1, 10_000)
    assert (its.grad_clip, c.precision) == (0.0, "fp16")
    assert c.network is not None and c.network.dropout == c.dropout
    assert c.label_dropout == (0.1 if latents and "teacher" in name else 0.0)
    guided = latents and "scd" in name
    assert c.guidance == ((1.0, 2.0) if guided else (1.0, 1.0)) and c.network.guidance == guided
    assert c.network.dropout_resolution == (0 if "teacher" in name else 16)


@pytest.mark.parametrize(
    ("kind", "optimizer", "rate", "betas", "dropout", "p"),
    [
        ("teacher", "adam", 1e-3, (0.9, 0.999), 0.13, (-1.2, 1.2)),
        ("sct", "radam", 1e-4, (0.9, 0.99), 0.2, (-1.0, 1.4)),
        ("scd", "radam", 1e-4, (0.9, 0.99), 0.0, (-1.0, 1.4)),
    ],
)
def test_cifar10_recipes_are_the_tables(kind, optimizer, rate, betas, dropout, p):
    c = recipe(f"cifar10-{kind}")
    its = c.optimizer
    assert (its.name, its.learning_rate, its.betas, c.dropout, (c.noise.p_mean, c.noise.p_std)) == (
        optimizer, rate, betas, dropout, p
    )  # fmt: skip
    assert (c.batch_size, its.epsilon, c.averages.halflife, c.num_iterations) == (512, 1e-8, 500_000, 400_000)
    if kind != "teacher":
        assert c.learning_rate_at(0) == c.learning_rate_at(399_999) == 1e-4


def test_every_recipe_is_a_run_and_students_find_their_teachers():
    assert len(RECIPES) == 3 + 4 * 3 + 5 * 4
    for name in RECIPES:
        c = recipe(name)
        assert TrainConfig.from_json(c.to_json()) == c
        before = name.rsplit("-teacher")[0].rsplit("-sct")[0].rsplit("-scd")[0]
        if not name.endswith("teacher"):
            assert f"runs/{before}-teacher" in (c.teacher, c.init_from)
    assert recipe("imagenet512-l-scd-vsd").init_from == "runs/imagenet512-l-scd"
    with pytest.raises(ConfigError, match=r"recipe is 'cifar100', .* cifar10-\{teacher,sct,scd\}"):
        recipe("cifar100")


def dry(*arguments):
    result = CliRunner().invoke(main, [*arguments, "-o", "run", "--dry-run"])
    return result, json.loads(result.stdout) if result.exit_code == 0 else None


def test_a_dry_run_prints_the_recipe_with_what_was_given_in_its_place():
    _, printed = dry("distill", "--recipe", "cifar10-scd")
    assert TrainConfig.from_json(json.dumps(printed)) == recipe("cifar10-scd")
    _, printed = dry("distill", "--recipe", "imagenet512-s-scd", "--lr", "0.5", "--data", "mine", "--guidance", "1.5")
    assert printed["optimizer"]["learning_rate"] == 0.5
    assert (printed["data"]["source"], printed["data"]["label"]) == ("mine", "folder")
    assert (printed["guidance"], printed["network"]["guidance"]) == ([1.5, 1.5], False)
    assert printed["num_iterations"] == 200_000
    _, printed = dry("train", "--recipe", "cifar10-teacher", "--no-double-norm", "--ema-profile", "0.1")
    assert printed["network"]["double_norm"] is False and printed["averages"]["profiles"] == [0.1]
    _, printed = dry("train", "--recipe", "cifar10-teacher", "--time-fourier-scale", "16")
    assert printed["network"]["time_fourier_scale"] == 16 and printed["network"]["double_norm"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "--recipe", "cifar10-teacher"), "'diffusion'. Use it with: scm-export train"),
        (("train", "--recipe", "cifar10-sct"), "'sct'. Use it with: scm-export distill"),
        (
            ("distill", "--recipe", "cifar10-scd", "--guidance", "2", "--guidance-range", "1", "2"),
            "expected one of them",
        ),
        (("distill", "--recipe", "cifar10-scd", "--vsd-only"), "--vsd-only"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    result, _ = dry(*arguments)
    assert result.exit_code == 2 and message in result.output


def test_every_stabilizer_can_be_switched_off_from_the_command_line():
    _, printed = dry(
        "distill", "--recipe", "cifar10-scd", "--no-tangent-normalization", "--no-adaptive-weighting",
        "--tangent-warmup", "0", "--tangent", "fd", "--precision", "bf16",
    )  # fmt: skip
    tangent = printed["tangent"]
    assert [tangent[name] for name in ("normalize", "warmup_iterations", "mode")] == [False, 0, "fd"]
    assert [printed[name] for name in ("adaptive_weighting", "precision")] == [False, "bf16"]
    _, printed = dry("distill", "--recipe", "cifar10-scd", "--tangent-norm", "clamp", "--discrete-points", "1024")
    assert (printed["tangent"]["norm"], printed["tangent"]["discrete_points"]) == ("clamp", 1024)


def test_fourier_features_make_the_derivative_grow_as_the_paper_says():
    """The tangent carries sin(t) cos(t) d(embedding)/dt: what is below 1 for sinusoids is near 100 at scale 16."""

    def size(scale):
        embedding, t = PositionalEmbedding(64, fourier_scale=scale), torch.tensor([0.8], dtype=torch.float64)
        return float(torch.func.jvp(embedding, (t,), (torch.ones_like(t),))[1].square().mean().sqrt())

    assert size(0.0) < 1 and 0.25 < size(0.02) / size(0.0) < 4 and 50 < size(16.0) < 100
