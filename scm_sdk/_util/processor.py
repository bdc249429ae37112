"""The processor: its name, instruction sets and usable cores."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_INT8_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp", "amx_int8"}


def cpu_name() -> str:
    """Return the processor's name as the system gives it, or "unknown"."""
    return next(_cpuinfo("model name"), "") or platform.processor() or "unknown"


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: those of its cpuset, and no more than its CPU quota fills.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def limited_threads() -> int | None:
    """Return the threads that a library is to use where the process may not use all cores; else None.

    The libraries count the machine's cores, whatever a container was given of them.
    """
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else None


def calls_side_by_side(num_threads: int | None) -> int:
    """Return how many calls of so many threads the cores hold beside one another; 1 where a call takes them all."""
    return 1 if num_threads is None else max(1, usable_cores() // num_threads)


def has_int8_dot_product() -> bool | None:
    """Return whether the processor adds int8 products without saturating; None where it cannot be told."""
    flags = next(_cpuinfo("flags"), "") or next(_cpuinfo("Features"), "")
    return bool(_INT8_DOT_PRODUCTS & set(flags.split())) if flags else None


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of the control groups that this process is in, versions 1 and 2."""
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
        # A group's quota binds all below it. In a container the mount may begin at the group itself.
        for folder in dict.fromkeys(mount / each for mount in mounts for each in (inside, *inside.parents)):
            quota, period = [*_words(folder / "cpu.max"), "", ""][:2] if not controllers else (
                "".join(_words(folder / "cpu.cfs_quota_us")), "".join(_words(folder / "cpu.cfs_period_us"))
            )  # fmt: skip
            if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):  # neither "max" nor -1
                yield int(quota) / int(period)


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of the system; none where it has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cpuinfo(key: str) -> Iterator[str]:
    """Yield the values of a key in /proc/cpuinfo; nothing on systems without it."""
    pairs = (line.partition(":") for line in _lines(Path("/proc/cpuinfo")))
    yield from (value.strip() for name, _, value in pairs if name.strip() == key)
