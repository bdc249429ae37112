"""Peak memory of one stage of a process."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kernel_peak_bytes() -> int:
    """Return the peak resident memory of this process as Linux counts it; 0 on other systems."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


class PeakMemory:
    """Measures the peak resident memory of the process inside a ``with`` block; Linux only.

    The peak of the kernel is reset, so that a later peak of the process also starts here.

    Attributes:
        bytes: The peak, including memory that was allocated before; 0 if the system does not report it.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        try:
            _CLEAR.write_text("5")  # proc(5): reset the peak to what is resident now
            self._reset = True
        except OSError:
            self._reset = False
        return self

    def __exit__(self, *raised: object) -> None:
        if self._reset:
            self.bytes = kernel_peak_bytes()
