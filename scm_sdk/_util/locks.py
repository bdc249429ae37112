"""Locks on folders through the file descriptor of the folder, without lock files.

The locks are advisory, end with the process that holds them, and work between threads and between processes. On file
systems without such locks (some network disks, Windows) writers continue without them after one warning.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)
_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_QUIET_S = 1.0
"""Seconds after which a wait is logged. Most end sooner, because a writer holds the lock only while it publishes."""
_warned: set[int] = set()


class FolderLock:
    """A lock on a folder that this process holds until ``release``.

    Attributes:
        is_real: Whether the lock excludes others; False on a file system without locks.
    """

    def __init__(self, handle: int | None) -> None:
        self._handle = handle
        self.is_real = handle is not None

    def release(self) -> None:
        """Release the lock; repeated calls have no effect."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        """Release a lock that was not released."""
        self.release()


def try_lock(folder: Path, *, shared: bool = False) -> FolderLock | None:
    """Lock a folder; return None if it is locked.

    Args:
        folder: An existing folder, not a link.
        shared: Take a shared lock; False takes an exclusive lock.

    Raises:
        OSError: If the folder does not exist, is a link, or is not readable.
    """
    return _lock(folder, shared=shared, wait=False)


@contextmanager
def locked(folder: Path, *, shared: bool = False, purpose: str = "") -> Iterator[FolderLock]:
    """Hold the lock of a folder while the block runs; see ``wait_for_lock``."""
    lock = wait_for_lock(folder, shared=shared, purpose=purpose)
    try:
        yield lock
    finally:
        lock.release()


def wait_for_lock(folder: Path, *, shared: bool = False, purpose: str = "") -> FolderLock:
    """Lock a folder; wait while it is locked.

    Args:
        folder: An existing folder, not a link.
        shared: Take a shared lock.
        purpose: The waiting operation, for the log line.

    Raises:
        OSError: As ``try_lock``.
    """
    patience = monotonic() + _QUIET_S
    while (lock := _lock(folder, shared=shared, wait=False)) is None and monotonic() < patience:
        sleep(_QUIET_S / 100)
    if lock is None:
        _LOG.warning("%s: waiting for another command that holds %s", purpose or "scm-sdk", folder)
        lock = _lock(folder, shared=shared, wait=True)
    assert lock is not None, "it was waited for"
    if not lock.is_real and not shared:
        _warn_unlocked(folder)
    return lock


def _lock(folder: Path, *, shared: bool, wait: bool) -> FolderLock | None:
    if fcntl is None:
        os.stat(folder)
        return FolderLock(None)
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        handle = os.open(folder, _FLAGS)
        try:
            fcntl.flock(handle, kind)
            there = os.stat(folder, follow_symlinks=False)
            if os.path.samestat(os.fstat(handle), there):
                taken, handle = FolderLock(handle), -1
                return taken
            # The folder was replaced while waiting: lock the new one.
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF):
                raise
            return FolderLock(None)
        finally:
            if handle >= 0:
                os.close(handle)


def _warn_unlocked(folder: Path) -> None:
    device = os.stat(folder).st_dev
    if device not in _warned:
        _warned.add(device)
        _LOG.warning("%s is on a disk without locks: run one writing command at a time", folder)
