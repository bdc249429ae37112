"""The GPUs of this machine, read from the NVIDIA driver; no CUDA library needs to be installed."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import ConfigError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        index: CUDA device number.
        name: Name from the driver.
        compute_capability: Two numbers, for example ``8.0``.
        memory_bytes: Size of the device memory.
        driver: Highest CUDA version of the driver, for example ``13.0``.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return this machine's GPUs in the driver's order; empty without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return ()
    count, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return ()
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    found = (_describe(cuda, index, driver) for index in range(count.value))
    return tuple(gpu for gpu in found if gpu is not None)


def current_gpu(index: int = 0) -> Gpu | None:
    """Return the GPU with this device number, or None."""
    return next((gpu for gpu in gpus() if gpu.index == index), None)


def _describe(cuda: Any, index: int, driver: str) -> Gpu | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if failed:
        return None
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        memory_bytes=memory.value,
        driver=driver,
    )


def parse_device(device: str) -> tuple[str, int | None]:
    """Split the name of a device, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, into its kind and number.

    Raises:
        ConfigError: If what follows the colon is not a number.
    """
    kind, colon, number = device.partition(":")
    if colon and not (number.isascii() and number.isdecimal()):
        raise ConfigError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N', where N is a number.")
    return kind, int(number) if colon else None
