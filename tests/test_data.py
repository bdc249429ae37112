"""Images from everywhere people keep them, and one clear line for what is wrong with them."""

import numpy as np
import pytest

from scm_sdk.errors import ConfigError, TrainError
from scm_sdk.train.config import DataConfig
from scm_sdk.train.data import FASHION_MNIST, HAIR_NAMES, load_data


def save(path, **arrays):
    np.savez(path, **arrays)
    return DataConfig(source=str(path), label="")


def test_data_from_npz(tmp_path):
    floats = np.zeros((3, 4, 4, 3), np.float32)
    assert load_data(save(tmp_path / "ok.npz", images=floats)).images.dtype == np.float32
    floats[1, 2, 2, 0] = np.nan
    with pytest.raises(TrainError, match=r"image 1 of .*nan\.npz holds a NaN"):
        load_data(save(tmp_path / "nan.npz", images=floats))
    with pytest.raises(TrainError, match="reach 3, expected floats in"):
        load_data(save(tmp_path / "wide.npz", images=np.full((1, 4, 4, 3), 3.0)))
    with pytest.raises(TrainError, match="expected uint8 or floats"):
        load_data(save(tmp_path / "int.npz", images=np.zeros((1, 4, 4, 3), np.int32)))
    with pytest.raises(TrainError, match=r"expected \(N, H, W, 1 or 3\)"):
        load_data(save(tmp_path / "shape.npz", images=np.zeros((1, 4), np.uint8)))
    with pytest.raises(TrainError, match="expected an array called 'images'"):
        load_data(save(tmp_path / "other.npz", pictures=np.zeros(3)))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(TrainError, match="cannot be read as an npz"):
        load_data(DataConfig(source=str(tmp_path / "broken.npz")))


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TrainError, match="cannot be read as an npz"):
        load_data(DataConfig(source=str(tmp_path / "evil.npz")))


def test_unknown_label_lists_the_columns(npz):
    with pytest.raises(ConfigError, match=r"label 'color' is no column of .*, expected one of kind"):
        load_data(DataConfig(source=str(npz), label="color"))
    with pytest.raises(ConfigError, match=r"rows \(--rows\) are 0\.\.99, expected a range within the 12 images"):
        load_data(DataConfig(source=str(npz), rows=(0, 99)))


def test_shipped_avatars():
    data = load_data(DataConfig(source="avatars", label="hairColor", rows=(0, 10_000)))
    assert data.images.shape == (10_000, 16, 16, 3) and data.class_names == HAIR_NAMES
    assert data.label_values[9] == "#bd1700" and data.class_names[9] == "red"
    batch = data.normalized(np.arange(2))
    assert batch.shape == (2, 3, 16, 16) and batch.min() >= -1 and batch.max() <= 1


def test_image_folder(tmp_path):
    from PIL import Image

    for name, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / name / "1.png")
    data = load_data(DataConfig(source=str(tmp_path), label="folder"))
    assert data.class_names == ("cat", "dog") and data.labels is not None and data.labels.tolist() == [0, 1]
    assert data.images[1, 0, 0].tolist() == [0, 0, 255]
    Image.new("RGB", (9, 8)).save(tmp_path / "dog" / "2.png")
    with pytest.raises(TrainError, match=r"2\.png is \(8, 9, 3\), expected \(8, 8, 3\)"):
        load_data(DataConfig(source=str(tmp_path)))
    (tmp_path / "dog" / "2.png").write_bytes(b"no picture")
    with pytest.raises(TrainError, match=r"2\.png cannot be read as an image"):
        load_data(DataConfig(source=str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainError, match="holds no images"):
        load_data(DataConfig(source=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="absent' does not exist"):
        load_data(DataConfig(source=str(tmp_path / "absent")))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    data = load_data(DataConfig(source="fashion-mnist", label="label"))
    assert data.images.shape == (60_000, 32, 32, 1) and data.class_names[9] == "ankle boot"


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_held_out_part_of_fashion_mnist():
    data = load_data(DataConfig(source="fashion-mnist-t10k", label="label"))
    assert data.images.shape == (10_000, 32, 32, 1) and data.labels is not None
    assert np.bincount(data.labels).tolist() == [1_000] * 10
