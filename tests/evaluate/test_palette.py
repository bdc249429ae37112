"""Labels read from colors alone, and how many pixels are palette colors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import scm_sdk.assets
from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.evaluate.quality import palette

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def avatars() -> dict[str, NDArray[Any]]:
    with np.load(Path(scm_sdk.assets.__file__).parent / "pixel_art_16.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in ("images", "hairColor", "hairColor_names", "hat")}


def noisy(images: Images, sigma: float, seed: int = 0) -> Images:
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reader(avatars: dict[str, NDArray[Any]]) -> palette.LabelReader:
    return palette.fit_label_reader(
        avatars["images"][:4000], avatars["hairColor"][:4000], avatars["hairColor_names"].tolist()
    )


def test_labels_of_real_pictures_are_read(avatars: dict[str, NDArray[Any]], reader: palette.LabelReader) -> None:
    """The ceiling: 98.6 % of pictures show any hair at all, the rest wear it under a hat."""
    images, labels = avatars["images"][10_000:14_000], avatars["hairColor"][10_000:14_000]
    clean = palette.label_accuracy(images, labels, reader)
    assert clean.accuracy >= 0.98 and clean.undecided < 0.02
    assert min(clean.per_class.values()) > 0.95 and list(clean.per_class) == avatars["hairColor_names"].tolist()
    assert clean.confusion.sum() == clean.count == 4000
    bareheaded = avatars["hat"][10_000:14_000] == 0
    assert palette.label_accuracy(images[bareheaded], labels[bareheaded], reader).accuracy >= 0.999
    assert palette.label_accuracy(noisy(images[:1000], 4), labels[:1000], reader).accuracy >= 0.96
    wrong = palette.label_accuracy(images, (labels + 1) % 11, reader)
    assert wrong.accuracy < 0.01


def test_a_picture_without_hair_is_undecided(reader: palette.LabelReader) -> None:
    empty = np.full((1, 16, 16, 3), (182, 227, 244), np.uint8)  # background all over
    assert reader.read(empty).tolist() == [palette.UNDECIDED]


def test_palette_share(avatars: dict[str, NDArray[Any]]) -> None:
    images = avatars["images"]
    noise = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    assert palette.palette_share(images[10_000:10_200], images) == 1
    assert palette.palette_share(noise, images[:500]) < 0.1
    one = np.array([[[[10, 250, 100]]]], np.uint8)
    for step, expected in ((5, 1.0), (6, 0.0)):
        assert palette.palette_share(one + np.array([0, 0, step], np.uint8), one, distance=5) == expected
    assert palette.palette_share(np.array([[[[0, 255, 95]]]], np.uint8), one, distance=10) == 1


def test_wrong_labels(avatars: dict[str, NDArray[Any]], reader: palette.LabelReader) -> None:
    images, labels = avatars["images"][:5], avatars["hairColor"][:5]
    with pytest.raises(ConfigError, match="expected two or more colors like '#603a14'"):
        palette.fit_label_reader(images, labels, ["dark01", "dark02"])
    with pytest.raises(ConfigError, match="show the exact color of their label, expected most"):
        palette.fit_label_reader(images // 2, labels, reader.names)
    with pytest.raises(ShapeError, match=r"labels are \(4,\) uint8, expected \(5,\) integers"):
        palette.label_accuracy(images, labels[:4], reader)
    with pytest.raises(ConfigError, match=r"labels are in .*expected 0\.\.10"):
        palette.label_accuracy(images, labels + 11, reader)
    with pytest.raises(ShapeError, match=r"the images are \(16, 8, 3\), expected \(16, 16, 3\)"):
        reader.read(images[:, :, :8])
    with pytest.raises(ShapeError, match="color pictures"):
        palette.palette_share(images[..., :1], images)
    with pytest.raises(ConfigError, match="distance is 300"):
        palette.palette_share(images, images, distance=300)
