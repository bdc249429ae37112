"""The cache of unpacked ``.scmz`` files, keyed by the archive's sha256."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .._util.cache_dir import (
    UNPACKED,
    cache_folder,
    is_cached,
    temporary_folder,
    trusted_folder,
    why_insecure,
    withdraw_write,
    writable_folder,
)
from .._util.locks import FolderLock, try_lock, wait_for_lock
from ..errors import BundleError, ConfigError, ScmError
from .archive import open_archive
from .manifest import MANIFEST_NAME
from .verify import check_content, read_manifest

_ABANDONED_DAYS = 1.0
"""On file systems without locks: age after which an unfinished folder counts as left by a killed process."""


@dataclass(frozen=True, kw_only=True)
class CachedBundle:
    """One unpacked bundle.

    Attributes:
        key: The first half of the archive's sha256.
        folder: Folder of the bundle.
        name: Name of the bundle; "" if its manifest cannot be read.
        bytes: Size of the folder.
        used: Time of the last use, seconds since the epoch.
    """

    key: str
    folder: Path
    name: str
    bytes: int
    used: float


def unpacked_folder() -> Path | None:
    """Return the folder of the entries; None without a cache."""
    root = cache_folder()
    return None if root is None else root / UNPACKED


def unpacked(path: str | os.PathLike[str], *, check: Callable[[Path], object] = lambda folder: None) -> Path:
    """Return the cached folder of a ``.scmz`` file's bundle; it is unpacked once.

    Without a usable cache the folder is temporary and is removed when the process ends. ``hold`` protects an entry.

    Args:
        path: The file.
        check: Called with the folder before its manifest is parsed, for example to check its signature.

    Raises:
        BundleError: As ``archive.unpack``; also if no folder to unpack to can be created.
    """
    with open_archive(path) as archive:
        sha256, manifest = archive.sha256(), archive.manifest_text()
        key = sha256[:32]
        kept = trusted_folder(f"{UNPACKED}/{key}")
        if kept is not None and _holds(kept, manifest):
            check(kept)
        else:
            root = writable_folder(UNPACKED, purpose=f"{os.fspath(path)} is unpacked to a temporary folder")
            if root is None or (os.path.lexists(root / key) and why_insecure(root / key)):
                root = temporary_folder() / UNPACKED
            kept = root / key
            if _holds(kept, manifest):
                check(kept)
            else:
                _move_away(kept)  # altered, or partly removed
                try:
                    archive.unpack(kept, sha256=sha256, check=check)
                except BundleError:
                    if not _holds(kept, manifest):
                        raise
                    check(kept)  # another process was first
                with suppress(FileNotFoundError):  # collect_garbage removed it already
                    withdraw_write(kept)
    now = time.time_ns()  # finer than the clock of the file system
    with suppress(OSError):  # owned by another user, or on a read-only disk
        os.utime(kept, ns=(now, now))
    return kept


def hold(folder: Path) -> FolderLock | None:
    """Protect an unpacked bundle from ``collect_garbage`` until the lock is released; None for other folders.

    Raises:
        FileNotFoundError: If it was just removed.
    """
    try:
        if not is_cached(folder):
            return None
        return wait_for_lock(folder.resolve(), shared=True, purpose=f"open {folder}")
    except (
        ConfigError,
        PermissionError,
    ):  # without a home folder there is no cache; or the folder is readable by name only
        return None


def entries() -> list[CachedBundle]:
    """Return the entries, least recently used first, including those left by killed processes."""
    folder = unpacked_folder()
    if folder is None or not folder.is_dir():
        return []
    found = (_read(path) for path in folder.iterdir() if path.is_dir())
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)


def collect_garbage(*, max_bytes: int | None = None, max_age_days: float | None = None) -> list[CachedBundle]:
    """Remove damaged entries, old entries, and then the least recently used ones down to ``max_bytes``.

    Every file is hashed again. Entries that a process has open (``hold``) stay.

    Args:
        max_bytes: Maximum total size of the remaining entries; None for no limit.
        max_age_days: Maximum days since an entry was opened; None for no limit.

    Returns:
        The removed entries. A removed bundle is unpacked again when its archive is opened.
    """
    kept: list[CachedBundle] = []
    removed: list[CachedBundle] = []
    for entry in entries():
        days = (time.time() - entry.used) / 86400
        limit = 0.0 if entry.key.startswith(".") or not _is_whole(entry.folder) else max_age_days
        gone = limit is not None and days >= limit and _remove(entry, days)
        (removed if gone else kept).append(entry)
    total = sum(entry.bytes for entry in kept)
    for entry in kept:
        days = (time.time() - entry.used) / 86400
        if max_bytes is not None and total > max_bytes and not entry.key.startswith(".") and _remove(entry, days):
            removed.append(entry)
            total -= entry.bytes
    return removed


def _remove(entry: CachedBundle, days: float) -> bool:
    """Remove an entry unless it is in use; return whether it was removed."""
    try:
        lock = try_lock(entry.folder)
    except OSError:  # removed by another process, or a link
        lock = None
    if lock is None:
        return False
    try:
        if not lock.is_real and entry.key.startswith(".") and days < _ABANDONED_DAYS:
            return False
        now = _read(entry.folder)
        if now is None or now.used != entry.used:  # opened or created again in the meantime
            return False
        _move_away(entry.folder)
    finally:
        lock.release()
    return not os.path.lexists(entry.folder)


def _move_away(folder: Path) -> None:
    """Rename a folder, then delete it, so that no process opens a partly deleted bundle."""
    away = folder.with_name(f".{folder.name.strip('.')}.{secrets.token_hex(4)}.removed")
    try:
        os.replace(folder, away)
    except FileNotFoundError:
        return
    except OSError:
        away = folder
    shutil.rmtree(away, ignore_errors=True)


def _holds(folder: Path, manifest: bytes) -> bool:
    """Return whether a folder is the bundle of this manifest, against which each file is checked when it is opened."""
    try:
        return (folder / MANIFEST_NAME).read_bytes() == manifest
    except OSError:
        return False


def _is_whole(folder: Path) -> bool:
    try:
        for entry in read_manifest(folder).files:
            check_content(folder, entry)
    except ScmError:
        return False
    return True


def _read(folder: Path) -> CachedBundle | None:
    """Return an entry; None if it was removed or renamed in the meantime."""
    try:
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        used = folder.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        name = "" if folder.name.startswith(".") else read_manifest(folder).name
    except ScmError:
        name = ""
    return CachedBundle(key=folder.name, folder=folder, name=name, bytes=sum(sizes), used=used)
