"""Images from everywhere people keep them, and one clear line for what is wrong with them."""

import zipfile

import numpy as np
import pytest

from scm_sdk.errors import ConfigError, TrainError
from scm_sdk.train.config import DataConfig
from scm_sdk.train.data.images import FASHION_MNIST, HAIR_NAMES, load_data


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


@pytest.mark.parametrize("name", ["x.npz", "x.NPZ"])
@pytest.mark.parametrize("place", ["file", "shard"])
def test_the_ending_may_be_in_capitals(tmp_path, name, place):
    with open(tmp_path / name, "wb") as stream:
        np.savez(stream, images=np.zeros((4, 8, 8, 3), np.uint8))
    assert len(load_data(DataConfig(source=str(tmp_path / name if place == "file" else tmp_path)))) == 4


@pytest.mark.parametrize("name", ["x.npy", "x.NPY"])
def test_data_from_npy(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    with open(tmp_path / name, "wb") as stream:
        np.save(stream, pixels)
    source = str(tmp_path / name)
    data = load_data(DataConfig(source=source))
    np.testing.assert_array_equal(data.images, pixels)
    assert data.labels is None
    with pytest.raises(ConfigError, match=rf"label is 'kind', .*{name} .*without labels"):
        load_data(DataConfig(source=source, label="kind"))


def test_arrays_that_are_none(tmp_path, monkeypatch):
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_bytes(b"no array")
        with pytest.raises(TrainError, match=rf"{name} cannot be read as an np. "):
            load_data(DataConfig(source=str(tmp_path / name)))
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npz").read_bytes())
    with pytest.raises(TrainError, match=r"x\.npy cannot be read as an npy array: .*npz"):
        load_data(DataConfig(source=str(tmp_path / "x.npy")))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("kind.npy", b"0123")
    with pytest.raises(TrainError, match=r"x\.npz cannot be read .*'kind' is no array"):
        load_data(DataConfig(source=str(tmp_path / "x.npz"), label="kind"))
    monkeypatch.setattr("scm_sdk.train.data.images.MAX_BYTES", 500)
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8, 3), np.uint8))
    for name in ("x.npy", "x.npz"):
        with pytest.raises(TrainError, match=rf"{name} holds \d+ bytes in one array, expected at most"):
            load_data(DataConfig(source=str(tmp_path / name)))


def test_unknown_label_lists_the_columns(npz):
    with pytest.raises(ConfigError, match=r"label 'color' is no column of .*, expected one of kind"):
        load_data(DataConfig(source=str(npz), label="color"))
    with pytest.raises(ConfigError, match=r"--rows\) are 0\.\.99, .* the 12 images"):
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
