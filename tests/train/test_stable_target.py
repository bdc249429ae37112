"""Stable targets: the mean of what a noisy sample may come from, with the noisy sample untouched."""

import numpy as np
import pytest
import torch

from scm_sdk.errors import ConfigError, TrainError
from scm_sdk.model.trigflow import add_noise
from scm_sdk.train.config import TrainConfig
from scm_sdk.train.data.images import ImageData
from scm_sdk.train.objectives import stable_target
from scm_sdk.train.objectives.base import Batch
from scm_sdk.train.objectives.stable_target import StableTarget

SD = 0.5


@pytest.fixture(scope="module")
def data() -> ImageData:
    rng = np.random.default_rng(0)
    images = (rng.standard_normal((40, 4, 4, 1)) * SD).astype(np.float32)
    return ImageData(images=images, labels=rng.integers(0, 3, 40), class_names=("a", "b", "c"))


def make_batch(data: ImageData, t: float, count: int = 6) -> Batch:
    x_0 = torch.from_numpy(data.normalized(np.arange(count)))
    z = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)) * SD
    labels = torch.from_numpy(data.labels[:count]).clone()
    labels[-1] = data.num_classes  # no label
    return Batch(x_0=x_0, z=z, t=torch.full((count,), t), class_labels=labels)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.1, 1.55])
def test_mean_is_bayes_rule_written_out_and_x_t_is_kept(data, t):
    batch = make_batch(data, t)
    out = StableTarget(data, sigma_data=SD)(batch)
    x_t = add_noise(batch.x_0, batch.z, batch.t)
    assert torch.allclose(add_noise(out.x_0, out.z, out.t), x_t, atol=2e-6)
    images = data.normalized(np.arange(len(data))).astype(np.float64)
    for i, label in enumerate(batch.class_labels.tolist()):
        rows = [j for j in range(len(data)) if label in (data.labels[j], data.num_classes)]
        distance = ((x_t[i].double().numpy() - np.cos(t) * images[rows]) ** 2).sum(axis=(1, 2, 3))
        weight = np.exp(-(distance - distance.min()) / (2 * SD**2 * np.sin(t) ** 2))
        mean = (weight[:, None, None, None] * images[rows]).sum(axis=0) / weight.sum()
        np.testing.assert_allclose(out.x_0[i].numpy(), mean, atol=2e-5)


def test_little_noise_leaves_the_batch_and_much_noise_gives_the_class_mean(data):
    target = StableTarget(data, sigma_data=SD)
    little, much = make_batch(data, 0.01), make_batch(data, 1.5707)
    assert torch.allclose(target(little).x_0, little.x_0, atol=1e-5)
    images = torch.from_numpy(data.normalized(np.arange(len(data))))
    of_class = images[torch.from_numpy(data.labels) == int(data.labels[0])].mean(dim=0)
    assert torch.allclose(target(much).x_0[0], of_class, atol=2e-3)
    assert torch.allclose(target(much).x_0[-1], images.mean(dim=0), atol=2e-3)


def test_too_large_a_data_set_and_a_distilled_run_are_refused(data, monkeypatch):
    monkeypatch.setattr(stable_target, "MAX_ELEMENTS", 100)
    with pytest.raises(TrainError, match="640 elements, expected at most 100"):
        StableTarget(data, sigma_data=SD)
    with pytest.raises(ConfigError, match="'scd' follows its teacher's"):
        TrainConfig(objective="scd", teacher="x", stable_targets=True)
