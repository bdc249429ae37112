"""Peak memory of one stage of a process."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the process's largest resident memory inside a ``with`` block; Linux alone.

    It resets the peak that the kernel keeps, so what the process reports as its own peak afterwards begins here.

    Attributes:
        bytes: The peak, all that the process held already included; 0 where the system does not tell.
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
        if self._reset and (found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)):
            self.bytes = int(found[1]) * 1024
