"""Write files and folders atomically, and resolve untrusted paths safely.

A file is written in a hidden folder ``.scm-<hex>.partial`` beside its place, gets the mode that the umask says
(safetensors' own files are readable by their owner alone), and is fsynced and renamed. A reader sees the old content or
the new one. Whoever fills such a folder holds its lock, so that ``remove_leftovers`` knows those of killed processes.
``publish`` does the same for whole folders.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, BinaryIO

from ..errors import BundleError, IntegrityError, ScmError
from .locks import FolderLock, try_lock

_CHUNK_BYTES = 1 << 20
_PATH_LENGTH = 1024
"""Longest path inside a folder, characters; with the folder's own path before it, Linux takes 4096 bytes."""
_NAME_BYTES = 255
"""Longest name of a file on the usual disks."""
JOURNAL_NAME = ".scm_journal.json"
"""Lists what is being changed in a folder in place, from a ``staging`` folder in it; see ``publish``."""
STAGING = re.compile(r"\.scm-[0-9a-f]{8}\.partial")
"""Name of the folder that ``staging`` makes."""
_EARLIER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(partial|old)")
"""What versions before 0.1.0 made beside a file or a folder of the name in the middle."""
_UNFINISHED = re.compile(rf"{STAGING.pattern}[\\/]")
_cleaned: set[Path] = set()
"""Folders that this process has written to: one look for leftovers in each, since a folder may hold many files."""
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
"""Conditions of the target disk, whoever meets them first: we, or the code that fills a folder."""


def atomic_write_bytes(
    path: str | os.PathLike[str], data: bytes | memoryview, *, error: type[ScmError] = ScmError
) -> None:
    """Write a file so that it holds ``data`` or what it held before, never a part.

    Args:
        path: The file; missing parent folders are made.
        data: Its whole new content.
        error: What to raise when the disk refuses.

    Raises:
        ScmError: Of type ``error``, if the file cannot be written; nothing new is left behind. Also if the
            disk took it but could not confirm that the rename will outlast a power cut.
    """
    with atomic_file(path, error=error) as temp, open(temp, "xb") as stream:
        stream.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, error: type[ScmError] = ScmError) -> Iterator[Path]:
    """Write a file, however large, that appears at ``path`` only when the ``with`` block ends well.

    Yields:
        The path to write to, of the same name; nothing is there yet.

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
    """Make a hidden folder in ``folder`` to write to; it is removed when the block ends.

    Its lock is held meanwhile: others see by that that its maker is alive.

    Raises:
        OSError: If it cannot be made.
    """
    lock: FolderLock | None = None
    while lock is None:
        temp = folder / f".scm-{secrets.token_hex(4)}.partial"
        temp.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # taken for a leftover before it was locked
            lock = try_lock(temp)
    try:
        yield temp
    finally:
        if not os.path.lexists(folder / JOURNAL_NAME):  # else whoever finishes what was interrupted needs it
            shutil.rmtree(temp, ignore_errors=True)
        lock.release()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for what is on a disk only while it is worked with, in the system's temporary folder (``TMPDIR``).

    Raises:
        ScmError: If there is no place for it, or its disk is full.
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
    """Find out before the work whether its result can be written.

    A file is made and removed in the nearest folder that exists.

    Args:
        path: A file, which need not exist; nor need the folders that it is in.
        error: What to raise when it cannot be written.

    Raises:
        ScmError: Of type ``error``; the words are those of a failed write.
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
    """Raise OSError unless a file may be renamed to ``target``: as root, that would remove a device as /dev/null is."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is a pipe or a device, expected a file")


def remove_leftovers(folder: Path, *, beside: str = "", below: bool = False) -> None:
    """Delete what killed processes left half written in a folder.

    What a living process writes stays, and so does what cannot be deleted or locked: it is never read.

    Args:
        folder: Where they lie.
        beside: Name of a file or folder in it whose leftovers of versions before 0.1.0 are deleted too.
        below: Whether folders below are searched, and all leftovers of earlier versions deleted: for who holds the
            folder alone.
    """
    try:
        for path in list(folder.rglob(".*") if below else folder.glob(".*.*")):
            earlier = _EARLIER.fullmatch(path.name)
            if STAGING.fullmatch(path.name) or (earlier and (below or earlier[1] == beside)):
                _remove_dead(path, alone=below)
    except OSError:  # it may not be read, or is gone
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
    """Rename the only copy of a folder back to its name, if a version before 0.1.0 was killed between two renames."""
    if os.path.lexists(target):
        return
    with suppress(OSError):
        found = [p for p in target.parent.glob(".*.old") if (m := _EARLIER.fullmatch(p.name)) and m[1] == target.name]
        if len(found) == 1 and found[0].is_dir() and not found[0].is_symlink():
            os.rename(found[0], target)


def final_path(text: str) -> str:
    """Return a text with the paths of unfinished files and folders replaced by those that they will have.

    Progress and errors name files while these lie in ``.scm-<hex>.partial``, a folder that is gone when they are read.
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


def sha256_stream(stream: IO[bytes]) -> str:
    """Return the sha256 of an open file's whole content as 64 hex digits."""
    digest = hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain file to read. A pipe or a device, which would be waited for or never end, is refused.

    Raises:
        OSError: If it cannot be opened or is no plain file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a plain file", os.fspath(path))
    return os.fdopen(handle, "rb")


def read_regular(path: str | os.PathLike[str], *, most: int) -> bytes:
    """Return the content of a plain file.

    Raises:
        OSError: If it cannot be opened, is no plain file, or has more than ``most`` bytes.
    """
    with open_regular(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EINVAL, f"More than {most} bytes", os.fspath(path))
    return data


def unreadable(path: str | os.PathLike[str], exc: OSError) -> IntegrityError:
    """Return the error for a file that cannot be read: its mode, or its content, is at fault."""
    found = f"{os.fspath(path)} cannot be read: {exc.strerror or exc}"
    if exc.errno in (errno.EACCES, errno.EPERM):
        return IntegrityError(f"{found}. Change its mode or its owner, for example with: chmod a+r")
    return IntegrityError(f"{found}. Copy it again.")


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the sha256 of bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def check_relative(relative: str) -> None:
    """Refuse a path that is not plain, relative and POSIX. Looks at the text alone.

    Raises:
        BundleError: If it is empty, absolute or longer than a disk takes, or holds ``..``, ``.``, a backslash, a
            colon (a drive) or a character that cannot be printed.
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
    """Join a path from an untrusted file to ``root``, or refuse to leave ``root``.

    A snapshot in huggingface_hub's cache is made of links to the files in ``../../blobs``. That is the one place
    outside ``root`` where a link may lead, and only from a folder in ``snapshots``.

    Args:
        root: An existing folder.
        relative: A relative POSIX path: no ``..``, no backslash, no drive, no link that leads out.

    Returns:
        ``root / relative``; it need not exist.

    Raises:
        BundleError: If the path is not of that form or a link leads out of ``root``.
    """
    check_relative(relative)
    joined = root / relative
    try:
        real, home = joined.resolve(), root.resolve()
        inside = real.is_relative_to(home) or (
            home.parent.name == "snapshots" and real.is_relative_to(home.parents[1] / "blobs")
        )
    except (OSError, RuntimeError) as exc:  # a loop of links: RuntimeError up to Python 3.12
        raise BundleError(f"path {relative!r} cannot be resolved: {exc}. Copy the folder again.") from exc
    if not inside:
        raise BundleError(
            f"path {relative!r} is a link that leads out of {root}, expected a file inside it. "
            "Copy the folder with its links resolved, for example with: cp -rL"
        )
    return joined


def real_path(path: str | os.PathLike[str]) -> Path:
    """Follow a link, so that what it points at is replaced and the link stays."""
    return Path(os.path.realpath(path))


def fsync_tree(folder: Path) -> None:
    """Give every new file and folder the mode that the umask says, and flush it to the disk."""
    mode = new_file_mode(folder)
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                give_mode(path, mode)
                fsync_file(path)
        fsync_folder(Path(root))


def new_file_mode(folder: Path) -> int:
    """Return the mode of a file that ``open`` makes in a folder: the umask and the folder's default ACL decide."""
    probe = folder / f".{secrets.token_hex(4)}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        os.unlink(probe)


def give_mode(path: str | os.PathLike[str], mode: int) -> None:
    """Set the mode of a file that a library may have made readable by its owner alone.

    A file with several hard links belongs to another folder, too, and keeps its mode.
    """
    found = os.stat(path)
    if found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
        os.chmod(path, mode)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Flush a file to the disk."""
    # Windows flushes only a handle opened for writing; POSIX takes any.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


def cannot_write(path: str | os.PathLike[str], exc: OSError) -> str:
    """Return the text of an error for what a disk refuses: the reason, and what to do."""
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
