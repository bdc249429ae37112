"""Datasets that do not fit in memory: a folder of tar or npz shards.

Tar shards follow webdataset's convention: the files of one sample share their name up to the first dot, ``0007.png``
and ``0007.cls``. At the start an index of shard, offset and length is built. Each image can then be read on its own, so
batches equal those of images in memory: a seeded permutation of the data set and a pure function of the iteration, for
any number of processes. (A stream with a shuffle buffer, as in webdataset's reader, would depend on the number of
workers, and could resume only by reading everything again.)

Shards are untrusted: nothing is unpacked to disk, pickles are not read, and sizes are checked before memory is
allocated.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..._util.files import open_regular
from ...errors import TrainError
from .pictures import decode_picture

ARRAYS = "npy"
MAX_SAMPLE_BYTES = 64 << 20
"""Maximum size of a stored and of a decoded image, bytes."""
READERS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardImages:
    """Images in shards, with the interface of an array (N, H, W, C).

    Attributes:
        paths: The shards.
        places: Shard, offset and length in bytes of each image, (N, 3), int64.
        sample_shape: (H, W, C) of an image.
        dtype: uint8, or float32 if the shards hold floating-point arrays.
        stored: Storage format: ``image`` file, ``npy`` file, or the bytes of an array of this dtype.
    """

    paths: tuple[Path, ...]
    places: NDArray[np.int64]
    sample_shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    stored: str | np.dtype[Any]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self), *self.sample_shape)

    @property
    def size(self) -> int:
        """Number of elements of all images."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, rows: Any) -> Any:
        """Return some images as an array (B, H, W, C), or, for a slice, the images without reading them.

        Raises:
            TrainError: If an image cannot be read, differs in shape from the first, or is not finite.
        """
        if isinstance(rows, slice):
            return replace(self, places=self.places[rows])
        chosen = self.places[rows]
        with ThreadPoolExecutor(READERS) as readers:
            return np.stack(list(readers.map(self._read, chosen)))

    def _read(self, place: NDArray[np.int64]) -> NDArray[Any]:
        path, offset, length = self.paths[int(place[0])], int(place[1]), int(place[2])
        try:
            with open_regular(path) as stream:
                stream.seek(offset)
                content = stream.read(length)
            if len(content) != length:
                raise ValueError("the file ends before it")
            pixels = decode(content, self.stored, self.sample_shape)
        except (OSError, ValueError) as exc:
            raise TrainError(
                f"the image at byte {offset} of {path} cannot be read as one like the first: {exc}. Copy or make the "
                "shard again."
            ) from exc
        return pixels


def decode(content: bytes, stored: str | np.dtype[Any], shape: tuple[int, int, int]) -> NDArray[Any]:
    """Return one image as (H, W, C), uint8 or float32; its shape is checked before it is decoded.

    Raises:
        ValueError: If it is damaged or has another shape.
    """
    if stored == "image":
        return decode_picture(content, shape=shape)
    if isinstance(stored, str):
        stream = io.BytesIO(content)
        found, dtype = read_npy_header(stream)
        if as_sample_shape(found) != shape:
            raise ValueError(f"it is {found}, expected {shape}")
        content = content[stream.tell() :]
    else:
        dtype = stored
    if len(content) != int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"it holds {len(content)} bytes, which are not {shape} of {dtype}")
    values = np.frombuffer(content, dtype).reshape(shape)
    if dtype == np.uint8:
        return values
    values = values.astype(np.float32)
    limit = 1.001 if shape[2] in (1, 3) else np.inf
    if not np.isfinite(values).all() or np.abs(values).max() > limit:
        raise ValueError("it holds a NaN, an infinity, or pixels outside [-1, 1]")
    return values


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an npy file and position the stream at its data.

    Raises:
        ValueError: If it is not an npy header, or has Fortran order or an unsupported dtype.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"npy format {version} is not known")
    shape, fortran, dtype = read(stream)
    if fortran or dtype.kind not in "uif" or any(n < 0 for n in shape):
        raise ValueError(f"it is an array of {dtype}, expected numbers in C order")
    return shape, dtype


def as_sample_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (H, W, C) of the array of one image.

    Raises:
        ValueError: If it is not the shape of an image, or too large.
    """
    whole = (*shape, 1) if len(shape) == 2 else shape
    if len(whole) != 3 or min(whole) < 1 or np.prod(whole, dtype=np.float64) > MAX_SAMPLE_BYTES:
        raise ValueError(f"it is {shape}, expected (height, width, channels)")
    return (whole[0], whole[1], whole[2])
