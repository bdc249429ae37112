"""Write files and folders atomically, and resolve untrusted paths safely.

A file is written in a hidden folder ``.scm-<hex>.partial`` next to its target, gets the mode of the umask (safetensors
creates files readable by the owner only), and is fsynced and renamed. A reader sees the old or the new content. The
writer holds the lock of the hidden folder, so that ``remove_leftovers`` recognizes those of killed processes.
``publish`` does the same for folders.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, BinaryIO, TypeVar

from ..errors import BundleError, IntegrityError, ScmError
from .locks import FolderLock, try_lock
from .processor import usable_cores

_CHUNK_BYTES = 1 << 20
_PARALLEL_BYTES = 64 << 20
"""Smallest number of bytes for which starting threads pays."""
_PATH_LENGTH = 1024
"""Longest path inside a folder, characters. Linux accepts 4096 bytes including the path of the folder."""
_NAME_BYTES = 255
"""Longest file name on common file systems, bytes."""
JOURNAL_NAME = ".scm_journal.json"
"""Journal of a change in place, which reads from a ``staging`` folder; see ``publish``."""
STAGING = re.compile(r"\.scm-[0-9a-f]{8}\.partial")
"""Name of the folder that ``staging`` creates."""
_EARLIER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(partial|old)")
"""Temporary files and folders of versions before 0.1.0; the name of the target is in the middle."""
_UNFINISHED = re.compile(rf"{STAGING.pattern}[\\/]")
_cleaned: set[Path] = set()
"""Folders that this process has written to; leftovers are searched once in each."""
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
"""Errors of the target disk, raised here or in the code that fills a folder."""


def atomic_write_bytes(
    path: str | os.PathLike[str], data: bytes | memoryview, *, error: type[ScmError] = ScmError
) -> None:
    """Write a file atomically: it holds ``data`` or its previous content, never a part.

    Args:
        path: The file; missing parent folders are created.
        data: The new content.
        error: Exception type for errors of the disk.

    Raises:
        ScmError: Of type ``error``, if the file cannot be written; no temporary file remains. Also if the disk did
            not confirm that the rename survives a power loss.
    """
    with atomic_file(path, error=error) as temp, open(temp, "xb") as stream:
        stream.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, error: type[ScmError] = ScmError) -> Iterator[Path]:
    """Write a file of any size that appears at ``path`` only if the ``with`` block succeeds.

    Yields:
        The path to write to, with the same file name; it does not exist yet.

    Raises:
        ScmError: As ``atomic_write_bytes``; also if ``path`` is a pipe or a device, which a rename would remove.
    """
    target = real_path(path)
    try:
        _require_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in _cleaned:
            _cleaned.add(target.parent)
            remove_leftovers(target.parent)
        with staging(target.parent) as folder:
            temp = folder / target.name
            yield temp
            give_mode(temp, new_file_mode(folder))
            fsync_file(temp)
            os.replace(temp, target)
    except OSError as exc:
        raise error(cannot_write(path, exc)) from exc
    try:
        fsync_folder(target.parent)
    except OSError as exc:
        raise error(
            f"{os.fspath(path)} was replaced, but the disk did not confirm it: {exc.strerror}. "
            "Check the disk, then write it again."
        ) from exc


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Create a hidden folder in ``folder`` to write to; it is removed when the block ends.

    Its lock is held during the block, which shows other processes that its owner is alive.

    Raises:
        OSError: If the folder cannot be created.
    """
    while True:
        temp = folder / f".scm-{secrets.token_hex(4)}.partial"
        temp.mkdir(mode=0o700)
        lock: FolderLock | None = None
        with suppress(FileNotFoundError):  # another process removed it as a leftover before it was locked
            lock = try_lock(temp)
        if lock is not None:
            break
    try:
        yield temp
    finally:
        if not os.path.lexists(folder / JOURNAL_NAME):  # else the process that completes the change needs it
            shutil.rmtree(temp, ignore_errors=True)
        lock.release()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a folder for intermediate files in the temporary folder of the system (``TMPDIR``).

    Raises:
        ScmError: If it cannot be created, or its disk is full.
    """
    try:
        made = TemporaryDirectory(prefix="scm-")
    except OSError as exc:
        raise ScmError(
            f"no temporary folder can be made: {exc.strerror or exc}. Set TMPDIR to a folder that you may write to."
        ) from exc
    with made as name:
        try:
            yield Path(name)
        except OSError as exc:
            if exc.errno in DISK_ERRORS:
                raise ScmError(f"{cannot_write(name, exc)} TMPDIR names another one.") from exc
            raise


def check_writable(path: str | os.PathLike[str], *, error: type[ScmError] = ScmError) -> None:
    """Check before the work that its result can be written.

    A file is created and removed in the nearest existing folder.

    Args:
        path: A file; neither the file nor its folders need to exist.
        error: Exception type if the file cannot be written.

    Raises:
        ScmError: Of type ``error``, with the message of a failed write.
    """
    target = real_path(path)
    try:
        _require_replaceable(target)
        folder = target.parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
        new_file_mode(folder)
    except OSError as exc:
        raise error(cannot_write(path, exc)) from exc


def _require_replaceable(target: Path) -> None:
    """Raise OSError if a rename to ``target`` would replace a pipe or a device such as /dev/null, as root can."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is a pipe or a device, expected a file")


def remove_leftovers(folder: Path, *, beside: str = "", below: bool = False) -> None:
    """Delete the partial files that killed processes left in a folder.

    Files of living processes stay. Files that cannot be deleted or locked also stay; they are never read.

    Args:
        folder: The folder to search.
        beside: Name of a file or folder in it whose leftovers of versions before 0.1.0 are deleted as well.
        below: Whether subfolders are searched and all leftovers of earlier versions deleted; the caller must hold the
            folder exclusively.
    """
    try:
        for path in list(folder.rglob(".*") if below else folder.glob(".*.*")):
            earlier = _EARLIER.fullmatch(path.name)
            if STAGING.fullmatch(path.name) or (earlier and (below or earlier[1] == beside)):
                _remove_dead(path, alone=below)
    except OSError:  # not readable, or already deleted
        return


def _remove_dead(path: Path, *, alone: bool) -> None:
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif (lock := try_lock(path)) is not None:
            if (lock.is_real or alone) and not os.path.lexists(path.parent / JOURNAL_NAME):
                shutil.rmtree(path, ignore_errors=True)
            lock.release()


def restore_earlier(target: Path) -> None:
    """Restore the name of a folder if a version before 0.1.0 was killed between two renames."""
    if os.path.lexists(target):
        return
    with suppress(OSError):
        found = [p for p in target.parent.glob(".*.old") if (m := _EARLIER.fullmatch(p.name)) and m[1] == target.name]
        if len(found) == 1 and found[0].is_dir() and not found[0].is_symlink():
            os.rename(found[0], target)


def final_path(text: str) -> str:
    """Replace the paths of unfinished files and folders in a text by their final paths.

    Progress and errors may name files in ``.scm-<hex>.partial``, a folder that no longer exists when they are read.
    """
    return _UNFINISHED.sub("", text)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's content as 64 hex digits.

    Raises:
        IntegrityError: If the file cannot be read.
    """
    try:
        with open_regular(path) as stream:
            return sha256_stream(stream)
    except OSError as exc:
        raise unreadable(path, exc) from exc


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_files(function: Callable[[_Item], _Result], items: Sequence[_Item], *, num_bytes: int) -> list[_Result]:
    """Return ``function(item)`` for each item, which reads files; for many bytes with a thread on each usable core.

    Raises:
        Exception: The first one by the order of the items. Items that were not begun by then are left out.
    """
    threads = min(len(items), usable_cores())
    if num_bytes < _PARALLEL_BYTES or threads < 2:
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and only large files need it

    pool = ThreadPoolExecutor(threads, "scm-files")
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def sha256_stream(stream: IO[bytes]) -> str:
    """Return the sha256 of the content of an open file as 64 hex digits."""
    digest = hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. A pipe or a device, which may block or never end, is refused.

    Raises:
        OSError: If it cannot be opened or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a plain file", os.fspath(path))
    return os.fdopen(handle, "rb")


def read_regular(path: str | os.PathLike[str], *, most: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: If it cannot be opened, is not a regular file, or has more than ``most`` bytes.
    """
    with open_regular(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EINVAL, f"More than {most} bytes", os.fspath(path))
    return data


def unreadable(path: str | os.PathLike[str], exc: OSError) -> IntegrityError:
    """Return the error for an unreadable file: its mode or its content is wrong."""
    found = f"{os.fspath(path)} cannot be read: {exc.strerror or exc}"
    if exc.errno in (errno.EACCES, errno.EPERM):
        return IntegrityError(f"{found}. Change its mode or its owner, for example with: chmod a+r")
    return IntegrityError(f"{found}. Copy it again.")


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the sha256 of bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def check_relative(relative: str) -> None:
    """Refuse a path that is not a plain relative POSIX path. Checks the text only.

    Raises:
        BundleError: If it is empty, absolute or too long for a file system, or holds ``..``, ``.``, a backslash, a
            colon (a drive) or an unprintable character.
    """
    longest = max(len(part.encode(errors="surrogatepass")) for part in relative.split("/"))
    if len(relative) > _PATH_LENGTH or longest > _NAME_BYTES:
        raise BundleError(
            f"path {relative[:60]!r}.. is too long, expected at most {_PATH_LENGTH} characters and {_NAME_BYTES} bytes "
            "a name. Do not use this folder unless you trust who made it."
        )
    pure = PurePosixPath(relative)
    plain = relative == str(pure) and relative not in ("", ".") and not pure.is_absolute()
    if not plain or ".." in pure.parts or any(c in relative for c in "\\:") or not relative.isprintable():
        raise BundleError(
            f"path {relative!r} is not allowed, expected a relative POSIX path such as 'onnx/model.onnx'. "
            "Do not use this folder unless you trust who made it."
        )


def safe_join(root: Path, relative: str) -> Path:
    """Join a path from an untrusted file to ``root``; refuse a path that leaves ``root``.

    A snapshot in huggingface_hub's cache consists of links to files in ``../../blobs``. This is the only location
    outside ``root`` that a link may point to, and only from a folder in ``snapshots``.

    Args:
        root: An existing folder.
        relative: A relative POSIX path without ``..``, backslash, drive, or link that leaves ``root``.

    Returns:
        ``root / relative``, which need not exist.

    Raises:
        BundleError: If the path does not have this form or a link leaves ``root``.
    """
    check_relative(relative)
    joined = root / relative
    try:
        real, home = joined.resolve(), root.resolve()
        inside = real.is_relative_to(home) or (
            home.parent.name == "snapshots" and real.is_relative_to(home.parents[1] / "blobs")
        )
    except (OSError, RuntimeError) as exc:  # a cycle of links: RuntimeError up to Python 3.12
        raise BundleError(f"path {relative!r} cannot be resolved: {exc}. Copy the folder again.") from exc
    if not inside:
        raise BundleError(
            f"path {relative!r} is a link that leads out of {root}, expected a file inside it. "
            "Copy the folder with its links resolved, for example with: cp -rL"
        )
    return joined


def real_path(path: str | os.PathLike[str]) -> Path:
    """Follow a link, so that its target is replaced and the link stays."""
    return Path(os.path.realpath(path))


def fsync_tree(folder: Path) -> None:
    """Set the mode of every new file and folder by the umask, and flush it to the disk."""
    mode = new_file_mode(folder)
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                give_mode(path, mode)
                fsync_file(path)
        fsync_folder(Path(root))


def new_file_mode(folder: Path) -> int:
    """Return the mode of a file that ``open`` creates in a folder, by the umask and the folder's default ACL."""
    probe = folder / f".{secrets.token_hex(4)}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        os.unlink(probe)


def give_mode(path: str | os.PathLike[str], mode: int) -> None:
    """Set the mode of a file that a library may have created readable by its owner only.

    A file with several hard links also belongs to another folder and keeps its mode.
    """
    found = os.stat(path)
    if found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
        os.chmod(path, mode)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Flush a file to the disk."""
    # Windows flushes only handles opened for writing; POSIX any.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to the disk."""
    if os.name == "nt":  # folders cannot be opened on Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by the file system
            raise
    finally:
        os.close(handle)


def cannot_write(path: str | os.PathLike[str], exc: OSError) -> str:
    """Return the text of an error of the disk: the reason, and what to do."""
    remedy = {
        errno.ENOSPC: "Free some space or choose another disk.",
        errno.EDQUOT: "Free some space or choose another disk.",
        errno.EFBIG: "Raise the limit of file sizes (ulimit -f), or choose another disk.",
        errno.EBUSY: "A mount point cannot be replaced: write to another folder, or mount the folder that it is in.",
        errno.EXDEV: "A folder of a container image's layer cannot be replaced: write to another folder, or copy it to "
        "a volume.",
        errno.EROFS: "Choose a folder on a disk that is not read-only.",
        errno.EACCES: "Choose a folder that you may write to.",
        errno.EPERM: "Choose a folder that you may write to.",
    }.get(exc.errno or 0, "Check the path and the disk.")
    return f"{os.fspath(path)} cannot be written: {exc.strerror or exc}. Nothing was changed. {remedy}"
