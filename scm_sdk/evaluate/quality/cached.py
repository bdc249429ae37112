"""A folder cache of arrays, keyed by their inputs."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._util.files import atomic_write_bytes
from ...errors import IntegrityError


def cached(
    folder: Path | None,
    kind: str,
    key: str,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    make: Callable[[], NDArray[Any]],
) -> NDArray[Any]:
    """Read an array from the cache, or compute and store it atomically.

    Args:
        folder: Folder of ``<kind>-<key>.npz``, created if missing; None caches nothing.
        kind: Kind of array, ``features`` or ``pictures``.
        key: sha256 of everything that decides the array.
        shape: Shape of the array.
        dtype: dtype of the array.
        make: Computes the array.

    Raises:
        IntegrityError: If the file is damaged or holds another array.
    """
    if folder is None:
        return make()
    path = folder / f"{kind}-{key[:32]}.npz"
    if path.exists():
        return _read(path, kind, key, shape, dtype)
    array = make()
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {kind: array, "key": np.array(key)}
    np.savez(buffer, **arrays)
    atomic_write_bytes(path, buffer.getvalue())
    return array


def _read(path: Path, kind: str, key: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    try:
        # From memory, because np.load leaves a file open that is not an archive.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            array, found = archive[kind], str(archive["key"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
        raise IntegrityError(f"{path} is not a readable cache of {kind} ({exc}). Delete it and run again.") from exc
    if found != key or array.shape != shape or array.dtype != dtype:
        raise IntegrityError(
            f"{path} holds {array.dtype} {kind} {array.shape} of other images, expected "
            f"{np.dtype(dtype)} {shape}. Delete it and run again."
        )
    return np.asarray(array)
