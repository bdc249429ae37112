"""Bundles that ``.scmz`` files held, in the user's cache: unpacked once, found again by the file's sha256."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ._bundle_checks import check_content, read_manifest
from .archive import open_archive
from .errors import ScmError
from .manifest import MANIFEST_NAME
from .user_cache import (
    UNPACKED,
    cache_folder,
    temporary_folder,
    trusted_folder,
    why_insecure,
    withdraw_write,
    writable_folder,
)

_ABANDONED_DAYS = 1.0
"""A folder that is still being filled after this long was left by a process that was killed."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One unpacked bundle.

    Attributes:
        key: Of the file it came from, the first half of its sha256.
        folder: Where it lies.
        name: Of the bundle; "" if its manifest cannot be read.
        bytes: Its size.
        used: When it was last opened, seconds since the epoch.
    """

    key: str
    folder: Path
    name: str
    bytes: int
    used: float


def unpacked_folder() -> Path | None:
    """Return where the entries lie; None where there is no cache."""
    root = cache_folder()
    return None if root is None else root / UNPACKED


def unpacked(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a ``.scmz`` file's bundle in the user's cache; it is unpacked once.

    Where the cache cannot be used, the folder is one of this process and goes when it ends.

    Raises:
        BundleError: As ``archive.unpack``; also if there is no disk to unpack to.
    """
    with open_archive(path) as archive:
        sha256, manifest = archive.sha256(), archive.manifest_text()
        key = sha256[:32]
        kept = trusted_folder(f"{UNPACKED}/{key}")
        if kept is None or not _holds(kept, manifest):
            root = writable_folder(UNPACKED, purpose=f"{os.fspath(path)} is unpacked to a temporary folder")
            if root is None or (os.path.lexists(root / key) and why_insecure(root / key)):
                root = temporary_folder() / UNPACKED
            kept = root / key
            if not _holds(kept, manifest):
                if not (kept / MANIFEST_NAME).is_file():  # what is left of one that was half removed
                    shutil.rmtree(kept, ignore_errors=True)
                archive.unpack(kept, overwrite=True, sha256=sha256)
                withdraw_write(kept)
    with suppress(OSError):  # somebody else's, or a read-only disk
        os.utime(kept, ns=(time.time_ns(),) * 2)  # finer than the file system's own clock
    return kept


def entries() -> list[Entry]:
    """Return what is there, the longest unused first; what a killed process left among it."""
    folder = unpacked_folder()
    if folder is None or not folder.is_dir():
        return []
    found = (_read(path) for path in folder.iterdir() if path.is_dir())
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)


def collect_garbage(*, max_bytes: int | None = None, max_age_days: float | None = None) -> list[Entry]:
    """Remove the damaged, those unused for long, and then the longest unused until the rest is small enough.

    Every file is hashed again.

    Args:
        max_bytes: What may stay in all; None is no limit.
        max_age_days: Days since an entry was opened; None is no limit.

    Returns:
        What was removed. Whoever has such a file opens it again as if for the first time.
    """
    kept: list[Entry] = []
    removed: list[Entry] = []
    for entry in entries():
        days = (time.time() - entry.used) / 86400
        limit = _ABANDONED_DAYS if entry.key.startswith(".") else max_age_days if _is_whole(entry.folder) else 0.0
        (removed if limit is not None and days >= limit else kept).append(entry)
    total = sum(entry.bytes for entry in kept)
    for entry in kept:
        if max_bytes is not None and total > max_bytes and not entry.key.startswith("."):
            removed.append(entry)
            total -= entry.bytes
    for entry in removed:
        away = entry.folder.with_name(f".{entry.key.strip('.')}.removed")
        try:
            os.replace(entry.folder, away)  # first out of sight: nobody opens half a bundle
        except OSError:
            away = entry.folder
        shutil.rmtree(away, ignore_errors=True)
    return removed


def _holds(folder: Path, manifest: bytes) -> bool:
    """Return whether a folder is the bundle of this manifest, by which each file is checked when it is opened."""
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


def _read(folder: Path) -> Entry | None:
    """Return an entry; None if it was removed or renamed meanwhile."""
    try:
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        used = folder.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        name = "" if folder.name.startswith(".") else read_manifest(folder).name
    except ScmError:
        name = ""
    return Entry(key=folder.name, folder=folder, name=name, bytes=sum(sizes), used=used)
