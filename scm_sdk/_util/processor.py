"""The processor: its name, instruction sets and usable cores."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_INT8_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp", "amx_int8"}


def cpu_name() -> str:
    """Return the processor name reported by the system, or "unknown"."""
    return next(_cpuinfo("model name"), "") or platform.processor() or "unknown"


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use, by its cpuset and its CPU quota.

    Args:
        root: Folder where ``proc`` and ``sys`` are mounted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def limited_threads() -> int | None:
    """Return the number of threads for a library if the process may not use all cores; else None.

    The libraries count the cores of the machine, not those of the container.
    """
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else None


def concurrent_calls(num_threads: int | None) -> int:
    """Return how many calls of this number of threads can run concurrently; 1 if a call uses all cores."""
    return 1 if num_threads is None else max(1, usable_cores() // num_threads)


def has_int8_dot_product() -> bool | None:
    """Return whether the processor has int8 dot products without saturation; None if unknown."""
    flags = next(_cpuinfo("flags"), "") or next(_cpuinfo("Features"), "")
    return bool(_INT8_DOT_PRODUCTS & set(flags.split())) if flags else None


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of the control groups (v1 and v2) of this process."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mounts = [mounted, mounted / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [mounted / controllers, mounted / "cpu"]
        else:
            continue
        inside = PurePosixPath(group.lstrip("/"))
        # The quota of a group limits its subgroups. In a container the mount may start at the group itself.
        for folder in dict.fromkeys(mount / each for mount in mounts for each in (inside, *inside.parents)):
            quota, period = [*_words(folder / "cpu.max"), "", ""][:2] if not controllers else (
                "".join(_words(folder / "cpu.cfs_quota_us")), "".join(_words(folder / "cpu.cfs_period_us"))
            )  # fmt: skip
            if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):  # neither "max" nor -1
                yield int(quota) / int(period)


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    """Return the lines of a system file; none if the file does not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cpuinfo(key: str) -> Iterator[str]:
    """Yield the values of a key in /proc/cpuinfo; nothing on systems without it."""
    pairs = (line.partition(":") for line in _lines(Path("/proc/cpuinfo")))
    yield from (value.strip() for name, _, value in pairs if name.strip() == key)
