"""Where the images of a folder's shards lie: found by reading the headers of tar and npz files, and nothing else."""

from __future__ import annotations

import io
import tarfile
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TrainError
from . import shards
from .shards import ARRAYS, ShardImages, as_sample_shape, read_npy_header

IMAGES = frozenset({"png", "jpg", "jpeg", "webp", "bmp"})
LABEL = "cls"
NAMES_FILE = "class_names.txt"
MAX_HEADER_BYTES = 1 << 20
"""Most that a tar's header may claim for itself: long names and extended attributes."""
MAX_LABEL_BYTES = 32
MAX_CLASSES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Where the images of a folder's shards lie.

    Attributes:
        images: They.
        labels: Label of each, (N,), int64, or None.
        class_names: Name of each label, or ().
    """

    images: ShardImages
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]


def holds_shards(folder: Path) -> bool:
    """Return whether a folder has tar or npz files."""
    return any(_shards(folder))


def _shards(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    return paths or (sorted(folder.glob("*.npz")) if folder.is_dir() else [])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shard:
    """What one shard holds: how images are stored, (H, W, C) and dtype of one, offsets and lengths, labels."""

    stored: str | np.dtype[Any]
    sample_shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    places: array[int]
    labels: array[int]


def index_shards(folder: Path, label: str) -> Index:
    """Look through a folder's shards, in the order of their names.

    Args:
        folder: With ``*.tar`` or ``*.npz`` files.
        label: "" for none; ``cls`` for tar shards, a column for npz shards.

    Raises:
        TrainError: If a shard is damaged, a sample lacks its image or label, or something is larger than allowed.
    """
    paths, places, labels = _shards(folder), array("q"), array("q")
    first: _Shard | None = None
    for number, path in enumerate(paths):
        try:
            shard = _index_tar(path, label) if path.suffix == ".tar" else _index_npz(path, label)
        except (OSError, ValueError, EOFError, SyntaxError, tarfile.TarError, zipfile.BadZipFile) as exc:
            raise TrainError(f"{path} cannot be used as a shard: {exc}. Copy or make it again.") from exc
        if shard is None:
            continue
        first = first or shard
        if (shard.sample_shape, shard.stored) != (first.sample_shape, first.stored):
            raise TrainError(
                f"{path} holds {shard.sample_shape} stored as {shard.stored}, expected {first.sample_shape} as "
                f"{first.stored} like the first shard."
            )
        for at in range(0, len(shard.places), 2):
            places.extend((number, shard.places[at], shard.places[at + 1]))
        labels.extend(shard.labels)
    if first is None:
        raise TrainError(f"the shards in {folder} hold no images.")
    images = ShardImages(
        paths=tuple(paths),
        places=np.frombuffer(places, np.int64).reshape(-1, 3),
        sample_shape=first.sample_shape,
        dtype=np.dtype(np.uint8 if first.dtype == np.uint8 else np.float32),
        stored=first.stored,
    )
    if not label:
        return Index(images=images, labels=None, class_names=())
    marked = np.frombuffer(labels, np.int64)
    return Index(images=images, labels=marked, class_names=_class_names(folder, int(marked.max())))


class _HeadersOnly(io.RawIOBase):
    """A tar file of which no more than headers are read, however long they say they are."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header claims {size} bytes, at most {MAX_HEADER_BYTES} are read")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _index_tar(path: Path, label: str) -> _Shard | None:
    if label not in ("", LABEL):
        raise ValueError(f"label is {label!r}, and tar shards have {LABEL!r}")
    places, labels, stored = array("q"), array("q"), ""
    key, image, mark = "", (0, 0), -1

    def close() -> None:
        """End a sample."""
        if key and not image[1]:
            raise ValueError(f"sample {key!r} has no image")
        if key and label and mark < 0:
            raise ValueError(f"sample {key!r} has no .{LABEL}")
        if key:
            places.extend(image)
            labels.append(mark)

    with open(path, "rb") as stream, tarfile.open(fileobj=_HeadersOnly(stream), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or all of them would stay in memory
            folder, _, base = member.name.rpartition("/")
            name, _, ending = base.partition(".")
            kind = {ARRAYS: ARRAYS, LABEL: LABEL}.get(ending.lower(), "image" if ending.lower() in IMAGES else "")
            if not kind or not member.isreg():
                continue
            name = f"{folder}/{name}" if folder else name
            if name != key:
                close()
                key, image, mark = name, (0, 0), -1
            if member.size > (MAX_LABEL_BYTES if kind == LABEL else shards.MAX_SAMPLE_BYTES) or member.issparse():
                raise ValueError(f"{member.name!r} is sparse or larger than allowed ({member.size} bytes)")
            if kind == LABEL:
                mark = _read_label(stream, member)
            elif image[1] or stored not in ("", kind):
                raise ValueError(f"sample {key!r} has two images, or one of another kind than those before it")
            else:
                stored, image = kind, (member.offset_data, member.size)
        close()
        if not places:
            return None
        stream.seek(places[0])
        shape, dtype = _look_at(stream.read(places[1]), stored)
    return _Shard(stored=stored, sample_shape=shape, dtype=dtype, places=places, labels=labels)


def _look_at(content: bytes, stored: str) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """Return (H, W, C) and dtype of an image, without decoding it."""
    if stored == ARRAYS:
        shape, dtype = read_npy_header(io.BytesIO(content))
        return as_sample_shape(shape), dtype
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        grey = image.mode in ("1", "L", "LA", "I", "I;16")
        return as_sample_shape((image.height, image.width, 1 if grey else 3)), np.dtype(np.uint8)


def _read_label(stream: IO[bytes], member: tarfile.TarInfo) -> int:
    at = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(member.size).strip()
    stream.seek(at)
    if not text.isdigit() or int(text) >= MAX_CLASSES:
        raise ValueError(f"{member.name!r} holds {text!r}, expected a class number")
    return int(text)


def _index_npz(path: Path, label: str) -> _Shard | None:
    with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
        start, shape, dtype = _array_in(stream, archive, "images")
        if len(shape) not in (3, 4) or (dtype != np.uint8 and dtype.kind != "f"):
            raise ValueError(f"'images' is {shape} of {dtype}, expected (N, H, W, C) of uint8 or floats")
        each = int(np.prod(shape[1:])) * dtype.itemsize
        places, labels = array("q"), array("q")
        for row in range(shape[0]):
            places.extend((start + row * each, each))
        if label:
            at, length, kind = _array_in(stream, archive, label)
            if length != shape[:1] or kind.kind not in "ui":
                raise ValueError(f"label column {label!r} is {length} of {kind}, expected {shape[:1]} of integers")
            stream.seek(at)
            values = np.frombuffer(stream.read(length[0] * kind.itemsize), kind).astype(np.int64)
            if len(values) and not 0 <= values.min() <= values.max() < MAX_CLASSES:
                raise ValueError(f"label column {label!r} reaches from {values.min()} to {values.max()}")
            labels.extend(values.tolist())
    if not places:
        return None
    return _Shard(stored=dtype, sample_shape=as_sample_shape(shape[1:]), dtype=dtype, places=places, labels=labels)


def _array_in(stream: IO[bytes], archive: zipfile.ZipFile, name: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Return where an array's data starts in an npz file, its shape and its dtype."""
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"it has no array {name!r}, only {sorted(archive.namelist())[:8]}")
    about = archive.getinfo(f"{name}.npy")
    if about.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed, so that no image can be read by itself; write it with numpy.savez")
    stream.seek(about.header_offset)
    header = stream.read(30)
    start = about.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    stream.seek(start)
    shape, dtype = read_npy_header(stream)
    size = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if size != about.file_size - (stream.tell() - start):
        raise ValueError(f"array {name!r} claims {shape} of {dtype}, which are not the {about.file_size} bytes it has")
    return stream.tell(), shape, dtype


def _class_names(folder: Path, last: int) -> tuple[str, ...]:
    path = folder / NAMES_FILE
    if not path.exists():
        return tuple(map(str, range(last + 1)))
    names = tuple(path.read_text().splitlines())
    if len(names) <= last:
        raise TrainError(f"{path} names {len(names)} classes, the shards have numbers up to {last}.")
    return names
