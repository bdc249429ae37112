"""Replace a folder atomically: after a kill at any moment there is the old or the new one.

A new folder is filled next to its target and published in one of two ways:

* **exchange**: the file system swaps the names of both folders in one step (``renameat2`` on Linux, ``renamex_np`` on
  macOS). The old folder is then deleted.
* **in place**: used if the file system cannot exchange, if the folder is a mount point or in a lower layer of an
  overlay (a container's volume or image), if its parent is not writable, or if it holds unrelated files, which stay
  untouched. A journal is written into the folder, then the new files are moved one by one, the marker last, and removed
  files are deleted. After a kill the next process that opens or writes the folder completes the journal.

The way is determined before the folder is filled, so that an impossible publication is refused before minutes of work.
A writer holds the lock of the folder from its last read of the old content to the end.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import BundleError, ScmError
from .files import (
    DISK_ERRORS,
    JOURNAL_NAME,
    STAGING,
    cannot_write,
    check_relative,
    fsync_file,
    fsync_folder,
    fsync_tree,
    open_regular,
    real_path,
    remove_leftovers,
    restore_earlier,
    safe_join,
    staging,
)
from .locks import locked

_JOURNAL_MAX_BYTES = 8 << 20
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
_CANNOT_MOVE = frozenset(
    {errno.EBUSY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}
)
"""Error numbers if two folders cannot be exchanged: mounts, overlays, file systems, permissions."""

Owned = Callable[[Path], Collection[str]]
"""Returns the relative paths of the files that the new folder replaces; all other files stay."""


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    marker: str | None = None,
    error: type[ScmError] = BundleError,
) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` only if the ``with`` block succeeds.

    Args:
        path: The folder to create, with its parents. It may exist and be empty.
        overwrite: Replace a folder that is not empty.
        marker: With ``overwrite``, replace only a folder that holds a file of this name, so that a mistyped path
            never deletes unrelated files.
        error: Exception type for errors of the disk.

    Yields:
        The folder to fill.

    Raises:
        ScmError: Of type ``error``, if ``path`` may not be replaced or cannot be written.
    """
    with staged_folder(path, overwrite=overwrite, marker=marker, error=error) as staged:
        yield staged.folder
        staged.publish()


@contextmanager
def staged_folder(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    marker: str | None = None,
    owned: Owned | None = None,
    error: type[ScmError] = BundleError,
) -> Iterator[Staged]:
    """Fill a folder that appears at ``path`` when ``publish`` is called in the ``with`` block.

    Args:
        path: As ``atomic_folder``.
        overwrite: As ``atomic_folder``.
        marker: As ``atomic_folder``; it is the last file that is replaced.
        owned: The files of an old folder that are replaced; None for all.
        error: As ``atomic_folder``.

    Yields:
        The folder to fill and publish. Without ``publish`` it is removed.

    Raises:
        ScmError: As ``atomic_folder``, before the block if ``path`` cannot be written.
    """
    target = real_path(path)
    finish_interrupted(target)
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, beside=target.name)
            remove_leftovers(target)
            _check_target(path, target, overwrite=overwrite, marker=marker, error=error)
            temp, folder = _make_room(stack, target, owned)
        except OSError as exc:
            raise error(cannot_write(path, exc)) from exc
        try:
            yield Staged(path, target, temp, folder, overwrite, marker, owned, error)
        except OSError as exc:
            if exc.errno in DISK_ERRORS:
                raise error(cannot_write(path, exc)) from exc
            raise


@dataclass(frozen=True)
class Staged:
    """A folder that is being filled, to be published under another name.

    Attributes:
        path: The target as the caller gave it.
        target: The resolved target.
        temp: The hidden folder, removed at the end.
        folder: The folder to fill: in ``temp``, or ``temp`` itself if it is published in place.
        overwrite: Whether an old folder may be replaced.
        marker: The file that is replaced last.
        owned: The files of an old folder that are replaced.
        error: Exception type for errors of the disk.
    """

    path: str | os.PathLike[str]
    target: Path
    temp: Path
    folder: Path
    overwrite: bool
    marker: str | None
    owned: Owned | None
    error: type[ScmError]

    def publish(self, finish: Callable[[], Collection[str]] = tuple) -> None:
        """Publish the folder.

        Args:
            finish: Called under the exclusive lock, to compare the current content with the content that the caller
                read earlier and to add dependent files; returns the relative paths of old files that stay.

        Raises:
            ScmError: If ``path`` may not be replaced or cannot be written; nothing was changed.
        """
        try:
            if self._is_vacant() and self.folder != self.temp:
                finish()
                fsync_tree(self.folder)
                if self._take_name():
                    return
            with undisturbed(self.target, purpose=f"publish {os.fspath(self.path)}"):
                # Check again: the work may have taken minutes, and another process may have written there.
                _check_target(self.path, self.target, overwrite=self.overwrite, marker=self.marker, error=self.error)
                kept = finish()
                if self.folder != self.temp and not _strangers(self.target, self.owned):
                    with suppress(_CannotExchange):
                        self._exchange(kept)
                        return
                self._publish_in_place(kept)
        except OSError as exc:
            if has_journal(self.target):  # for example a file on another disk
                raise self.error(
                    f"{os.fspath(self.path)} was changed in part, then refused more: {exc.strerror or exc}. Remove the "
                    f"cause, then finish the change: scm-export bundle verify {os.fspath(self.path)}"
                ) from exc
            raise self.error(cannot_write(self.path, exc)) from exc

    def _is_vacant(self) -> bool:
        return not os.path.lexists(self.target) or not _content(self.target)

    def _take_name(self) -> bool:
        """Rename the folder to a free name or an empty folder; return whether the name was still free."""
        try:
            os.rename(self.folder, self.target)
        except OSError as exc:
            if exc.errno in _OCCUPIED or (exc.errno in _CANNOT_MOVE and self.target.is_dir()):
                return False
            raise
        try:
            fsync_folder(self.target.parent)
        except OSError:
            os.rename(self.target, self.folder)
            raise
        return True

    def _exchange(self, kept: Collection[str]) -> None:
        """Swap names with the old folder, which is removed with ``temp``."""
        for name in kept:
            _link(safe_join(self.target, name), self.folder / name)
        fsync_tree(self.folder)
        shutil.copymode(self.target, self.folder)
        with locked(self.folder):
            try:
                exchange(self.folder, self.target)
            except OSError as exc:
                if exc.errno in _CANNOT_MOVE:
                    raise _CannotExchange from exc
                raise
            try:
                fsync_folder(self.target.parent)
            except OSError:
                exchange(self.folder, self.target)
                raise

    def _publish_in_place(self, kept: Collection[str]) -> None:
        with ExitStack() as stack:
            source = self.folder
            if source != self.temp:  # filled next to its target
                source = stack.enter_context(staging(self.target))
                for name in _files(self.folder):
                    if name not in kept:
                        (source / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(self.folder / name, source / name)
            names = sorted(_files(source), key=lambda name: (name == self.marker, name))
            old = _files(self.target) if self.owned is None else self.owned(self.target)
            new = [name for name in names if not os.path.lexists(self.target / name) and name != self.marker]
            journal = _Journal(
                staging=source.name,
                new=new,
                replaced=[name for name in names if name not in new],
                removed=sorted(set(old) - set(names) - set(kept)),
            )
            _check_replaceable(self.target, journal.names)
            fsync_tree(source)
            _write_journal(self.target, source, journal)
            _roll_forward(self.target, journal)


class _Journal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Change of a folder in place; relative POSIX paths.

    Attributes:
        staging: Subfolder with the new files.
        new: Files that did not exist before.
        replaced: Files that existed, the marker last.
        removed: Files to delete.
    """

    staging: str
    new: list[str]
    replaced: list[str]
    removed: list[str]

    @property
    def names(self) -> list[str]:
        """All files that change."""
        return [*self.new, *self.replaced, *self.removed]


class _CannotExchange(Exception):
    """The file system cannot swap these two folders."""


def finish_interrupted(path: Path) -> None:
    """Complete an interrupted change of a folder, if there is one; wait for a change in progress.

    Raises:
        BundleError: If it cannot be completed; the message states why and what to run.
    """
    try:
        folder = real_path(path)
    except (OSError, ValueError):  # not a path; the caller raises the error when it opens it
        return
    restore_earlier(folder)
    if not has_journal(folder):
        return
    try:
        with locked(folder, purpose=f"open {path}"):
            if (journal := _read_journal(folder)) is not None:
                _roll_forward(folder, journal)
                shutil.rmtree(folder / journal.staging, ignore_errors=True)
    except OSError as exc:
        if not has_journal(folder):  # no space for the new files; the old files are complete
            return
        raise BundleError(
            f"a command that changed {path} was interrupted, and what it began cannot be finished here: "
            f"{exc.strerror or exc}. Run, where the folder can be written: scm-export bundle verify {path}"
        ) from exc


@contextmanager
def undisturbed(path: Path, *, shared: bool = False, purpose: str) -> Iterator[None]:
    """Lock a folder against changes by other processes during the block.

    Args:
        path: The folder.
        shared: Take a shared lock, for reading; False takes an exclusive lock, for writing.
        purpose: The waiting operation, for the log line.

    Raises:
        BundleError: If the folder is missing or unreadable, or an interrupted change cannot be completed.
    """
    folder = real_path(path)
    with ExitStack() as stack:
        while True:
            finish_interrupted(folder)
            try:
                stack.enter_context(locked(folder, shared=shared, purpose=purpose))
            except OSError as exc:
                raise BundleError(f"{path} cannot be opened: {exc.strerror}. Check the path and its mode.") from exc
            if not has_journal(folder):  # of a process that was killed just now
                break
            stack.close()
        yield


def has_journal(folder: Path) -> bool:
    """Return whether a change in place is in progress or was interrupted."""
    return os.path.lexists(folder / JOURNAL_NAME)


def exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders in one step.

    Raises:
        OSError: If the system or the file system cannot.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        result = libc.renamex_np(*names, ctypes.c_uint(2))  # type: ignore[union-attr]  # RENAME_SWAP
    elif sys.platform == "linux" and hasattr(libc, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD
        result = libc.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))  # type: ignore[union-attr]
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), os.fspath(one))
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


def _check_target(
    path: str | os.PathLike[str], target: Path, *, overwrite: bool, marker: str | None, error: type[ScmError]
) -> None:
    shown = os.fspath(path)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise error(f"{shown} is a file, expected a folder or a new name. Choose another path.")
    if not _content(target):
        return
    if not overwrite:
        raise error(
            f"{shown} exists and is not empty, expected a new or an empty folder. "
            "Choose another path, or allow it to be replaced: --overwrite, in Python overwrite=True."
        )
    if marker is not None and not (target / marker).is_file():
        raise error(
            f"{shown} holds no {marker}, so it is not replaced although overwriting was allowed. "
            "Choose another path, or delete the folder yourself."
        )


def _make_room(stack: ExitStack, target: Path, owned: Owned | None) -> tuple[Path, Path]:
    """Create the folder to fill on the disk of the target; test whether it can be exchanged with the target."""
    if not target.is_dir():
        temp = stack.enter_context(staging(target.parent))
        folder = temp / target.name
        folder.mkdir()
        return temp, folder
    with ExitStack() as trial:
        try:
            temp = trial.enter_context(staging(target.parent))
            if not _strangers(target, owned) and _can_exchange(target, temp):
                folder = temp / target.name
                folder.mkdir()
                stack.push(trial.pop_all())
                return temp, folder
        except OSError as exc:
            if exc.errno not in (*_CANNOT_MOVE, errno.EROFS):
                raise
    temp = stack.enter_context(staging(target))
    _check_replaceable(target, _files(target) if owned is None else owned(target))
    return temp, temp


def _can_exchange(target: Path, temp: Path) -> bool:
    """Return whether a folder in ``temp`` could be exchanged with ``target``, without moving it.

    A rename onto a non-empty folder always fails; the error shows whether the folder could be moved.
    """
    obstacle = temp / "obstacle"
    (obstacle / "content").mkdir(parents=True)
    try:
        os.rename(target, obstacle)
    except OSError as exc:
        if exc.errno not in _OCCUPIED:
            return False
    else:  # contrary to POSIX
        os.rename(obstacle, target)
        return False
    shutil.rmtree(obstacle)
    (temp / "trial").mkdir()
    with staging(target.parent) as neighbor:
        try:
            exchange(neighbor, temp / "trial")
        except OSError:
            return False
        finally:
            (temp / "trial").rmdir()
    return True


def _check_replaceable(target: Path, names: Iterable[str]) -> None:
    """Refuse files that cannot be created, replaced or deleted by a rename within the folder.

    Raises:
        OSError: If a file cannot.
        BundleError: If a link leaves the folder.
    """
    device = os.stat(target).st_dev
    folders = {target}
    for name in names:
        safe_join(target, name)
        if (target / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
        folders.add(next(parent for parent in (target / name).parents if parent.exists()))
    for folder in folders:
        if os.stat(folder).st_dev != device:
            raise OSError(errno.EXDEV, f"{folder} is on another disk than {target}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _content(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not STAGING.fullmatch(name)]


def _files(folder: Path) -> list[str]:
    """Return the relative POSIX paths of the files in a folder, without unfinished files."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        folders[:] = [name for name in folders if not STAGING.fullmatch(name)]
        found += [Path(root, name).relative_to(folder).as_posix() for name in (*names, *links)]
    return [name for name in found if name != JOURNAL_NAME]


def _strangers(target: Path, owned: Owned | None) -> bool:
    """Return whether a folder holds unrelated files."""
    return owned is not None and not set(_files(target)) <= set(owned(target))


def _write_journal(target: Path, source: Path, journal: _Journal) -> None:
    temp = source / JOURNAL_NAME
    temp.write_bytes(msgspec.json.encode(journal))
    fsync_file(temp)
    os.replace(temp, target / JOURNAL_NAME)
    try:
        fsync_folder(target)
    except OSError:
        (target / JOURNAL_NAME).unlink()
        raise


def _read_journal(target: Path) -> _Journal | None:
    """Return the content of a journal; None if another process completed it. It is as untrusted as its folder.

    Raises:
        BundleError: If it is damaged, or names a path outside the folder.
    """
    path = target / JOURNAL_NAME
    try:
        with open_regular(path) as stream:
            journal = msgspec.json.decode(stream.read(_JOURNAL_MAX_BYTES), type=_Journal)
        for name in journal.names:
            check_relative(name)
            safe_join(target, name)
        if not STAGING.fullmatch(journal.staging):
            raise ValueError(f"staging is {journal.staging!r}")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, BundleError) as exc:  # msgspec's are ValueErrors
        raise BundleError(
            f"{path} is damaged ({exc}), expected the list of an interrupted change. Copy the folder again, or export "
            "it again."
        ) from exc
    return journal


def _roll_forward(target: Path, journal: _Journal) -> None:
    """Perform the remaining steps of a journal; after a kill the next call continues.

    New files are moved first: if there is no space they are removed again, and the folder is unchanged.
    """
    source = target / journal.staging
    untouched = all(os.path.lexists(source / name) for name in journal.replaced)
    try:
        for name in journal.new:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _move(source / name, target / name)
    except OSError:
        if untouched:
            _take_back(target, journal)
        raise
    for name in journal.replaced:
        _move(source / name, target / name)
    for name in journal.removed:
        (target / name).unlink(missing_ok=True)
        _remove_empty(target, (target / name).parent)
    for folder in {target, *((target / name).parent for name in journal.names)}:
        if folder.is_dir():
            fsync_folder(folder)
    _end_journal(target)


def _take_back(target: Path, journal: _Journal) -> None:
    for name in journal.new:
        (target / name).unlink(missing_ok=True)
        _remove_empty(target, (target / name).parent)
    _end_journal(target)


def _end_journal(target: Path) -> None:
    (target / JOURNAL_NAME).unlink(missing_ok=True)
    fsync_folder(target)


def _move(source: Path, target: Path) -> None:
    """Rename a file; a missing file was moved before."""
    with suppress(FileNotFoundError):
        os.replace(source, target)


def _remove_empty(root: Path, folder: Path) -> None:
    """Remove an empty folder below ``root`` and its empty parents."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or a file system without links
        shutil.copyfile(source, target)
