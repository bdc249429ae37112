"""Images to train on, from what people have: the shipped avatars, Fashion-MNIST, a folder, an npz, shards.

They are held in memory as uint8 and normalized batch by batch; those in ``shards`` stay on disk.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import TrainError
from .config import DataConfig
from .shard_index import holds_shards, index_shards

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
FASHION_FILES = {"fashion-mnist": "train", "fashion-mnist-t10k": "t10k"}
"""Source by source the first part of its files' names: 60,000 pictures, and the 10,000 that are held out."""
HAIR_NAMES = (
    "blue", "black", "brown", "chestnut", "burgundy", "auburn", "light brown", "green", "dark blond", "red", "blond",
)  # fmt: skip
"""What people call the avatars' eleven hair colours, in the order of ``hairColor_names``."""
AVATARS = ("avatars", "pixel_art_16.npz")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MAX_BYTES = 16 << 30


class Images(Protocol):
    """An array (N, H, W, C), or what stands in for one: some rows of it are an array, a slice need not be."""

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
        label_values: The names as the data has them, where people call them something else: the
            avatars' exact colours.
        license: SPDX identifier of the images' licence, or "" where it is not known.
    """

    images: Images
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    label_values: tuple[str, ...] = ()
    license: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 without labels."""
        return len(self.class_names)

    def describe(self) -> str:
        """Return how many images there are, of which size, and the classes, for people."""
        height, width, channels = self.images.shape[1:]
        classes = f", {self.num_classes} classes: {shortened(self.class_names)}" if self.class_names else ", no labels"
        return f"{len(self):,} pictures of {height}x{width}x{channels}{classes}"

    def part(self, first: int, last: int, *, what: str) -> ImageData:
        """Return some rows, without copying.

        Args:
            first: The first row.
            last: The last plus one.
            what: What the rows are, for the error.

        Raises:
            TrainError: If there are no such rows.
        """
        if not 0 <= first < last <= len(self):
            raise TrainError(f"{what} are {first}..{last}, expected a range within the {len(self)} images of the data.")
        labels = None if self.labels is None else self.labels[first:last]
        return replace(self, images=self.images[first:last], labels=labels)

    def normalized(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return some images as (B, C, H, W), float32 in [-1, 1]."""
        chosen = self.images[rows]
        if chosen.dtype == np.uint8:
            chosen = chosen.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return np.ascontiguousarray(chosen.transpose(0, 3, 1, 2), dtype=np.float32)


def load_data(config: DataConfig) -> ImageData:
    """Load what a config names.

    Raises:
        TrainError: If the source is absent or unreadable, holds images of unequal shape, a NaN, an
            unknown label column, or fewer rows than asked for.
    """
    if config.source == AVATARS[0]:
        data = _read_npz(Path(str(files("scm_sdk.assets") / AVATARS[1])), config.label)
        data = replace(data, license="cc0-1.0")
        if config.label == "hairColor":
            data = replace(data, class_names=HAIR_NAMES, label_values=data.class_names)
    elif config.source in FASHION_FILES:
        data = replace(_read_fashion_mnist(FASHION_FILES[config.source], config.label), license="mit")
    elif config.source.endswith(".npz"):
        data = _read_npz(Path(config.source), config.label)
    elif holds_shards(Path(config.source)):
        index = index_shards(Path(config.source), config.label)
        data = ImageData(images=index.images, labels=index.labels, class_names=index.class_names)
    else:
        data = _read_folder(Path(config.source), config.label)
    return data if config.rows == (0, 0) else data.part(*config.rows, what="rows (--rows)")


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Return a list of names for people: the first of them, and how many follow."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_npz(path: Path, label: str) -> ImageData:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            columns = sorted(k for k in archive.files if k != "images" and not k.endswith("_names"))
            if "images" not in archive.files:
                raise TrainError(f"{path} holds {archive.files}, expected an array called 'images' (N, H, W, C).")
            images = archive["images"]
            if not label:
                return ImageData(images=_checked(images, str(path)))
            if label not in columns:
                raise TrainError(f"label {label!r} is no column of {path}, expected one of {columns} (--label).")
            labels = archive[label].astype(np.int64)
            name_key = f"{label}_names"
            names = (
                tuple(map(str, archive[name_key]))
                if name_key in archive.files
                else tuple(map(str, range(int(labels.max()) + 1)))
            )
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as exc:
        raise TrainError(f"{path} cannot be read as an npz of arrays: {exc}.") from exc
    if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= len(names):
        raise TrainError(f"label column {label!r} of {path} does not give each of the {len(images)} images a name.")
    return ImageData(images=_checked(images, str(path)), labels=labels, class_names=names)


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
    if np.abs(values).max() > 1.001:
        raise TrainError(f"images of {source} reach {np.abs(values).max():.3g}, expected floats in [-1, 1].")
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
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise TrainError(f"data source {str(folder)!r} is no folder, .npz file, 'avatars' or 'fashion-mnist'.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise TrainError(f"{folder} holds no images, expected files ending in {', '.join(sorted(SUFFIXES))}.")
    if label not in ("", "folder"):
        raise TrainError(f"label is {label!r}, expected 'folder' (classes are the sub-folders) or nothing.")

    def read() -> Iterator[NDArray[np.uint8]]:
        for path in paths:
            try:
                with Image.open(path) as image:
                    yield np.asarray(image.convert("RGB"))
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as exc:
                raise TrainError(f"{path} cannot be read as an image: {exc}. Remove or replace it.") from exc

    stack: NDArray[np.uint8] | None = None
    for row, pixels in enumerate(read()):
        if stack is None:
            if pixels.nbytes * len(paths) > MAX_BYTES:
                raise TrainError(f"{len(paths)} images of {pixels.shape} do not fit into {MAX_BYTES >> 30} GiB.")
            stack = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != stack.shape[1:]:
            raise TrainError(f"{paths[row]} is {pixels.shape}, expected {stack.shape[1:]} like the first image.")
        stack[row] = pixels
    assert stack is not None
    if not label:
        return ImageData(images=stack)
    names = tuple(sorted({path.parent.name for path in paths}))
    labels = np.array([names.index(path.parent.name) for path in paths], np.int64)
    return ImageData(images=stack, labels=labels, class_names=names)
