"""Put files and folders on disk whole or not at all, and take paths from strangers safely.

Every write of the package goes through here: a temporary name in the same folder, the mode that the umask says
(safetensors' own files are readable by their owner alone), fsync, rename.
A reader sees the old content or the new one. A kill between the steps may leave a hidden
``.<name>.<hex>.partial`` beside the target; it is never read and may be deleted.
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
from typing import IO, BinaryIO

from .errors import BundleError, IntegrityError, ScmError

_CHUNK_BYTES = 1 << 20
_PATH_LENGTH = 1024
"""Longest path inside a folder, characters; with the folder's own path before it, Linux takes 4096 bytes."""
_NAME_BYTES = 255
"""Longest name of a file on the usual disks."""
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|old)")
"""Name of what ``_sibling`` names."""
_UNFINISHED = re.compile(r"(?<![^\\/\s'\"])\.([^\\/\n]+?)\.[0-9a-z_]{8}\.partial")
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
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
        The path to write to, beside ``path``; nothing is there yet.

    Raises:
        ScmError: As ``atomic_write_bytes``.
    """
    target = _real(path)
    temp = _sibling(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        _give_mode(temp, _new_file_mode(target.parent))
        _fsync_file(temp)
        os.replace(temp, target)
    except OSError as exc:
        raise error(_cannot_write(path, exc)) from exc
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
    try:
        _fsync_folder(target.parent)
    except OSError as exc:
        raise error(
            f"{os.fspath(path)} was replaced, but the disk did not confirm it: {exc.strerror}. "
            "Check the disk, then write it again."
        ) from exc


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    marker: str | None = None,
    error: type[ScmError] = BundleError,
) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` only when the ``with`` block ends well.

    The block gets an empty folder beside ``path``. When it ends, everything in it is fsynced and the
    folder is renamed; when it raises, the folder is removed. An old folder is moved aside first and
    moved back if the new one cannot take its place; between these two renames ``path`` is absent, and
    a power cut just there leaves the old content in ``.<name>.<hex>.old``.

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
    target = _real(path)
    _check_target(path, target, overwrite=overwrite, marker=marker, error=error)
    check_replaceable(path, error=error)
    temp = _sibling(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
    except OSError as exc:
        raise error(_cannot_write(path, exc)) from exc
    try:
        try:
            yield temp
        except OSError as exc:
            if exc.errno in DISK_ERRORS:
                raise error(_cannot_write(path, exc)) from exc
            raise
        # Again: the block may have run for minutes, and somebody may have filled the place meanwhile.
        _check_target(path, target, overwrite=overwrite, marker=marker, error=error)
        try:
            _fsync_tree(temp)
            _swap_in(temp, target)
        except OSError as exc:
            raise error(_cannot_write(path, exc)) from exc
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def check_writable(path: str | os.PathLike[str], *, error: type[ScmError] = ScmError) -> None:
    """Find out before the work whether its result can be written.

    A file is made and removed in the nearest folder that exists.

    Args:
        path: A file, which need not exist; nor need the folders that it is in.
        error: What to raise when it cannot be written.

    Raises:
        ScmError: Of type ``error``; the words are those of a failed write.
    """
    target = _real(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = target.parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
        _new_file_mode(folder)
    except OSError as exc:
        raise error(_cannot_write(path, exc)) from exc


def check_replaceable(path: str | os.PathLike[str], *, error: type[ScmError] = BundleError) -> None:
    """Find out before the work whether a folder can be replaced; one that does not exist can.

    A mount point and a folder in a layer of a container image cannot be renamed.

    Raises:
        ScmError: Of type ``error``; the words are those of a failed write.
    """
    target = _real(path)
    if not target.exists():
        return
    full = _sibling(target, "partial")
    try:
        (full / "not empty").mkdir(parents=True)
        os.rename(target, full)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # what a folder that can be renamed meets here
            raise error(_cannot_write(path, exc)) from exc
    finally:
        shutil.rmtree(full, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in a folder and below it; only for who holds the folder alone.

    What cannot be deleted stays: it is never read.
    """
    for path in [path for path in folder.rglob(".*") if _LEFTOVER.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def final_path(text: str) -> str:
    """Return a text with the temporary names of unfinished files and folders replaced by those that they will have.

    Progress and errors name files while these lie in ``.<name>.<hex>.partial``, a name that is gone when they are read.
    """
    return _UNFINISHED.sub(r"\1", text)


def printable(text: str) -> str:
    """Return a text of an untrusted file with what a terminal obeys escaped: control codes and changes of direction."""
    return "".join(c if c in "\n\t" or not _OBEYED.match(c) else c.encode("unicode_escape").decode() for c in text)


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


def _real(path: str | os.PathLike[str]) -> Path:
    """Follow a link, so that what it points at is replaced and the link stays."""
    return Path(os.path.realpath(path))


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def _check_target(
    path: str | os.PathLike[str], target: Path, *, overwrite: bool, marker: str | None, error: type[ScmError]
) -> None:
    shown = os.fspath(path)
    try:
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise error(f"{shown} is a file, expected a folder or a new name. Choose another path.")
        if not any(target.iterdir()):
            return
        holds_marker = marker is None or (target / marker).is_file()
    except OSError as exc:
        raise error(_cannot_write(path, exc)) from exc
    if not overwrite:
        raise error(
            f"{shown} exists and is not empty, expected a new or an empty folder. "
            "Choose another path, or allow it to be replaced: --overwrite, in Python overwrite=True."
        )
    if not holds_marker:
        raise error(
            f"{shown} holds no {marker}, so it is not replaced although overwriting was allowed. "
            "Choose another path, or delete the folder yourself."
        )


def _swap_in(temp: Path, target: Path) -> None:
    """Rename ``temp`` to ``target``; when a step fails, undo those before it."""
    old = _sibling(target, "old") if target.exists() else None
    if old:
        os.replace(target, old)
    try:
        os.replace(temp, target)
        try:
            _fsync_folder(target.parent)
        except OSError:
            os.replace(target, temp)
            raise
    except OSError:
        if old:
            os.replace(old, target)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    """Give every new file and folder the mode that the umask says, and flush it to the disk."""
    mode = _new_file_mode(folder)
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                _give_mode(path, mode)
                _fsync_file(path)
        _fsync_folder(Path(root))


def _new_file_mode(folder: Path) -> int:
    """Return the mode of a file that ``open`` makes in a folder: the umask and the folder's default ACL decide."""
    probe = _sibling(folder / "mode", "partial")
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        os.unlink(probe)


def _give_mode(path: str | os.PathLike[str], mode: int) -> None:
    """Set the mode of a file that a library may have made readable by its owner alone.

    A file with several hard links belongs to another folder, too, and keeps its mode.
    """
    found = os.stat(path)
    if found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
        os.chmod(path, mode)


def _fsync_file(path: str | os.PathLike[str]) -> None:
    # Windows flushes only a handle opened for writing; POSIX takes any.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_folder(folder: Path) -> None:
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


def _cannot_write(path: str | os.PathLike[str], exc: OSError) -> str:
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
