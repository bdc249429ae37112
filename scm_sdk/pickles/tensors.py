"""Read tensors and arrays from a pickle without torch.

torch pickles a tensor as a view of a storage, and a storage as a file inside the file: five small pickles (magic
number, version, byte order, the storage's type, its key), then for the key its number of elements and its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .allowed import Allowed, Budget, Buildable
from .machine import read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
MAX_RANK = 16
STORAGE_DTYPES = {
    "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2), "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1), "BoolStorage": ("bool", 1),
}  # fmt: skip
"""safetensors dtype and bytes per element, by torch storage class."""
_MAX_SIZE = 2**48
"""Maximum number of elements of a tensor."""
_STORAGES = {f"torch.{name}": Allowed() for name in STORAGE_DTYPES}


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage: ``data`` holds ``count`` elements."""

    dtype: str
    element_bytes: int
    data: memoryview

    @property
    def count(self) -> int:
        """Number of elements."""
        return len(self.data) // self.element_bytes


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of the file.

    Attributes:
        storage: Storage that holds its elements.
        offset: Index of its first element.
        shape: Shape.
        strides: Stride of each axis, elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in row-major order, bytes."""
        return math.prod(self.shape) * self.storage.element_bytes

    def tobytes(self) -> bytes:
        """Return the elements in row-major order, little-endian."""
        size = self.storage.element_bytes
        flat = np.frombuffer(self.storage.data, dtype=f"<u{size}")[self.offset :]
        strides = tuple(stride * size for stride in self.strides)
        # rebuild_tensor has checked that the last element is inside the storage.
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides).tobytes()

    def numpy(self) -> NDArray[Any]:
        """Return an array; bfloat16, which numpy lacks, becomes float32."""
        data = self.tobytes()
        if self.storage.dtype == "bfloat16":
            wide = np.frombuffer(data, "<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        return np.frombuffer(data, self.storage.dtype).reshape(self.shape)


def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """Placeholder of ``torch._utils._rebuild_tensor_v2``; gradient information is dropped.

    Raises:
        ValueError: If the tensor is not inside its storage.
    """
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    shape, strides = _shape(shape), _sizes(strides)
    if len(shape) != len(strides) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor whose shape and strides do not fit")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.count:
        raise ValueError(f"a tensor that ends at element {last} of {storage.count}")
    if 0 in shape:
        offset = 0
    return StoredTensor(storage, offset, shape, strides)


def rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    """Placeholder of ``torch._utils._rebuild_parameter``: the tensor."""
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a parameter without a tensor")
    return tensor


def storage_reader(where: str, budget: Budget) -> Callable[[Any], Storage]:
    """Return the placeholder of ``torch.storage._load_from_bytes``: a reader of torch's older file format."""

    def read(data: Any) -> Storage:
        if not isinstance(data, memoryview):
            raise ValueError("a storage that is no bytes")
        inner = f"{where} (a tensor's storage)"
        magic, at = read_pickle(data, {}, where=inner, budget=budget)
        version, at = read_pickle(data, {}, where=inner, budget=budget, at=at)
        system, at = read_pickle(data, {}, where=inner, budget=budget, at=at)
        if (type(magic), type(version), type(system)) != (int, int, dict) or (magic, version) != (_MAGIC, _VERSION):
            raise ValueError("a storage that torch did not write, or a torch newer than this reader")
        if system.get("little_endian") is not True:
            raise ValueError("a storage of a big-endian machine")
        declared, at = read_pickle(data, _STORAGES, where=inner, budget=budget, at=at, persistent=_declare)
        keys, at = read_pickle(data, {}, where=inner, budget=budget, at=at)
        if not isinstance(declared, _Declared) or type(keys) is not list or keys != [declared.key]:
            raise ValueError("a storage that is not alone in its file")
        element_bytes = STORAGE_DTYPES[declared.kind][1]
        count = struct.unpack("<q", data[at : at + 8])[0] if len(data) >= at + 8 else -1
        if count != declared.count or len(data) != at + 8 + count * element_bytes:
            raise ValueError(f"a storage of {len(data) - at - 8} bytes, expected {declared.count} elements")
        return Storage(STORAGE_DTYPES[declared.kind][0], element_bytes, data[at + 8 :])

    return read


@dataclass(frozen=True)
class _Declared:
    kind: str
    key: str
    count: int


def _declare(persistent_id: Any) -> _Declared:
    """Read ``("storage", type, key, device, count, view)``."""
    if type(persistent_id) is not tuple or len(persistent_id) != 6:
        raise ValueError("a persistent id that is not a storage's")
    label, kind, key, _, count, view = persistent_id
    name = getattr(kind, "name", "")
    if (
        label != "storage"
        or name not in _STORAGES
        or type(key) is not str
        or type(count) is not int
        or view is not None
    ):
        raise ValueError("a persistent id that is not a storage's")
    return _Declared(name.removeprefix("torch."), key, count)


class StoredDtype(Buildable):
    """Placeholder of ``numpy.dtype``: numbers of at most 8 bytes."""

    def __init__(self, code: Any, *_: Any) -> None:
        if type(code) is not str or code not in {
            "f2",
            "f4",
            "f8",
            "i1",
            "i2",
            "i4",
            "i8",
            "u1",
            "u2",
            "u4",
            "u8",
            "b1",
        }:
            raise ValueError("an array of something other than numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Set the byte order."""
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if order not in ("<", "|", "="):
            raise ValueError("an array of a big-endian machine")


class StoredArray(Buildable):
    """Placeholder of ``numpy.ndarray``."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] | None = None

    def build(self, state: Any) -> None:
        """Set ``(version, shape, dtype, is_fortran, bytes)``."""
        if self.array is not None or type(state) is not tuple or len(state) != 5:
            raise ValueError("an array of an unknown form")
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, StoredDtype) or not isinstance(data, memoryview):
            raise ValueError("an array of something other than numbers")
        shape = _shape(shape)
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"an array of {len(data)} bytes, expected {shape} of {dtype.dtype}")
        flat = np.frombuffer(data, dtype.dtype.newbyteorder("<"))
        self.array = flat.reshape(shape, order="F") if is_fortran is True else flat.reshape(shape)


def array_of_buffer(*arguments: Any) -> StoredArray:
    """Placeholder of numpy's ``_frombuffer(bytes, dtype, shape, order)``, which protocol 5 uses."""
    if len(arguments) != 4 or arguments[3] not in ("C", "F"):
        raise ValueError("an array of an unknown form")
    data, dtype, shape, order = arguments
    array = StoredArray()
    array.build((1, shape, dtype, order == "F", data))
    return array


def read_scalar(dtype: Any, data: Any) -> float | int:
    """Placeholder of ``numpy.core.multiarray.scalar``: a Python number."""
    if not isinstance(dtype, StoredDtype) or not isinstance(data, memoryview) or len(data) != dtype.dtype.itemsize:
        raise ValueError("a number of an unknown form")
    value = np.frombuffer(data, dtype.dtype.newbyteorder("<"))[0].item()
    return float(value) if isinstance(value, float) else int(value)


def _shape(value: Any) -> tuple[int, ...]:
    """Return a valid shape; for an empty array the other axes are limited too."""
    shape = _sizes(value)
    if math.prod(size or 1 for size in shape) >= _MAX_SIZE:
        raise ValueError(f"a shape of {shape}")
    return shape


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_RANK:
        raise ValueError("a shape that is none")
    if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in value):
        raise ValueError("a shape that is none")
    return value
