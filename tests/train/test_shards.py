"""Shards are read in place, give the batches that memory gives, and cannot do harm."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from scm_sdk.errors import ConfigError, TrainError
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.batches import Feed, draw_batch
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.data import shard_index, shards
from scm_sdk.train.data.images import ImageData, load_data

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
KINDS = np.arange(10) % 3


def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def npy(values) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def write_tar(path, members: dict[str, bytes], form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def sample(row: int, ending="png", content=None) -> dict[str, bytes]:
    return {f"set/{row:04d}.{ending}": content or png(PIXELS[row]), f"set/{row:04d}.cls": b"%d\n" % KINDS[row]}


@pytest.fixture
def tars(tmp_path):
    """Two webdataset shards of six and four images, with a file that is none of ours."""
    for number, rows in enumerate((range(6), range(6, 10))):
        members = {k: v for row in rows for k, v in sample(row).items()} | {"set/readme.txt": b"hello"}
        write_tar(tmp_path / f"train-{number:05d}.tar", members)
    return tmp_path


@pytest.fixture
def npzs(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS[:6], kind=KINDS[:6])
    np.savez(tmp_path / "b.npz", images=PIXELS[6:], kind=KINDS[6:])
    return tmp_path


def config(**changes) -> TrainConfig:
    base = {"objective": "diffusion", "network": tiny(num_classes=3, in_channels=3), "batch_size": 4}
    return TrainConfig.from_settings({**base, "num_iterations": 5, **changes})


@pytest.mark.parametrize("kind, label", [("tars", "cls"), ("npzs", "kind")])
def test_batches_are_those_of_images_in_memory(request, kind, label):
    data = load_data(DataConfig(source=str(request.getfixturevalue(kind)), label=label))
    memory = ImageData(images=PIXELS, labels=KINDS, class_names=("0", "1", "2"))
    assert len(data) == 10 and data.images.shape == (10, 8, 8, 3) and data.class_names == memory.class_names
    with Feed(config(), data) as feed:
        for iteration in (0, 1, 2, 4):  # over the border of an epoch, and a jump as after an interruption
            found, expected = feed(iteration), draw_batch(config(), memory, iteration)
            assert torch.equal(found.x_0, expected.x_0) and torch.equal(found.z, expected.z)
            assert torch.equal(found.class_labels, expected.class_labels)
    half = draw_batch(config(), data, 1, slice(2, 4))
    assert torch.equal(half.x_0, draw_batch(config(), memory, 1).x_0[2:])


def test_rows_and_names(tars):
    (tars / "class_names.txt").write_text("red\ngreen\nblue\n", encoding="utf-8")
    data = load_data(DataConfig(source=str(tars), label="cls", rows=(5, 8)))
    assert data.class_names == ("red", "green", "blue") and data.labels.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(data.images[np.arange(3)], PIXELS[5:8])
    (tars / "class_names.txt").write_text("red\n", encoding="utf-8")
    with pytest.raises(TrainError, match="names 1 classes, the shards have numbers up to 2"):
        load_data(DataConfig(source=str(tars), label="cls"))
    assert load_data(DataConfig(source=str(tars))).labels is None


def test_latents_keep_their_range(tmp_path):
    latents = np.random.default_rng(1).normal(0, 3, (3, 4, 4, 4)).astype(np.float16)
    write_tar(tmp_path / "a.tar", {f"{i}.npy": npy(one) for i, one in enumerate(latents)})
    data = load_data(DataConfig(source=str(tmp_path)))
    assert data.images.shape == (3, 4, 4, 4)
    found = data.normalized(np.array([2, 0]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, latents[[2, 0]].transpose(0, 3, 1, 2).astype(np.float32))


@pytest.mark.parametrize(
    "members, message",
    [
        ({"1.png": png(PIXELS[0])}, "sample '1' has no .cls"),
        ({"1.cls": b"0"}, "sample '1' has no image"),
        ({"1.png": png(PIXELS[0]), "1.jpg": b"x", "1.cls": b"0"}, "sample '1' has two images"),
        ({"1.png": png(PIXELS[0]), "1.cls": b"cat"}, "holds b'cat', expected a class number"),
        ({"1.png": png(PIXELS[0]), "1.cls": b"9" * 20}, "expected a class number"),
        ({"1.png": png(PIXELS[0]), "1.cls": b"0" * 100}, r"'1.cls' is sparse or larger than allowed \(100 bytes\)"),
        ({"1.png": b"no picture", "1.cls": b"0"}, "it is no picture file that can be read"),
        ({"readme.txt": b"hello"}, "hold no images"),
        ({"1.npy": npy(np.array([{}], object)), "1.cls": b"0"}, "expected numbers in C order"),
    ],
)
def test_bad_samples_are_named(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(TrainError, match=message):
        load_data(DataConfig(source=str(tmp_path), label="cls"))


def test_archives_that_lie_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "MAX_HEADER_BYTES", 4096)
    write_tar(tmp_path / "a.tar", {"x" * 9000 + ".png": png(PIXELS[0])}, tarfile.GNU_FORMAT)
    with pytest.raises(TrainError, match=r"a\.tar .* a header claims 9216 bytes, at most 4096 are read"):
        load_data(DataConfig(source=str(tmp_path)))
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 4096)
    write_tar(tmp_path / "a.tar", {"1.png": bytes(5000)})
    with pytest.raises(TrainError, match=r"'1.png' is sparse or larger than allowed \(5000 bytes\)"):
        load_data(DataConfig(source=str(tmp_path)))
    write_tar(tmp_path / "a.tar", {"1.png": png(np.zeros((90, 90, 3), np.uint8))})  # a bomb: small file, many pixels
    with pytest.raises(TrainError, match="it is 90x90, expected at most 4096 pixels"):
        load_data(DataConfig(source=str(tmp_path)))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 3)})
    write_tar(tmp_path / "a.tar", {"1.npy": header.getvalue()})
    with pytest.raises(TrainError, match=r"it is .*expected \(height, width, channels\)"):
        load_data(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize("shape", [(2**40, 0, 8, 3), (0, 2**40, 2**40, 3), (2**40, 2**40, 0, 0)])
def test_arrays_without_an_element_are_no_images(tmp_path, shape):
    """They have no byte, so nothing in the file contradicts what they say."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        archive.writestr("images.npy", stream.getvalue())
    with pytest.raises(TrainError, match=r"a\.npz cannot be used as a shard"):
        load_data(DataConfig(source=str(tmp_path)))


def test_names_that_claim_more_than_memory_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS, kind=KINDS)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "<U8", "fortran_order": False, "shape": (2**55,)})
        archive.writestr("kind_names.npy", stream.getvalue())
    with pytest.raises(TrainError, match=r"a\.npz cannot be used as a shard"):
        load_data(DataConfig(source=str(tmp_path), label="kind"))


def test_links_and_paths_lead_nowhere(tmp_path):
    inside = tmp_path / "shards"
    inside.mkdir()
    with tarfile.open(inside / "a.tar", "w") as archive:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE), ("3.png", tarfile.FIFOTYPE)):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "/etc/passwd"
            archive.addfile(about)
        about = tarfile.TarInfo("../../evil.png")
        content = png(PIXELS[3])
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    data = load_data(DataConfig(source=str(inside)))
    np.testing.assert_array_equal(data.images[np.arange(1)], PIXELS[3:4])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "shards"]


def test_what_differs_or_breaks_later_is_named(tars, tmp_path):
    data = load_data(DataConfig(source=str(tars)))
    path = tars / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(TrainError, match=r"the image at byte \d+ of .*train-00001\.tar cannot be read"):
        data.images[np.arange(10)]
    with pytest.raises(TrainError, match=r"train-00001\.tar cannot be used as a shard"):
        load_data(DataConfig(source=str(tars)))
    write_tar(path, {"9.png": png(np.zeros((4, 4, 3), np.uint8))})
    with pytest.raises(TrainError, match=r"holds \(4, 4, 3\) stored as image, expected \(8, 8, 3\)"):
        load_data(DataConfig(source=str(tars)))
    write_tar(path, {"8.png": png(PIXELS[8]), "9.png": png(np.zeros((4, 4, 3), np.uint8))})
    with pytest.raises(TrainError, match="it is 4x4, expected 8x8"):
        load_data(DataConfig(source=str(tars))).images[np.array([7])]


def test_npz_shards_must_be_readable_in_place(npzs):
    with pytest.raises(ConfigError, match=r"label 'color' is no column .*kind"):
        load_data(DataConfig(source=str(npzs), label="color"))
    np.savez_compressed(npzs / "b.npz", images=PIXELS)
    with pytest.raises(TrainError, match=r"b\.npz .* it is compressed.* write it with numpy\.savez"):
        load_data(DataConfig(source=str(npzs)))
    np.savez(npzs / "b.npz", images=np.full((2, 8, 8, 3), np.nan, np.float32))
    with pytest.raises(TrainError, match=r"holds \(8, 8, 3\) stored as float32"):
        load_data(DataConfig(source=str(npzs)))
    (npzs / "a.npz").unlink()
    with pytest.raises(TrainError, match="it holds a NaN"):
        load_data(DataConfig(source=str(npzs))).images[np.array([1])]
    (npzs / "b.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(TrainError, match=r"b\.npz cannot be used as a shard"):
        load_data(DataConfig(source=str(npzs)))
