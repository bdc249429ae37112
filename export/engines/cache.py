"""The cache of built engines, keyed by their inputs and verified before use.

An engine is code: only engines that this user built here are used, from a folder that no other user can write to.

The key of an entry is the sha256 of everything that decides an engine: the graph with its weights, the options, the
library version, the system, and for TensorRT the GPU and its driver. One process at a time builds an entry; a second
one waits and uses the result.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from scm_sdk._util.cache_dir import cache_folder, temporary_folder, why_insecure, withdraw_write, writable_folder
from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.files import sha256_bytes, sha256_file
from scm_sdk._util.gpu import current_gpu
from scm_sdk._util.lazy import require
from scm_sdk._util.locks import FolderLock, try_lock, wait_for_lock
from scm_sdk._util.processor import platform_tag
from scm_sdk.bundle.engine_record import BUILD_RECORD_NAME, ENGINE_NAME, BuildRecord
from scm_sdk.engines.compatibility import remember_built, was_built_here
from scm_sdk.engines.tensorrt import load_flavor
from scm_sdk.errors import ExportError, ScmError

from .engine import build_engine, graph_digest
from .options import EngineOptions

logger = logging.getLogger(__name__)

_ENGINES = "engines"
_USED = "used"
"""File that is touched when an entry is used; entries are removed least recently used first."""


@dataclass(frozen=True, kw_only=True)
class CachedEngine:
    """One engine of the cache.

    Attributes:
        key: Key of the entry.
        folder: Folder of the entry.
        record: Build record; None if it cannot be read.
        bytes: Size of the entry.
        used: Time of the last use, seconds since the epoch.
        lease: Lock that prevents removal during a copy.
    """

    key: str
    folder: Path
    record: BuildRecord | None
    bytes: int
    used: float
    lease: FolderLock | None = None

    @property
    def mismatches(self) -> list[str]:
        """Differences of the kernels from the graph."""
        return list(self.record.census.get("mismatches", [])) if self.record is not None else []

    def copy_to(self, folder: Path) -> None:
        """Copy the engine and its record to a new folder, with hard links if possible."""
        folder.mkdir(parents=True)
        for name in (ENGINE_NAME, BUILD_RECORD_NAME):
            try:
                os.link(self.folder / name, folder / name)
            except OSError:  # another file system, or a file system without links
                shutil.copyfile(self.folder / name, folder / name)

    def problem(self) -> str:
        """Hash the entry and return its problem; "" if it is intact."""
        if self.record is None:
            return f"{BUILD_RECORD_NAME} cannot be read"
        engine = self.folder / ENGINE_NAME
        if not engine.is_file():
            return f"{ENGINE_NAME} is missing"
        if sha256_file(engine) != self.record.engine_sha256:
            return f"{ENGINE_NAME} was altered or cut short"
        if insecure := why_insecure(self.folder):
            return insecure
        return "" if was_built_here(self.record.engine_sha256) else "this user did not build it here"


def cached_engine(
    graph: Path, options: EngineOptions, *, allow_mismatch: bool = False, events: Events = SILENT
) -> tuple[CachedEngine, bool]:
    """Return the engine of a graph from the cache; build it if it is missing.

    Args:
        graph: The sampler graph.
        options: Build options.
        allow_mismatch: See ``build_engine``.
        events: See ``build_engine``.

    Returns:
        The verified entry, and whether it existed. It is not removed while it is referenced.

    Raises:
        ScmError: As ``build_engine``; also if the lock of the entry is a link.
    """
    filelock = require("filelock", extra="export", purpose="the engine cache")
    digest = graph_digest(graph)
    key = engine_key(digest, options)
    folder = writable_folder(_ENGINES, purpose="engines are built again each time") or temporary_folder() / _ENGINES
    folder.mkdir(exist_ok=True)
    entry_folder = folder / key
    lock = entry_folder.with_suffix(".lock")
    if lock.is_symlink():
        raise ExportError(f"{lock} is a link, expected a plain file or none. Delete it, and look at who made it.")
    with filelock.FileLock(lock):
        entry = _read(entry_folder)
        hit = entry is not None and not entry.problem() and (allow_mismatch or not entry.mismatches)
        logger.debug("engine of %s: %s", graph, "in the cache" if hit else "not in the cache, or damaged")
        if not hit:
            _remove(entry_folder)  # damaged, or built by another user: never used
            build_engine(
                graph,
                entry_folder,
                options,
                timing_cache=_timing_cache(options),
                allow_mismatch=allow_mismatch,
                graph_sha256=digest,
                events=events,
            )
            withdraw_write(entry_folder)
            entry = _read(entry_folder)
        (entry_folder / _USED).touch()
        assert entry is not None and entry.record is not None, "it was built or found"
        if not hit:
            remember_built(entry.record.engine_sha256)
        return replace(entry, lease=wait_for_lock(entry_folder, shared=True, purpose="the engine cache")), hit


def engine_key(graph_sha256: str, options: EngineOptions) -> str:
    """Return the key of an engine.

    Args:
        graph_sha256: See ``graph_digest``.
        options: How it is built.

    Raises:
        BackendUnavailable: If the library of the build is not installed.
    """
    library = load_flavor(options.flavor, purpose=f"building a {options.flavor} engine")
    gpu = current_gpu() if options.flavor == "tensorrt" else None
    facts = {
        "graph": graph_sha256,
        "options": msgspec.to_builtins(options),
        "library": library.__version__,
        "platform": platform_tag(),
        "gpu": (gpu.name, gpu.driver) if gpu is not None else None,
    }
    return sha256_bytes(msgspec.json.encode(facts, order="deterministic"))


def engines_folder() -> Path | None:
    """Return the folder of the entries; None without a cache."""
    root = cache_folder()
    return None if root is None else root / _ENGINES


def entries() -> list[CachedEngine]:
    """Return the entries of the cache, least recently used first."""
    folder = engines_folder()
    if folder is None or not folder.is_dir():
        return []
    found = (_read(path) for path in sorted(folder.iterdir()) if path.is_dir() and len(path.name) == 64)
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)


def collect_garbage(*, max_bytes: int | None = None, max_age_days: float | None = None) -> list[CachedEngine]:
    """Remove damaged entries, old entries, and then the least recently used ones down to ``max_bytes``.

    Args:
        max_bytes: Maximum total size of the remaining entries; None for no limit.
        max_age_days: Maximum days since an entry was used; None for no limit.

    Returns:
        The removed entries. Entries that are being built or used stay.
    """
    doomed = list(_doomed(max_bytes, max_age_days))
    if not doomed:  # filelock may be missing on a machine that builds no engines
        return []
    filelock = require("filelock", extra="export", purpose="the engine cache")
    removed = []
    for entry in doomed:
        # The lock file stays: if it were deleted, a waiting and a later process would hold different locks.
        lock = entry.folder.with_suffix(".lock")
        if lock.is_symlink():
            continue
        with (
            suppress(filelock.Timeout),
            filelock.FileLock(lock, blocking=False),
        ):  # otherwise another process is building it
            now = _read(entry.folder)
            if now is not None and now.used == entry.used and _remove_unused(entry.folder):
                removed.append(entry)
    return removed


def _remove_unused(folder: Path) -> bool:
    """Remove an entry that is not being copied; return whether it was removed."""
    if folder.is_symlink():
        _remove(folder)
        return True
    try:
        lock = try_lock(folder)
    except OSError:
        return False
    if lock is None:
        return False
    _remove(folder)
    lock.release()
    return not folder.exists()


def _doomed(max_bytes: int | None, max_age_days: float | None) -> Iterator[CachedEngine]:
    kept = []
    for entry in entries():
        old = max_age_days is not None and time.time() - entry.used > max_age_days * 86400
        if old or entry.problem():
            yield entry
        else:
            kept.append(entry)
    total = sum(entry.bytes for entry in kept)
    for entry in kept:
        if max_bytes is None or total <= max_bytes:
            return
        total -= entry.bytes
        yield entry


def _read(folder: Path) -> CachedEngine | None:
    if not folder.is_dir():
        return None
    try:
        files = [path.stat() for path in folder.iterdir() if path.is_file()]
    except FileNotFoundError:  # removed by another process
        return None
    try:
        record = BuildRecord.from_json((folder / BUILD_RECORD_NAME).read_bytes())
    except (OSError, ScmError):
        record = None
    size, used = sum(stat.st_size for stat in files), max((stat.st_mtime for stat in files), default=0.0)
    return CachedEngine(key=folder.name, folder=folder, record=record, bytes=size, used=used)


def _remove(folder: Path) -> None:
    """Remove an entry; if it is a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _timing_cache(options: EngineOptions) -> Path | None:
    """Return TensorRT's file of kernel times for this version and GPU; its header excludes others."""
    gpu = current_gpu()
    if options.flavor != "tensorrt" or gpu is None:
        return None
    version = load_flavor(options.flavor, purpose="the timing cache").__version__
    folder = writable_folder("timing", purpose="TensorRT measures its kernels again for each engine")
    return folder and folder / f"{version}-{gpu.name.replace(' ', '_')}.cache"
