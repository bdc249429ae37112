"""Digests of files that this user hashed before, for ``verify="remembered"``.

One small JSON file in the user's cache, which no other user may be able to write to. A digest counts for one path and
one stamp: device, inode, size and times. A user who can write to the disk below the file system, or set back the clock,
can change a file and keep its stamp; therefore only callers that ask for it read this cache. It may be deleted at any
time.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec

from .._util.cache_dir import trusted_folder, warn_once, writable_folder
from .._util.files import atomic_write_bytes, read_regular
from ..errors import ScmError

MAX_ENTRIES = 1000
_MAX_BYTES = 1 << 20
_FOLDER, _NAME = "digests", "digests.json"
_lock = threading.Lock()


class _Digest(msgspec.Struct, frozen=True):
    """The sha256 of a file while it had this stamp."""

    stamp: tuple[int, ...]
    sha256: str


def recall_digest(path: Path, stamp: tuple[int, ...]) -> str:
    """Return the sha256 that was remembered for a file with this stamp; "" if there is none."""
    found = _read().get(_key(path))
    return found.sha256 if found is not None and found.stamp == stamp != () else ""


def remember_digest(path: Path, stamp: tuple[int, ...], sha256: str) -> None:
    """Remember the sha256 of a file; the oldest of many are dropped. If they cannot be kept, one warning says so."""
    purpose = "the sha256 of files is not remembered"
    folder = writable_folder(_FOLDER, purpose=purpose)
    if folder is None:
        return
    with _lock:
        digests = _read()
        digests.pop(key := _key(path), None)
        digests[key] = _Digest(stamp, sha256)
        kept = dict(list(digests.items())[-MAX_ENTRIES:])
        try:
            atomic_write_bytes(folder / _NAME, msgspec.json.encode(kept))
        except ScmError as exc:
            warn_once(f"{purpose}: {exc}")


def _key(path: Path) -> str:
    return os.fsencode(os.path.realpath(path)).decode("latin-1")  # a name need not be UTF-8


def _read() -> dict[str, _Digest]:
    """Return the content of the file; empty if it is missing or damaged, as it only saves time."""
    folder = trusted_folder(_FOLDER)
    if folder is None:
        return {}
    try:
        return msgspec.json.decode(read_regular(folder / _NAME, most=_MAX_BYTES), type=dict[str, _Digest])
    except (OSError, msgspec.DecodeError, RecursionError):
        return {}
