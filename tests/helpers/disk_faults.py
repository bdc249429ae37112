"""What is on a disk, and errors of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail_on_call(number: int, real: Callable[..., Any], code: int = errno.ENOSPC) -> Callable[..., Any]:
    """Return ``real`` with its call ``number`` (from 0) replaced by an error of the disk."""
    calls = iter(range(10**6))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return wrapper
