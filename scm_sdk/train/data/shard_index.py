"""Index the images of tar and npz shards by reading their headers only."""

from __future__ import annotations

import io
import math
import tarfile
import zipfile
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..._util.files import open_regular, read_regular
from ...errors import ConfigError, TrainError
from . import shards
from .pictures import SUFFIXES, look_at
from .shards import ARRAYS, ShardImages, as_sample_shape, read_npy_header

IMAGES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
LABEL = "cls"
NAMES_FILE = "class_names.txt"
MAX_HEADER_BYTES = 1 << 20
"""Maximum size of tar header extensions (long names, extended attributes), bytes."""
MAX_LABEL_BYTES = 32
MAX_CLASSES = 1 << 20
MAX_NAMES_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Index of the images in a folder of shards.

    Attributes:
        images: The images.
        labels: Label of each image, (N,), int64, or None.
        class_names: Name of each label, or ().
        ignored: Number of skipped files, by extension.
    """

    images: ShardImages
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    ignored: Counter[str]


def holds_shards(folder: Path) -> bool:
    """Return whether a folder has tar or npz files."""
    return any(_shards(folder))


def _shards(folder: Path) -> list[Path]:
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as exc:
        raise TrainError(f"{folder} cannot be read: {exc.strerror}. Make it readable.") from exc
    by_kind = ([path for path in paths if path.suffix.lower() == kind] for kind in (".tar", ".npz"))
    return next(filter(None, by_kind), [])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shard:
    """Content of one shard: storage format, (H, W, C) and dtype of an image, offsets and lengths, labels, names."""

    stored: str | np.dtype[Any]
    sample_shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    places: array[int]
    labels: array[int]
    class_names: tuple[str, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)


def index_shards(folder: Path, label: str) -> Index:
    """Index the shards of a folder in the order of their names.

    Args:
        folder: Folder with ``*.tar`` or ``*.npz`` files.
        label: "" for none; ``cls`` for tar shards, a column for npz shards.

    Raises:
        ConfigError: If the label does not exist.
        TrainError: If a shard is damaged, a sample lacks its image or label, or a limit is exceeded.
    """
    paths, places, labels = _shards(folder), array("q"), array("q")
    ignored = _others(folder)
    first: _Shard | None = None
    for number, path in enumerate(paths):
        try:
            shard = _index_tar(path, label) if path.suffix.lower() == ".tar" else _index_npz(path, label)
        except (
            OSError, ValueError, EOFError, SyntaxError, TypeError, RuntimeError, MemoryError, tarfile.TarError,
            zipfile.BadZipFile,
        ) as exc:  # fmt: skip
            raise TrainError(f"{path} cannot be used as a shard: {exc}. Copy or make it again.") from exc
        if shard is None:
            continue
        first = first or shard
        if (shard.sample_shape, shard.stored) != (first.sample_shape, first.stored):
            raise TrainError(
                f"{path} holds {shard.sample_shape} stored as {shard.stored}, expected {first.sample_shape} as "
                f"{first.stored} like the first shard."
            )
        if shard.class_names != first.class_names:
            raise TrainError(f"{path} names other classes than the first shard. Label them alike.")
        ignored += shard.ignored
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
        return Index(images=images, labels=None, class_names=(), ignored=ignored)
    marked = np.frombuffer(labels, np.int64)
    names = _class_names(folder, first.class_names, int(marked.max()))
    return Index(images=images, labels=marked, class_names=names, ignored=ignored)


def _others(folder: Path) -> Counter[str]:
    """Count the other files next to shards, by extension.

    Raises:
        TrainError: If one of them is also training data, which makes the source ambiguous.
    """
    kinds = {path.suffix.lower(): path for path in folder.iterdir() if path.is_file() and path.name != NAMES_FILE}
    data = [kind for kind in kinds if kind in {".tar", ".npz"} | SUFFIXES]
    if len(data) > 1:
        raise TrainError(
            f"{folder} holds {' and '.join(kinds[kind].name for kind in data)}, expected shards of one kind and no "
            "other pictures. Move one of the kinds to a folder of its own."
        )
    return Counter(
        path.suffix.lower() or path.name
        for path in folder.iterdir()
        if path.is_file() and path.name != NAMES_FILE and path.suffix.lower() not in data
    )


class _HeadersOnly(io.RawIOBase):
    """A tar file with limits on the size of its headers."""

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
        raise ConfigError(f"label is {label!r}, expected {LABEL!r} for tar shards, or nothing (--label).")
    places, labels, stored, ignored = array("q"), array("q"), "", Counter[str]()
    key, image, mark, dotted = "", (0, 0), -1, ""

    def close() -> None:
        """End a sample."""
        if key and not image[1] and dotted:
            raise ValueError(f"{dotted!r} has a dot in its name, which ends at the first; rename it")
        if key and not image[1]:
            raise ValueError(f"sample {key!r} has no image")
        if key and label and mark < 0:
            raise ValueError(f"sample {key!r} has no .{LABEL}")
        if key:
            places.extend(image)
            labels.append(mark)

    with open_regular(path) as stream, tarfile.open(fileobj=_HeadersOnly(stream), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or all of them would stay in memory
            folder, _, base = member.name.rpartition("/")
            name, _, ending = base.partition(".")
            kind = {ARRAYS: ARRAYS, LABEL: LABEL}.get(ending.lower(), "image" if ending.lower() in IMAGES else "")
            more = not kind and base.lower().rpartition(".")[2] in {*IMAGES, ARRAYS}  # as in 0007.mask.png
            if member.isreg() and not kind:
                ignored["." + ending.lower()] += 1
            if not (kind or more) or not member.isreg():
                continue
            name = f"{folder}/{name}" if folder else name
            if name != key:
                close()
                key, image, mark, dotted = name, (0, 0), -1, ""
            if more:
                dotted = dotted or member.name
                continue
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
    return _Shard(stored=stored, sample_shape=shape, dtype=dtype, places=places, labels=labels, ignored=ignored)


def _look_at(content: bytes, stored: str) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """Return (H, W, C) and dtype of an image without decoding it."""
    if stored == ARRAYS:
        shape, dtype = read_npy_header(io.BytesIO(content))
        return as_sample_shape(shape), dtype
    return as_sample_shape(look_at(content, max_pixels=shards.MAX_SAMPLE_BYTES)), np.dtype(np.uint8)


def _read_label(stream: IO[bytes], member: tarfile.TarInfo) -> int:
    at = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(member.size).strip()
    stream.seek(at)
    if not text.isdigit() or int(text) >= MAX_CLASSES:
        raise ValueError(f"{member.name!r} holds {text!r}, expected a class number")
    return int(text)


def _index_npz(path: Path, label: str) -> _Shard | None:
    with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
        start, shape, dtype = _array_in(stream, archive, "images")
        if len(shape) not in (3, 4) or (dtype != np.uint8 and dtype.kind != "f"):
            raise ValueError(f"'images' is {shape} of {dtype}, expected (N, H, W, C) of uint8 or floats")
        sample = as_sample_shape(shape[1:])
        each = math.prod(sample) * dtype.itemsize
        places, labels = array("q"), array("q")
        names: tuple[str, ...] = ()
        for row in range(shape[0]):
            places.extend((start + row * each, each))
        if label:
            columns = sorted(name.removesuffix(".npy") for name in archive.namelist())
            if label not in columns:
                known = [name for name in columns if name != "images" and not name.endswith("_names")]
                raise ConfigError(f"label {label!r} is no column of {path}, expected one of {known} (--label).")
            at, length, kind = _array_in(stream, archive, label)
            if length != shape[:1] or kind.kind not in "ui":
                raise ValueError(f"label column {label!r} is {length} of {kind}, expected {shape[:1]} of integers")
            stream.seek(at)
            values = np.frombuffer(stream.read(length[0] * kind.itemsize), kind).astype(np.int64)
            if len(values) and not 0 <= values.min() <= values.max() < MAX_CLASSES:
                raise ValueError(f"label column {label!r} reaches from {values.min()} to {values.max()}")
            labels.extend(values.tolist())
            names = _names_in(stream, archive, f"{label}_names")
    if not places:
        return None
    return _Shard(
        stored=dtype, sample_shape=sample, dtype=dtype, places=places, labels=labels,
        class_names=names,
    )  # fmt: skip


def _names_in(stream: IO[bytes], archive: zipfile.ZipFile, name: str) -> tuple[str, ...]:
    """Return the class names in an npz file, or ()."""
    if f"{name}.npy" not in archive.namelist():
        return ()
    if archive.getinfo(f"{name}.npy").file_size > MAX_NAMES_BYTES:
        raise ValueError(f"array {name!r} is larger than allowed")
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as arrays:
        return tuple(map(str, arrays[name]))


def _array_in(stream: IO[bytes], archive: zipfile.ZipFile, name: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Return the data offset, shape and dtype of an array in an npz file."""
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


def _class_names(folder: Path, stored: tuple[str, ...], last: int) -> tuple[str, ...]:
    """Return the class names from ``class_names.txt`` or the shards, or the class numbers."""
    path = folder / NAMES_FILE
    source: Path = folder
    names = stored or tuple(map(str, range(last + 1)))
    if path.exists():
        source = path
        try:
            text = read_regular(path, most=MAX_NAMES_BYTES).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as exc:
            raise TrainError(f"{path} cannot be read: {exc}. Write the names as UTF-8, one a line.") from exc
        names = tuple(line.strip() for line in text.rstrip().split("\n"))
    if len(names) <= last:
        raise TrainError(f"{source} names {len(names)} classes, the shards have numbers up to {last}.")
    return check_class_names(names, source)


def check_class_names(names: tuple[str, ...], source: object) -> tuple[str, ...]:
    """Check that class names are unique and printable.

    Raises:
        TrainError: If a name is empty, not unique, or unprintable.
    """
    counts = Counter(names)
    for number, name in enumerate(names):
        if not name or not name.isprintable() or counts[name] > 1:
            what = "twice" if counts[name] > 1 else "no printable text"
            raise TrainError(f"class {number} of {source} is {name!r}, {what}; expected names that differ.")
    return names
