"""Pictures as people have them: of 16 bits, turned, transparent, broken; in folders of classes and in shards, alike."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from scm_sdk.errors import TrainError
from scm_sdk.train.config import DataConfig
from scm_sdk.train.data.images import ImageData, load_data


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def in_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "pictures"


def in_tar(root: Path, files: dict[str, bytes]) -> Path:
    (root / "shards").mkdir(exist_ok=True)
    with tarfile.open(root / "shards" / "a.tar", "w") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return root / "shards"


Keep = Callable[[Path, dict[str, bytes]], Path]
everywhere = pytest.mark.parametrize("keep", [in_folder, in_tar])


def load(folder: Path, label: str = "", rows: tuple[int, int] = (0, 0)) -> ImageData:
    return load_data(DataConfig(source=str(folder), label=label, rows=rows))


def pixels(folder: Path) -> NDArray[np.uint8]:
    data = load(folder)
    found: NDArray[np.uint8] = data.images[np.arange(len(data))]
    return found


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RED = Image.new("RGB", (16, 8), (255, 0, 0))


@everywhere
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(tmp_path: Path, keep: Keep, kind: str) -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    found = pixels(keep(tmp_path, {f"a.{kind.lower()}": encoded(deep, kind)}))
    np.testing.assert_array_equal(found[0, ..., 0], RAMP)


@everywhere
def test_pictures_lie_as_the_camera_says(tmp_path: Path, keep: Keep) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :4] = 255  # white at the left
    files = {}
    for orientation, turn in ((1, 0), (3, 2), (6, 1), (8, 3)):  # by so many quarters to the left
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"{orientation}.png"] = encoded(Image.fromarray(np.rot90(upright, turn).copy()), exif=exif)
    np.testing.assert_array_equal(pixels(keep(tmp_path, files)), [upright] * 4)


@everywhere
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_whatever_they_hide(tmp_path: Path, keep: Keep, mode: str) -> None:
    hidden = Image.new("RGBA", (8, 8), (40, 40, 40, 255))
    hidden.paste((200, 0, 0, 0), (0, 0, 4, 8))
    content = encoded(hidden.convert(mode))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([200, 0, 0, 40, 40, 40])
        palette.paste(0, (0, 0, 4, 8))
        content = encoded(palette, transparency=0)
    found = pixels(keep(tmp_path, {"a.png": content}))[0]
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 40).all()


@everywhere
def test_opaque_alpha_changes_nothing(tmp_path: Path, keep: Keep) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    alpha = image.copy()
    alpha.putalpha(255)
    found = pixels(keep(tmp_path, {"a.png": encoded(image), "b.png": encoded(alpha)}))
    np.testing.assert_array_equal(found[0], found[1])


@everywhere
@pytest.mark.parametrize("ending", ["tif", "gif", "jfif", "webp", "bmp"])
def test_formats(tmp_path: Path, keep: Keep, ending: str) -> None:
    kind = {"tif": "TIFF", "jfif": "JPEG"}.get(ending, ending.upper())
    found = pixels(keep(tmp_path, {f"a.{ending}": encoded(RED, kind)}))
    assert found.shape == (1, 8, 16, 3) and (abs(found.astype(int) - (255, 0, 0)) < 6).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


GOOD = encoded(RED)
AT = GOOD.find(b"IDAT")
UNREADABLE = {
    "a chunk's length is wrong": GOOD[: AT - 4] + b"\0\0\0\5" + GOOD[AT:],
    "a short header": GOOD[:8] + chunk(b"IHDR", GOOD[16:24]) + GOOD[33:],
    "two megabytes of text": GOOD[:33] + chunk(b"zTXt", b"w\0\0" + zlib.compress(b"x" * (2 << 20))) + GOOD[33:],
    "a bomb": encoded(Image.new("1", (20000, 20000))),
    "cut": GOOD[:-30],
    "an animation": encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (16, 8))]),
    "floats": encoded(Image.fromarray(np.zeros((8, 16), np.float32)), "TIFF"),
    "32 bits": encoded(Image.fromarray(np.full((8, 16), 1 << 20, np.int32)), "TIFF"),
    "text": b"hello",
    "nothing": b"",
}


@everywhere
@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_picture_that_cannot_be_read_is_named(tmp_path: Path, keep: Keep, place: str, what: str) -> None:
    files = {"a.png": UNREADABLE[what]} if place == "first" else {"a.png": GOOD, "b.png": UNREADABLE[what]}
    folder = keep(tmp_path, files)
    name = list(files)[-1] if keep is in_folder else r"a\.tar"
    with pytest.raises(TrainError, match=rf"{name} cannot be (read|used)"):
        pixels(folder)


def test_a_grey_picture_first_makes_no_other_grey(tmp_path: Path) -> None:
    files = {"a.png": encoded(RED.convert("L")), "b.png": GOOD}
    assert pixels(in_folder(tmp_path, files))[1, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(TrainError, match="it has colors, expected a gray picture"):
        pixels(in_tar(tmp_path, files))
    assert pixels(in_tar(tmp_path, dict(reversed(files.items())))).shape == (2, 8, 16, 3)


def test_no_picture_of_a_shard_is_left_out_silently(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"'photo\.v1\.png' has a dot in its name"):
        load(in_tar(tmp_path, {"photo.v1.png": GOOD, "photo.v2.png": GOOD, "other.png": GOOD}))
    told = load(in_tar(tmp_path, {"1.png": GOOD, "1.mask.png": GOOD, "1.json": b"{}", "2.png": GOOD, "2.json": b"{}"}))
    assert len(told) == 2 and told.describe().endswith("no labels; not trained on: 2 .json, 1 .mask.png")
    (tmp_path / "shards" / "b.png").write_bytes(GOOD)
    with pytest.raises(TrainError, match="expected shards of one kind and no other pictures"):
        load(tmp_path / "shards")


def test_classes_are_the_folders_that_hold_pictures(tmp_path: Path) -> None:
    files = {"cat/1.png": GOOD, "dog/1.png": GOOD, "dog/notes.txt": b"", ".thumbs/1.png": GOOD, "dog/.hidden.png": b""}
    folder = in_folder(tmp_path, files)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(GOOD)
    (folder / "fox").symlink_to(tmp_path / "elsewhere")
    data = load(folder, "folder")
    assert data.class_names == ("cat", "dog", "fox") and len(data) == 3
    assert data.describe().endswith("cat, dog, fox; not trained on: 1 .txt, 1 hidden files, 1 hidden folders")
    assert len(load(folder)) == 3


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("cat/black/1.png", r"cat/black/1\.png is 2 folders below .*pictures, expected 1: FOLDER/CLASS/PICTURE"),
        ("1.png", r"1\.png is 0 folders below .*pictures, expected 1"),
        ("two\nlines/1.png", r"class 2 of .* is 'two\\nlines', no printable text"),
        ("\udce9/1.png", r"class 2 of .* is '\\udce9', no printable text"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, more: str, text: str) -> None:
    folder = in_folder(tmp_path, {"cat/1.png": GOOD, "dog/1.png": GOOD, more: GOOD})
    assert len(load(folder)) == 3
    with pytest.raises(TrainError, match=text):
        load(folder, "folder")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    folder = in_folder(tmp_path, {"cat/1.png": GOOD})
    (folder / "cat" / "again").symlink_to(folder)
    with pytest.raises(TrainError, match="again is a link to a folder that contains it"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n".encode("utf-8-sig"), ("cat", "dog")),
        (b"cat\r\ndog", ("cat", "dog")),
        ("cat\ndog".encode("utf-16"), "cannot be read: .*Write the names as UTF-8"),
        ("chat\nchien é".encode("latin-1"), "cannot be read: .*Write the names as UTF-8"),
        (b"cat\n\ndog", "class 1 of .* is '', no printable text"),
        (b"cat\ncat", "class 0 of .* is 'cat', twice"),
        (b"cat", "names 1 classes, the shards have numbers up to 1"),
    ],
)
def test_class_names(tmp_path: Path, text: bytes, names: tuple[str, ...] | str) -> None:
    folder = in_tar(tmp_path, {"1.png": GOOD, "1.cls": b"0", "2.png": GOOD, "2.cls": b"1"})
    (folder / "class_names.txt").write_bytes(text)
    if isinstance(names, tuple):
        assert load(folder, "cls").class_names == names
        return
    with pytest.raises(TrainError, match=names):
        load(folder, "cls")


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_the_names_in_an_npz_count_wherever_it_lies(tmp_path: Path, place: str) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, hair=np.array([0, 1]), hair_names=np.array(["red", "blond"]))
    assert load(tmp_path / "a.npz" if place == "file" else tmp_path, "hair").class_names == ("red", "blond")


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"id": np.array([0, 2**32 - 1])}, "reaches from 0 to 4294967295"),
        ({"id": np.array([0, 2**63 + 5], np.uint64)}, "reaches from"),
        ({"id": np.array([-1, 0])}, "reaches from -1"),
        ({"id": np.array([0.5, 1.7])}, "float64"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8), "id": np.zeros(0, int)}, r"\(0, 8, 8, 3\)|hold no images"),
        ({"id": np.array([0, 1]), "id_names": np.array(["a", "a"])}, "'a', twice"),
        ({"id": np.array([0, 1]), "id_names": np.array(["a", ""])}, "is ''"),
    ],
)
@pytest.mark.parametrize("place", ["file", "folder"])
def test_labels_that_are_no_class_numbers_are_refused(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], text: str, place: str
) -> None:
    np.savez(tmp_path / "a.npz", **{"images": IMAGES, **arrays})
    with pytest.raises(TrainError, match=text):
        load(tmp_path / "a.npz" if place == "file" else tmp_path, "id")


def test_an_array_that_is_no_archive_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    os.rename(tmp_path / "a.npy", tmp_path / "a.npz")
    with pytest.raises(TrainError, match=r"a\.npz cannot be read as an npz of arrays"):
        load(tmp_path / "a.npz")


def test_floats_that_lack_the_dark_half_are_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    np.savez(tmp_path / "a.npz", images=values)
    with pytest.raises(TrainError, match=r"floats from .* to .*, expected \[-1, 1\] with black at -1"):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=values * 2 - 1)
    assert len(load(tmp_path / "a.npz")) == 4
