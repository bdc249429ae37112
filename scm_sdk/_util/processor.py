"""The processor: its name, class, instruction sets and usable cores."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_CLASSES: dict[str, set[str]] = {  # the first whose flags are all there
    "amx_bf16": {*_AVX512, "amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": {*_AVX512, "avx512_vnni", "avx512_bf16"},
    "avx512_vnni": {*_AVX512, "avx512_vnni"},
    "avx512": _AVX512,
    "avx2_vnni": {"avx2", "fma", "avx_vnni"},
    "avx2": {"avx2", "fma"},
    "sse4_1": {"sse4_1"},
    "arm_bf16": {"asimd", "asimddp", "bf16"},
    "arm_dotprod": {"asimd", "asimddp"},
    "arm": {"asimd"},
}
BF16_CLASSES = frozenset({"amx_bf16", "avx512_bf16", "arm_bf16"})
"""Classes with instructions for products of bfloat16; the others emulate it, at a fifth of the speed of float32."""
INT8_CLASSES = frozenset({"amx_bf16", "avx512_bf16", "avx512_vnni", "avx2_vnni", "arm_bf16", "arm_dotprod"})
"""Classes with instructions that add up products of int8 without saturating."""
UNKNOWN_CLASS = "unknown"
_MAX_ISA = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_BEST_OF_ISA = {  # the best class that oneDNN uses under each value of the variable
    "SSE41": "sse4_1", "AVX": "sse4_1", "AVX2": "avx2", "AVX2_VNNI": "avx2_vnni", "AVX2_VNNI_2": "avx2_vnni",
    "AVX512_CORE": "avx512", "AVX512_CORE_VNNI": "avx512_vnni", "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_bf16", "AVX10_1_512": "avx512_bf16",
}  # fmt: skip


def cpu_class() -> str:
    """Return the class of the processor, by the instructions that arithmetic on it uses.

    ``ONEDNN_MAX_CPU_ISA`` lowers it, as it does for OpenVINO and PyTorch; they read it when they are imported.

    Returns:
        One of ``amx_bf16``, ``avx512_bf16``, ``avx512_vnni``, ``avx512``, ``avx2_vnni``, ``avx2``, ``sse4_1``,
        ``arm_bf16``, ``arm_dotprod`` and ``arm``; ``unknown`` where the system does not report it.
    """
    return class_of(_flags(), next((value for name in _MAX_ISA if (value := os.environ.get(name))), ""))


def class_of(flags: Iterable[str], max_isa: str = "") -> str:
    """Return the class of a processor with these flags, as ``/proc/cpuinfo`` names them.

    Args:
        flags: Its flags.
        max_isa: Value of ``ONEDNN_MAX_CPU_ISA``; "" and values that oneDNN does not know limit nothing.
    """
    there, names = set(flags), list(_CLASSES)
    best = _BEST_OF_ISA.get(max_isa.upper(), names[0])
    return next((name for name in names[names.index(best) :] if _CLASSES[name] <= there), UNKNOWN_CLASS)


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


@cache
def _flags() -> frozenset[str]:
    """Return the processor's flags as the system names them; none where it does not report them."""
    return frozenset((next(_cpuinfo("flags"), "") or next(_cpuinfo("Features"), "")).split())


def platform_tag() -> str:
    """Return ``<system>-<machine>`` of this machine in lower case, for example ``linux-x86_64``."""
    return f"{platform.system()}-{platform.machine()}".lower()
