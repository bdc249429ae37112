"""Does distillation do what it is for? On real digits: one step of the student beats one step of its teacher."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from scm_sdk.evaluate.quality import feature_stats, frechet_distance
from scm_sdk.model.sampler import Sampler
from scm_sdk.model.unet import UNetConfig
from scm_sdk.noise import draw_noise
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.loop import train
from scm_sdk.train.samples import sample_teacher

COUNT = 1797
NETWORK = UNetConfig(
    image_size=8, in_channels=1, channels=32, channel_mult=(1,), num_blocks=2, attention_resolutions=(4,),
    patch_size=2, num_classes=10, learned_position=True, time_max_period=10.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The 1,797 real 8x8 digits of scikit-learn, standardized to a deviation of 0.5."""
    raw = load_digits()
    images = ((raw.images - raw.images.mean()) / raw.images.std() * 0.5)[..., None].astype(np.float32)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, images=images, digit=raw.target, digit_names=np.array([str(d) for d in range(10)]))
    return path, images


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # such small networks only lose by more
    yield
    torch.set_num_threads(before)


def distance(images, real):
    """Fréchet distance on the raw 64 pixels."""
    stats = [feature_stats(x.reshape(len(x), 64).astype(np.float64)) for x in (images, real)]
    return frechet_distance(*stats)


def test_student_beats_its_teacher_in_one_step(digits, tmp_path, threads):
    path, real = digits
    data = DataConfig(source=str(path), label="digit")
    teacher = train(
        TrainConfig(
            objective="diffusion", data=data, network=NETWORK, batch_size=64, num_iterations=700,
            learning_rate=2e-3, warmup_iterations=100, ema_halflife=3000, stable_targets=True, p_std=1.6,
        ),
        tmp_path / "teacher",
    )  # fmt: skip
    student = train(
        TrainConfig(
            objective="scd", data=data, teacher=str(tmp_path / "teacher"), batch_size=48, num_iterations=250,
            optimizer="radam", learning_rate=5e-4, p_mean=-1.0, tangent_norm="rms", tangent_warmup=100,
            warmup_iterations=0, ema_halflife=3000,
        ),
        tmp_path / "student",
    )  # fmt: skip

    labels = torch.arange(COUNT) % 10

    def steps(model, count):
        spec = model.spec(count)
        noise = [torch.from_numpy(n) for n in draw_noise(spec, range(COUNT))]
        with torch.inference_mode():
            return Sampler(model, spec)(*noise, labels).numpy()

    noise = torch.from_numpy(draw_noise(teacher.spec(1), range(COUNT))[0])
    many = distance(sample_teacher(teacher, noise, labels, num_steps=9).numpy(), real)
    baseline, one, two = (distance(steps(m, n), real) for m, n in ((teacher, 1), (student, 1), (student, 2)))
    figures = f"teacher {many:.3f} in 17 calls, {baseline:.3f} in 1; student {one:.3f} in 1, {two:.3f} in 2"
    assert many < baseline / 5, figures  # the teacher has learned something worth distilling
    assert one < baseline / 2.5, figures
    assert two < baseline / 6, figures
