"""diffusers' SCMScheduler, set from our spec, takes the steps that our sampler takes."""

import json
import math

import pytest
import torch

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.scheduler import SCHEDULER_PATH, diffusers_scheduler, scheduler_config
from scm_sdk.errors import BackendUnavailable
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.sampler import Sampler
from scm_sdk.spec import SamplerSpec


def draw(generator, shape):
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_step_for_step(unet_checkpoint, steps, record_property):
    """The noise that diffusers draws inside its step is given to our sampler, so that nothing else can differ."""
    model = ConsistencyModel.from_pretrained(unet_checkpoint)
    spec, labels = model.spec(steps), torch.tensor([0, 3])
    shape, sigma = (2, *spec.sample_shape), spec.sigma_data
    scheduler = diffusers_scheduler(spec)
    assert scheduler.timesteps.tolist() == pytest.approx([*spec.times, 0.0])

    ours = torch.Generator().manual_seed(1)
    noise = [draw(ours, shape) for _ in range(steps)]
    theirs, differences = torch.Generator().manual_seed(1), []
    sample = math.sin(spec.times[0]) * sigma * draw(theirs, shape)
    for done, t in enumerate(scheduler.timesteps[:-1], start=1):
        with torch.inference_mode():
            F = model.network(sample / sigma, t.expand(2), labels)
            sample, x_0 = scheduler.step(sigma * F, t, sample, generator=theirs, return_dict=False)
            # After each step diffusers has what our sampler of so many of the same times returns.
            part = model.spec(times=spec.times[:done])
            expected = Sampler(model, part)(*noise[:done], labels)
        differences.append(float((x_0 - expected).abs().max()))
        assert differences[-1] <= 1e-5, done
    record_property("difference", max(differences))
    record_property("allowed", 1e-5)
    assert torch.allclose(sample, x_0), "at t = 0 nothing is added"


def test_a_bundle_holds_the_component(unet_bundle):
    from diffusers import SCMScheduler

    scheduler = SCMScheduler.from_pretrained(unet_bundle, subfolder="scheduler")
    assert scheduler.config.sigma_data == Bundle.open(unet_bundle).spec(1).sigma_data
    entry = next(e for e in Bundle.open(unet_bundle).manifest.files if e.path == SCHEDULER_PATH)
    assert entry.role == "config"
    assert json.loads((unet_bundle / SCHEDULER_PATH).read_text("utf-8")) == scheduler_config(
        Bundle.open(unet_bundle).spec(1)
    )


def test_another_sigma_data_is_carried():
    spec = SamplerSpec(times=(1.4, 0.3), sample_shape=(1, 8), sigma_data=0.7)
    scheduler = diffusers_scheduler(spec)
    noise = torch.ones(1, 1, 8)
    previous, _ = scheduler.step(0 * noise, scheduler.timesteps[0], 0 * noise, torch.Generator().manual_seed(0), False)
    drawn = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(previous, math.sin(0.3) * 0.7 * drawn)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(BackendUnavailable, match=r"an SCMScheduler needs diffusers.*pip install .*diffusers"):
        diffusers_scheduler(SamplerSpec(times=(1.5,), sample_shape=(1, 8)))
