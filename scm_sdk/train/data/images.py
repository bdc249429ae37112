"""Training images: the shipped avatars, Fashion-MNIST, a folder, an npz file, or shards.

Images are kept in memory as uint8 and normalized per batch; those in ``shards`` stay on disk.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..._util.files import open_regular
from ...errors import ConfigError, TrainError
from ..config import DataConfig
from .pictures import SUFFIXES, decode_picture
from .shard_index import MAX_CLASSES, check_class_names, holds_shards, index_shards

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
FASHION_FILES = {"fashion-mnist": "train", "fashion-mnist-t10k": "t10k"}
"""Prefix of the file names by source: 60,000 training images, and 10,000 held-out images."""
HAIR_NAMES = (
    "blue", "black", "brown", "chestnut", "burgundy", "auburn", "light brown", "green", "dark blond", "red", "blond",
)  # fmt: skip
"""Color names of the avatars' eleven hair colors, in the order of ``hairColor_names``."""
AVATARS = ("avatars", "pixel_art_16.npz")
MAX_BYTES = 16 << 30


class Images(Protocol):
    """An array (N, H, W, C) or an object like it: indexing with rows returns an array, a slice may be lazy."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        ...

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images and, if they have any, labels.

    Attributes:
        images: (N, H, W, C), uint8 in 0..255, or float32 already in [-1, 1]; floats of other than 1 or 3 channels are
            latents, in any range.
        labels: (N,), int64, or None.
        class_names: Name of each label, or ().
        label_values: The names in the data if they differ from ``class_names``, for example the avatars' exact colors.
        license: SPDX identifier of the images' license, or "" if unknown.
        ignored: Number of skipped files of the source, by extension.
    """

    images: Images
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    label_values: tuple[str, ...] = ()
    license: str = ""
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 without labels."""
        return len(self.class_names)

    def describe(self) -> str:
        """Return the number and size of the images and the classes as text."""
        height, width, channels = self.images.shape[1:]
        classes = f", {self.num_classes} classes: {shortened(self.class_names)}" if self.class_names else ", no labels"
        ignored = ", ".join(f"{count} {kind}" for kind, count in sorted(self.ignored.items()))
        left_out = f"; not trained on: {ignored}" if ignored else ""
        return f"{len(self):,} pictures of {height}x{width}x{channels}{classes}{left_out}"

    def part(self, first: int, last: int, *, what: str) -> ImageData:
        """Return some rows, without copying.

        Args:
            first: The first row.
            last: The last row plus one.
            what: Description of the rows for the error.

        Raises:
            ConfigError: If the rows do not exist.
        """
        if not 0 <= first < last <= len(self):
            raise ConfigError(
                f"{what} are {first}..{last}, expected a range within the {len(self)} images of the data."
            )
        labels = None if self.labels is None else self.labels[first:last]
        return replace(self, images=self.images[first:last], labels=labels)

    def normalized(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return some images as (B, C, H, W), float32 in [-1, 1]."""
        chosen = self.images[rows]
        if chosen.dtype == np.uint8:
            chosen = chosen.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return np.ascontiguousarray(chosen.transpose(0, 3, 1, 2), dtype=np.float32)


def load_data(config: DataConfig) -> ImageData:
    """Load the images of a config.

    Raises:
        ConfigError: If the source, the label column or the rows do not exist.
        TrainError: If the source is unreadable, or its images have different shapes or hold NaN.
    """
    if config.source == AVATARS[0]:
        data = _read_npz(Path(str(files("scm_sdk.assets") / AVATARS[1])), config.label)
        data = replace(data, license="cc0-1.0")
        if config.label == "hairColor":
            data = replace(data, class_names=HAIR_NAMES, label_values=data.class_names)
    elif config.source in FASHION_FILES:
        data = replace(_read_fashion_mnist(FASHION_FILES[config.source], config.label), license="mit")
    elif config.source.lower().endswith((".npz", ".npy")):
        read = _read_npz if config.source.lower().endswith(".npz") else _read_npy
        data = read(Path(config.source), config.label)
    elif holds_shards(Path(config.source)):
        index = index_shards(Path(config.source), config.label)
        data = ImageData(images=index.images, labels=index.labels, class_names=index.class_names, ignored=index.ignored)
    else:
        data = _read_folder(Path(config.source), config.label)
    return data if config.rows == (0, 0) else data.part(*config.rows, what="rows (--rows)")


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Return the first names of a list and the number of the others, as text."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_source(path: Path) -> None:
    if path.is_dir() or not path.exists():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"data source {path} {found}, expected an {path.suffix.lower()} file (--data).")


def _read_npy(path: Path, label: str) -> ImageData:
    _check_source(path)
    if label:
        raise ConfigError(
            f"label is {label!r}, and {path} is one array without labels. Put both into an npz: "
            "numpy.savez(FILE, images=..., LABEL=...)."
        )
    try:
        with open_regular(path) as stream:
            _check_bytes(path, os.fstat(stream.fileno()).st_size)
            images: Any = np.load(stream, allow_pickle=False)
        if not isinstance(images, np.ndarray):
            raise ValueError("it is an npz")
    except TrainError:
        raise
    except Exception as exc:  # as in an npz
        raise TrainError(f"{path} cannot be read as an npy array: {type(exc).__name__}: {exc}.") from exc
    return ImageData(images=_checked(images, str(path)))


def _check_bytes(path: Path, size: int) -> None:
    """Refuse an array that does not fit in memory."""
    if size > MAX_BYTES:
        raise TrainError(
            f"{path} holds {size} bytes in one array, expected at most {MAX_BYTES >> 30} GiB. Split it into several "
            "npz files in a folder: those stay on disk."
        )


def _read_npz(path: Path, label: str) -> ImageData:
    _check_source(path)
    try:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as archive:
            columns = sorted(k for k in archive.files if k != "images" and not k.endswith("_names"))
            if "images" not in archive.files:
                raise TrainError(f"{path} holds {archive.files}, expected an array called 'images' (N, H, W, C).")
            for about in archive.zip.infolist():
                _check_bytes(path, about.file_size)
            images = _checked(archive["images"], str(path))
            if not label:
                return ImageData(images=images)
            if label not in columns:
                known = f"one of {', '.join(columns)}" if columns else "none: it has no other array"
                raise ConfigError(f"label {label!r} is no column of {path}, expected {known} (--label).")
            given, names = archive[label], archive[f"{label}_names"] if f"{label}_names" in archive.files else None
            if not isinstance(given, np.ndarray) or not isinstance(names, np.ndarray | None):
                raise ValueError(f"{label!r} is no array")
    except (ConfigError, TrainError):
        raise
    except Exception as exc:  # NumPy, zipfile and zlib raise a dozen types for damaged and other files
        raise TrainError(f"{path} cannot be read as an npz of arrays: {type(exc).__name__}: {exc}.") from exc
    if given.shape != (len(images),) or given.dtype.kind not in "iub":
        raise TrainError(
            f"label column {label!r} of {path} is {given.shape} {given.dtype}, expected a whole number for each of the "
            f"{len(images)} images."
        )
    lowest, highest = int(given.min()), int(given.max())
    if not 0 <= lowest <= highest < (MAX_CLASSES if names is None else len(names)):
        raise TrainError(
            f"label column {label!r} of {path} reaches from {lowest} to {highest}, expected class numbers from 0 to "
            f"{(MAX_CLASSES if names is None else len(names)) - 1}. Number the classes from 0 on."
        )
    texts = range(highest + 1) if names is None else names
    class_names = check_class_names(tuple(map(str, texts)), f"{label}_names in {path}")
    return ImageData(images=images, labels=given.astype(np.int64), class_names=class_names)


def _checked(images: NDArray[np.generic], source: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise TrainError(f"images of {source} have shape {images.shape}, expected (N, H, W, 1 or 3).")
    if images.dtype == np.uint8:
        return images  # type: ignore[return-value]
    if images.dtype.kind != "f":
        raise TrainError(f"images of {source} are {images.dtype}, expected uint8 or floats in [-1, 1].")
    values = images.astype(np.float32)
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise TrainError(
            f"image {int(np.argmin(finite))} of {source} holds a NaN or an infinity "
            f"({int((~finite).sum())} images do). Remove them."
        )
    low, high = float(values.min()), float(values.max())
    if max(-low, high) > 1.001:
        raise TrainError(f"images of {source} reach {max(-low, high):.3g}, expected floats in [-1, 1].")
    if low >= 0 and high > 0.5:
        raise TrainError(
            f"images of {source} are floats from {low:.3g} to {high:.3g}, expected [-1, 1] with black at -1. Store "
            "2 x - 1, or uint8 from 0 to 255."
        )
    return values


def _read_fashion_mnist(part: str, label: str) -> ImageData:
    folder = FASHION_MNIST
    try:
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as stream:
            images = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as stream:
            labels = np.frombuffer(stream.read(), np.uint8, offset=8).astype(np.int64)
    except FileNotFoundError as exc:
        raise TrainError(
            f"Fashion-MNIST is not in {folder}. Install it with: apt-get install dataset-fashion-mnist"
        ) from exc
    except (OSError, ValueError, EOFError) as exc:
        raise TrainError(f"Fashion-MNIST in {folder} cannot be read: {exc}. Install it again.") from exc
    # 28 pixels become 32, so that resolutions halve evenly.
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    if not label:
        return ImageData(images=padded)
    return ImageData(images=padded, labels=labels, class_names=FASHION_NAMES)


def _read_folder(folder: Path, label: str) -> ImageData:
    if not folder.is_dir():
        raise ConfigError(
            f"data source {str(folder)!r} does not exist, expected a folder, an .npz or .npy file, avatars or "
            "fashion-mnist (--data)."
        )
    if label not in ("", "folder"):
        raise ConfigError(f"label is {label!r}, expected 'folder' (classes are the sub-folders) or nothing (--label).")
    paths, ignored = _pictures_in(folder)
    if not paths:
        raise TrainError(f"{folder} holds no images, expected files ending in {', '.join(sorted(SUFFIXES))}.")
    classes = [_class_of(path, folder) for path in paths] if label else []
    stack: NDArray[np.uint8] | None = None
    for row, path in enumerate(paths):
        try:
            pixels = decode_picture(path)
        except ValueError as exc:
            raise TrainError(f"{path} cannot be read as an image: {exc}. Remove or replace it.") from exc
        if stack is None:
            if pixels.nbytes * len(paths) > MAX_BYTES:
                raise TrainError(f"{len(paths)} images of {pixels.shape} do not fit into {MAX_BYTES >> 30} GiB.")
            stack = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != stack.shape[1:]:
            raise TrainError(f"{path} is {pixels.shape}, expected {stack.shape[1:]} like the first image.")
        stack[row] = pixels
    assert stack is not None
    if not label:
        return ImageData(images=stack, ignored=ignored)
    names = check_class_names(tuple(sorted(set(classes))), folder)
    number = {name: index for index, name in enumerate(names)}
    labels = np.array([number[name] for name in classes], np.int64)
    return ImageData(images=stack, labels=labels, class_names=names, ignored=ignored)


def _pictures_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the sorted image files of a folder and its subfolders, and the number of other files by extension.

    Links are followed; hidden files are skipped and counted.

    Raises:
        TrainError: If links form a cycle, or a folder cannot be read.
    """
    paths: list[Path] = []
    ignored: Counter[str] = Counter()

    def refuse(exc: OSError) -> None:
        raise TrainError(f"{exc.filename} cannot be read: {exc.strerror}. Make it readable or remove it.") from exc

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(root)
        if here.resolve() in [(folder / above).resolve() for above in here.relative_to(folder).parents]:
            raise TrainError(f"{here} is a link to a folder that contains it. Remove it.")
        ignored["hidden folders"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                ignored["hidden files"] += 1
            elif suffix in SUFFIXES:
                paths.append(here / name)
            else:
                ignored[suffix or name] += 1
    return sorted(paths), +ignored


def _class_of(path: Path, folder: Path) -> str:
    """Return the class of an image: the folder between it and the data folder."""
    between = path.relative_to(folder).parts[:-1]
    if len(between) != 1:
        raise TrainError(
            f"{path} is {len(between)} folders below {folder}, expected 1: FOLDER/CLASS/PICTURE with --label folder. "
            "Choose the folder whose sub-folders are the classes, or move the picture."
        )
    return between[0]
