"""Guidance: its formula, students that take the scale and students into which one is baked, what is refused."""

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from scm_sdk.errors import ConfigError, TrainError
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig, make_network
from scm_sdk.model.guidance import GuidedNetwork
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.config import OptimizerConfig, TrainConfig
from scm_sdk.train.data.images import ImageData
from scm_sdk.train.data.samples import sample_teacher, write_samples
from scm_sdk.train.loop import train
from scm_sdk.train.objectives.base import Batch
from scm_sdk.train.objectives.guidance import guided_teacher, require_guidable, sample_guidance, start_from
from scm_sdk.train.objectives.select import loss_function, make_vsd
from scm_sdk.train.objectives.trajectory import Trajectories
from scm_sdk.train.prepare import resolve

NETWORK = tiny(num_classes=3)


class Labeled(nn.Module):
    """F is a number for each label, and 10 without one; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.batches = torch.tensor([1.0, 2.0, 3.0, 10.0]), []

    def forward(self, x, t, class_labels=None):
        self.batches.append(len(x))
        if class_labels is None:
            class_labels = torch.full((len(x),), 3)
        return self.values[class_labels].view(-1, 1, 1, 1).expand_as(x)


def test_the_formula_sample_by_sample_in_one_call():
    net, x, t = Labeled(), torch.zeros(4, 1, 2, 2), torch.ones(4)
    labels = torch.tensor([0, 1, 2, 3])
    guided = GuidedNetwork(net, num_classes=3)
    F = guided(x, t, labels, guidance_scale=torch.tensor([1.0, 1.5, 2.0, 2.0]))
    assert F[:, 0, 0, 0].tolist() == [1.0, 10 + 1.5 * (2 - 10), 10 + 2 * (3 - 10), 10.0]
    assert net.batches == [8]
    fixed = GuidedNetwork(net, num_classes=3, scale=2.0)
    assert fixed(x, t, labels)[:, 0, 0, 0].tolist() == [-8.0, -6.0, -4.0, 10.0]
    assert guided(x, t, labels)[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0, 10.0] and net.batches == [8, 8, 4]
    with pytest.raises(ConfigError, match="guidance needs class labels, and this model has none"):
        GuidedNetwork(net, num_classes=0)


def run(**changes) -> TrainConfig:
    base = {"objective": "scd", "teacher": "teacher", "network": NETWORK, "batch_size": 6, "num_iterations": 2}
    return TrainConfig.from_settings({**base, "tangent_warmup": 0, **changes})


def test_scales_are_drawn_evenly_and_by_iteration():
    config = run(guidance=(1.0, 2.0))
    scales = sample_guidance(config, 4000, 3)
    assert scales is not None and 1 <= scales.min() < 1.01 and 1.99 < scales.max() <= 2
    assert abs(float(scales.mean()) - 1.5) < 0.02
    torch.testing.assert_close(sample_guidance(config, 4000, 3), scales, rtol=0, atol=0)
    assert not torch.equal(sample_guidance(config, 4000, 4), scales)
    assert sample_guidance(run(guidance=(1.5, 1.5)), 4, 0) is None


def batch(scale=None) -> Batch:
    x_0, z = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    t, labels = torch.tensor([0.3, 0.8, 1.2, 1.5]), torch.tensor([0, 1, 2, 3])
    return Batch(x_0=x_0, z=z, t=t, class_labels=labels, guidance_scale=scale)


def randomized(config) -> nn.Module:
    torch.manual_seed(1)
    net = make_network(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


@pytest.mark.parametrize(("objective", "extra"), [("scd", {}), ("cd", {}), ("scd", {"discrete_points": 32})])
def test_a_scale_that_is_told_is_the_one_that_is_baked_in(objective, extra):
    """The same student, which ignores the scale so far, has the same loss either way; without guidance another."""
    teacher, plain = randomized(NETWORK), randomized(NETWORK)
    told = make_network(msgspec.structs.replace(NETWORK, guidance=True)).eval()
    start_from(told, plain)
    drawn = run(objective=objective, guidance=(1.0, 2.0), **extra)
    fixed = run(objective=objective, guidance=(1.7, 1.7), **extra)
    without = run(objective=objective, **extra)
    scale = torch.full((4,), 1.7)
    one = loss_function(drawn, told, teacher, None)(batch(scale), 0)[1]
    two = loss_function(fixed, plain, teacher, None)(batch(), 0)[1]
    three = loss_function(without, plain, teacher, None)(batch(), 0)[1]
    torch.testing.assert_close(one, two)
    assert abs(float(two - three)) > 1e-4


def test_vsd_compares_scores_of_the_same_scale():
    teacher = randomized(NETWORK)
    student = make_network(msgspec.structs.replace(NETWORK, guidance=True)).eval()
    start_from(student, teacher)
    config = run(guidance=(1.0, 2.0), vsd_weight=1.0, objective="vsd")
    vsd = make_vsd(config, student, teacher, None)
    assert vsd is not None and vsd.fake.guidance_linear is not None
    _, without = vsd(student, batch(torch.ones(4)), 0)
    _, strong = vsd(student, batch(torch.full((4,), 2.0)), 0)
    assert strong > without


@pytest.fixture(scope="module")
def data() -> ImageData:
    rng = np.random.default_rng(0)
    return ImageData(
        images=rng.integers(0, 256, (30, 8, 8, 1), np.uint8), labels=np.arange(30) % 3, class_names=("a", "b", "c")
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("teacher")
    config = TrainConfig(
        objective="diffusion",
        network=NETWORK,
        batch_size=6,
        num_iterations=2,
        label_dropout=0.2,
        optimizer=OptimizerConfig(warmup_iterations=0),
    )
    train(config, out, data=data)
    return out


def test_trajectories_have_scales_of_their_own():
    """F = 10 + s (label's - 10) turns a sample by the same angle whatever it is: the end shows the scale."""
    config = run(objective="trajectory", guidance=(1.0, 2.0), trajectory_steps=2, batch_size=8)
    trajectories = Trajectories(config, guided_teacher(Labeled(), config, 3), (1, 2, 2), 3)
    points = trajectories(0)
    assert points.guidance_scale is not None and points.guidance_scale.unique().numel() > 4
    F = 10 + points.guidance_scale * (points.class_labels + 1 - 10)
    last = points.t < points.t.max()  # one DDIM step from there to the end
    t = points.t.view(-1, 1, 1, 1)
    end = t.cos() * points.x_t - t.sin() * 0.5 * F.view(-1, 1, 1, 1)
    assert last.any()
    torch.testing.assert_close(points.end[last], end[last])


def test_a_student_that_is_told_the_scale(teacher, data, tmp_path):
    config = run(teacher=str(teacher), network=None, guidance=(1.0, 2.0))
    model = train(config, tmp_path, data=data)
    assert model.config.guidance and model.config.guidance_range == (1.0, 2.0)
    assert model.config.provenance["guidance"] == "1 to 2"
    linear = model.network.guidance_linear
    assert float(linear.weight.abs().max()) > 0, "it learned nothing of the scale"
    write_samples(model, "scd", tmp_path / "samples", 2)
    assert (tmp_path / "samples" / "000002.png").stat().st_size > 0
    more = run(objective="scd", teacher=str(teacher), network=None, init_from=str(tmp_path), guidance=(1.0, 2.0))
    assert resolve(more, data).config.network == model.config.network
    with pytest.raises(ConfigError, match="it would learn nothing of it"):
        resolve(msgspec.structs.replace(more, guidance=(1.0, 1.0)), data)


def test_a_baked_in_scale_changes_no_shape(teacher, data, tmp_path):
    model = train(run(teacher=str(teacher), network=None, guidance=(1.5, 1.5)), tmp_path, data=data)
    assert not model.config.guidance and model.config.provenance["guidance"] == "1.5"


def test_a_guided_teachers_samples_lie_further_from_the_unlabeled_ones(teacher):
    model = ConsistencyModel.from_pretrained(teacher)
    with torch.no_grad():
        model.network.conv_out.weight.normal_(std=0.3)
    noise, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    none, plain, strong = (
        sample_teacher(model, noise, chosen, num_steps=4, guidance_scale=scale)
        for chosen, scale in ((None, 1.0), (labels, 1.0), (labels, 3.0))
    )
    assert (strong - none).norm() > 1.5 * (plain - none).norm() > 0


def test_a_teacher_that_always_saw_labels_is_refused(teacher, tmp_path):
    model = ConsistencyModel.from_pretrained(teacher)
    assert model.config.provenance["label_dropout"] == "0.2"
    require_guidable(model, tmp_path)
    bare = ConsistencyModel(msgspec.structs.replace(model.config, provenance={}), model.network)
    require_guidable(bare, teacher)  # its run's folder says so
    with pytest.raises(TrainError, match="label_dropout unknown, expected a share above 0"):
        require_guidable(bare, tmp_path)
    config = TrainConfig(objective="diffusion", network=NETWORK)
    (tmp_path / "train.json").write_text(config.to_json(), encoding="utf-8")
    with pytest.raises(TrainError, match=r"label_dropout 0, .*--label-dropout 0\.1"):
        require_guidable(bare, tmp_path)
    unlabeled = ConsistencyModel(ModelConfig(network=tiny()))
    with pytest.raises(TrainError, match="has no labels, expected some"):
        require_guidable(unlabeled, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": (2.0, 1.0)}, "expected two rising scales above 0"),
        ({"guidance": (0.0, 1.0)}, "expected two rising scales above 0"),
        ({"objective": "sct", "teacher": "", "init_from": "x", "guidance": (1.0, 2.0)}, "it is the teacher that is"),
    ],
)
def test_impossible_guidance_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_a_compiled_tangent_with_dropout_is_refused():
    with pytest.raises(ConfigError, match=r"dropout is 0.1 with --compile, expected 0"):
        loss_function(run(dropout=0.1, compile=True), Labeled(), Labeled(), None)


def test_without_guidance_the_teacher_is_asked_itself():
    net = Labeled()
    assert guided_teacher(net, run(), 3) is net
