"""Description of the machine of a measurement, and the peak memory of the process or of a stage of it."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from .gpu import gpus
from .processor import cpu_class, cpu_name

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kernel_peak_bytes() -> int:
    """Return the peak resident memory of this process as Linux counts it; 0 on other systems."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def peak_rss_mib() -> float | None:
    """Return the peak resident memory of this process, MiB; None if the system does not report it."""
    if peak_bytes := _kernel_peak_bytes():  # Linux: getrusage would include the peak of the parent
        return peak_bytes / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


class PeakMemory:
    """Measures the peak resident memory of the process inside a ``with`` block; Linux only.

    The peak of the kernel is reset, so that a later peak of the process also starts here.

    Attributes:
        bytes: The peak, including memory that was allocated before; 0 if the system does not report it.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        try:
            _CLEAR.write_text("5", encoding="utf-8")  # proc(5): reset the peak to what is resident now
            self._reset = True
        except OSError:
            self._reset = False
        return self

    def __exit__(self, *raised: object) -> None:
        if self._reset:
            self.bytes = _kernel_peak_bytes()


def describe_machine() -> dict[str, str]:
    """Return the properties of the machine that affect latencies."""
    gpus_here = [f"{gpu.name} (driver for CUDA {gpu.driver})" for gpu in gpus()]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_name(),
        "cpu_class": cpu_class(),
        "cpus": str(os.cpu_count()),
        "python": platform.python_version(),
        **({"gpu": ", ".join(gpus_here)} if gpus_here else {}),
    }
