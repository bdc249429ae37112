"""Which processor this is: what a measured time belongs to, and what an int8 graph may expect of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

_INT8_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp", "amx_int8"}


def cpu_name() -> str:
    """Return the processor's name as the system gives it, or "unknown"."""
    return next(_cpuinfo("model name"), "") or platform.processor() or "unknown"


def usable_cores() -> int:
    """Return how many cores this process may use: of the machine's, those that the system lets it have."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def calls_side_by_side(num_threads: int | None) -> int:
    """Return how many calls of so many threads the cores hold beside one another; 1 where a call takes them all."""
    return 1 if num_threads is None else max(1, usable_cores() // num_threads)


def has_int8_dot_product() -> bool | None:
    """Return whether the processor adds int8 products without saturating; None where it cannot be told."""
    flags = next(_cpuinfo("flags"), "") or next(_cpuinfo("Features"), "")
    return bool(_INT8_DOT_PRODUCTS & set(flags.split())) if flags else None


def _cpuinfo(key: str) -> Iterator[str]:
    """Yield the values of a key in /proc/cpuinfo; nothing on systems without it."""
    try:
        with open("/proc/cpuinfo") as stream:
            lines = stream.readlines()
    except OSError:
        return
    yield from (line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == key)
