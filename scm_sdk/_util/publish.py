"""Put a folder in the place of another so that there is the old one or the new one at any moment, whoever is killed.

A new folder is filled beside its place. Two ways lead from there:

* **exchange**: the file system swaps the names of both folders in one step (``renameat2`` on Linux, ``renamex_np`` on
  macOS). What was there before is then deleted.
* **in place**: where the file system cannot, where the folder is a mount point or lies in a lower layer of an overlay
  (a container's volume or image), where the folder above may not be written, and where files lie that do not belong to
  what is replaced, which stay untouched. A journal is written into the folder, then the new files are moved in one by
  one, the marker last, and files that are gone are deleted. Whoever opens or writes the folder after a kill finishes
  what the journal lists.

Which way it will be is tried out before the folder is filled, so that what cannot be published is refused before work
that takes minutes. A writer holds the folder's lock from its last look at the old content to the end.
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
"""What the system says where two folders cannot change places: mounts, overlays, file systems, rights."""

Owned = Callable[[Path], Collection[str]]
"""Returns the relative paths of the files of a folder that a new one replaces; all others stay."""


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    marker: str | None = None,
    error: type[ScmError] = BundleError,
) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` only when the ``with`` block ends well.

    Args:
        path: The folder to make; missing parents are made. An empty folder may be there already.
        overwrite: Replace a folder that is not empty.
        marker: With ``overwrite``, replace only a folder that holds a file of this name, so that a
            mistyped path never costs somebody's documents.
        error: What to raise when the disk refuses.

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
        marker: As ``atomic_folder``; of the files it is the last that is replaced.
        owned: What belongs to an old folder; None is everything in it.
        error: As ``atomic_folder``.

    Yields:
        What is to be filled and published. What was not published is removed.

    Raises:
        ScmError: As ``atomic_folder``; whether ``path`` can be written is tried at once.
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
        path: That name, as the caller gave it.
        target: The same, resolved.
        temp: The hidden folder that goes when the work ends.
        folder: What is to be filled: in ``temp`` or, where it will be published in place, ``temp`` itself.
        overwrite: Whether an old folder may be replaced.
        marker: Its file that is replaced last.
        owned: What belongs to an old folder.
        error: What is raised.
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
        """Put the folder in its place.

        Args:
            finish: Called when nobody else may write there, to compare the old content with what the caller read of
                it and to add what follows from that; returns the relative paths of old files that stay.

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
                # Again: the work may have taken minutes, and somebody may have written there meanwhile.
                _check_target(self.path, self.target, overwrite=self.overwrite, marker=self.marker, error=self.error)
                kept = finish()
                if self.folder != self.temp and not _strangers(self.target, self.owned):
                    with suppress(_CannotExchange):
                        self._exchange(kept)
                        return
                self._publish_in_place(kept)
        except OSError as exc:
            if has_journal(self.target):  # a file that another disk holds, for example
                raise self.error(
                    f"{os.fspath(self.path)} was changed in part, then refused more: {exc.strerror or exc}. Remove the "
                    f"cause, then finish the change: scm-export bundle verify {os.fspath(self.path)}"
                ) from exc
            raise self.error(cannot_write(self.path, exc)) from exc

    def _is_vacant(self) -> bool:
        return not os.path.lexists(self.target) or not _content(self.target)

    def _take_name(self) -> bool:
        """Rename the folder to a name that is free, or is an empty folder's; return whether it still was."""
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
        """Swap names with the old folder, which goes with ``temp``."""
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
            if source != self.temp:  # filled beside its place
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
    """What is being done to a folder in place; relative POSIX paths.

    Attributes:
        staging: Folder in it that holds the new files.
        new: Files that were not there before.
        replaced: Files that were, the marker last.
        removed: Files that go.
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
    """Finish what a killed command began to change in a folder, if there is such a thing; wait for a living one.

    Raises:
        BundleError: If it cannot be finished; the message says why and what to run.
    """
    try:
        folder = real_path(path)
    except (OSError, ValueError):  # no path at all, as whoever opens it says
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
        if not has_journal(folder):  # there was no room for the new files, and the old ones are whole
            return
        raise BundleError(
            f"a command that changed {path} was interrupted, and what it began cannot be finished here: "
            f"{exc.strerror or exc}. Run, where the folder can be written: scm-export bundle verify {path}"
        ) from exc


@contextmanager
def undisturbed(path: Path, *, shared: bool = False, purpose: str) -> Iterator[None]:
    """Keep others from changing a folder while the block runs; they wait, as this does for them.

    Args:
        path: The folder.
        shared: For reading, with others who read; False is to write to it alone.
        purpose: What waits, for the line that is logged while it does.

    Raises:
        BundleError: If the folder is not there or cannot be read, or an interrupted change cannot be finished.
    """
    folder = real_path(path)
    with ExitStack() as stack:
        while True:
            finish_interrupted(folder)
            try:
                stack.enter_context(locked(folder, shared=shared, purpose=purpose))
            except OSError as exc:
                raise BundleError(f"{path} cannot be opened: {exc.strerror}. Check the path and its mode.") from exc
            if not has_journal(folder):  # of somebody who was killed just now
                break
            stack.close()
        yield


def has_journal(folder: Path) -> bool:
    """Return whether a command is changing a folder in place, or was killed while it did."""
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
    """Make the folder that is filled, on the disk of its place; try whether it can take that place."""
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
    """Return whether a folder in ``temp`` could change places with ``target``; nothing is moved.

    A rename onto a folder that holds something always fails: at that folder, or before at what cannot be moved.
    """
    obstacle = temp / "obstacle"
    (obstacle / "content").mkdir(parents=True)
    try:
        os.rename(target, obstacle)
    except OSError as exc:
        if exc.errno not in _OCCUPIED:
            return False
    else:  # not what POSIX says
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
    """Refuse files that cannot be put, replaced or deleted by a rename within the folder.

    Raises:
        OSError: If one cannot.
        BundleError: If a link leads out of the folder.
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
            raise OSError(errno.EXDEV, f"{folder} lies on another disk than {target}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _content(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not STAGING.fullmatch(name)]


def _files(folder: Path) -> list[str]:
    """Return the relative POSIX paths of what a folder holds, without folders and unfinished files."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        folders[:] = [name for name in folders if not STAGING.fullmatch(name)]
        found += [Path(root, name).relative_to(folder).as_posix() for name in (*names, *links)]
    return [name for name in found if name != JOURNAL_NAME]


def _strangers(target: Path, owned: Owned | None) -> bool:
    """Return whether a folder holds files that do not belong to what is replaced."""
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
    """Return what a journal lists; None if somebody finished it meanwhile. It is trusted no more than its folder.

    Raises:
        BundleError: If it is damaged, or names what does not lie in the folder.
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
    """Do what is left to do of a journal; after a kill the next call goes on.

    New files come first: where they find no room they are taken back, and the folder is as it was.
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
    """Rename a file; one that is gone was moved before."""
    with suppress(FileNotFoundError):
        os.replace(source, target)


def _remove_empty(root: Path, folder: Path) -> None:
    """Remove a folder below ``root`` and those above it, as far as they are empty."""
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
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
