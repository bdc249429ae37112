"""Goldens: recorded samples come back as they were, and only if they fit their sampler."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from scm_sdk.bundle.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.bundle.goldens import GOLDEN_PATH, Golden, write_goldens
from scm_sdk.errors import ConfigError, IntegrityError

IMAGES = np.random.default_rng(3).standard_normal((3, 3, 4, 4)).astype(np.float32)
SEEDS = np.array([5, 6, 2**63 - 1])
LABELS = np.array([0, 1, 0])


def test_goldens_come_back(made_bundle: Path, tmp_path: Path, toy: Any) -> None:
    read = Bundle.open(made_bundle, verify="none").goldens()
    assert sorted(read) == [1, 2]
    for steps in read:
        expected = toy.golden(steps)
        np.testing.assert_array_equal(read[steps].images, expected.images)
        np.testing.assert_array_equal(read[steps].seeds, expected.seeds)
        assert read[steps].class_labels is not None
    with publish_bundle(tmp_path / "none") as folder:
        toy.fill(folder)
        shutil.rmtree(folder / "golden")
        write_bundle(folder, name="x", samplers=toy.specs, artifacts=[toy.checkpoint])
    assert Bundle.open(tmp_path / "none").goldens() == {}


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"1step/images": np.zeros((1, 3, 4, 4), np.float32)}, "expected images and seeds"),
        ({"3step/images": IMAGES, "3step/seeds": SEEDS}, r"for some of \[1, 2\] steps"),
        ({"image": np.zeros(1)}, "holds a tensor 'image', expected names such as '2step/images'"),
        ({"1step/seeds": SEEDS[:1]}, "expected int64, 0 or more, one for each image"),
        ({"1step/seeds": -SEEDS}, "expected int64, 0 or more, one for each image"),
        ({"1step/images": IMAGES.astype(np.float64)}, "images are float64"),
        ({"1step/images": IMAGES * np.float32("nan")}, "expected finite float32"),
        ({"1step/images": IMAGES[:, :1]}, r"images have shape .*expected \(B, 3, 4, 4\)"),
        ({"1step/class_labels": SEEDS}, r"class_labels hold 5\.\..*expected 0\.\.1"),
        ({"1step/class_labels": np.zeros(3)}, "class_labels are float64"),
        ({"1step/class_labels": None}, "class_labels are absent, the model has 2 classes"),
    ],
    ids=range(11),
)
def test_goldens_that_do_not_fit_are_refused(tensors: dict[str, Any], message: str, tmp_path: Path, toy: Any) -> None:
    good: dict[str, Any] = {
        "1step/images": IMAGES,
        "1step/seeds": SEEDS,
        "1step/class_labels": LABELS,
    }
    if "expected images" in message:
        good = {}
    with publish_bundle(tmp_path / "b") as folder:
        toy.fill(folder)
        content = {k: v for k, v in (good | tensors).items() if v is not None}
        (folder / GOLDEN_PATH).write_bytes(save(content))
        write_bundle(folder, name="x", samplers=toy.specs, artifacts=[toy.checkpoint])
    with pytest.raises(IntegrityError, match=message):
        Bundle.open(tmp_path / "b").goldens()


def test_goldens_are_checked_when_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goldens is empty"):
        write_goldens(tmp_path, {})
    bad = Golden(images=IMAGES, seeds=np.array([1, 2**64 - 1, 3], np.uint64))
    with pytest.raises(ConfigError, match="golden of 2 steps: seeds are uint64"):
        write_goldens(tmp_path, {2: bad})
    assert list(tmp_path.iterdir()) == []
