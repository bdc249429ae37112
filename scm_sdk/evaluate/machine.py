"""Description of the machine of a measurement."""

from __future__ import annotations

import os
import platform
import sys

from .._util.gpu import gpus
from .._util.peak_memory import kernel_peak_bytes
from .._util.processor import cpu_class, cpu_name


def peak_rss_mib() -> float | None:
    """Return the peak resident memory of this process, MiB; None if the system does not report it."""
    if peak_bytes := kernel_peak_bytes():  # Linux: getrusage would include the peak of the parent
        return peak_bytes / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


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
