"""``.scmz``: a bundle as one file.

A zip file without compression, whose bytes depend only on the bundle. Archives are untrusted: each member must be a
plain stored file that the manifest inside lists, or the signature, so an archive never expands to more than its size.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .._util.files import (
    DISK_ERRORS,
    atomic_file,
    check_relative,
    open_regular,
    remove_leftovers,
    safe_join,
    sha256_stream,
    unreadable,
)
from .._util.publish import atomic_folder, undisturbed
from ..errors import BundleError, IntegrityError, SchemaError
from .manifest import MANIFEST_NAME, SIGNATURE_NAME
from .signing import check_current
from .verify import MANIFEST_MAX_BYTES, check_content, read_manifest

SUFFIX = ".scmz"
MAX_MEMBERS = 4096
_DIRECTORY_BYTES = 2 << 20
"""Maximum size of the list of members, bytes: 512 per member. A name has about 60."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
ZIP_ERRORS = (
    zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError, RuntimeError, struct.error,
)  # fmt: skip
"""Exceptions of ``zipfile`` for damaged files."""
_REPAIR = "Copy it again, or pack it again: scm-export bundle pack"


def pack(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write a bundle as one file; the same bundle gives the same bytes.

    Args:
        folder: The bundle; every file is checked first. Unlisted files are excluded.
        out: The file, by convention ``NAME.scmz``; an existing file is replaced.

    Raises:
        BundleError: If the bundle is damaged or ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    name = read_manifest(folder).name
    if out.is_dir():
        raise BundleError(f"{out} is a folder, expected a file such as {name}{SUFFIX}.")
    remove_leftovers(out.parent, beside=out.name)
    with undisturbed(folder, shared=True, purpose=f"pack {folder}"):
        manifest = read_manifest(folder)
        count = len(manifest.files)
        if count >= MAX_MEMBERS:
            raise BundleError(f"{folder} holds {count} files, expected fewer than {MAX_MEMBERS} in one file.")
        for entry in manifest.files:
            check_content(folder, entry)
        with atomic_file(out, error=BundleError) as temp, zipfile.ZipFile(temp, "x") as archive:
            signature = [SIGNATURE_NAME] if check_current(folder) else []
            for name in (MANIFEST_NAME, *signature, *sorted(entry.path for entry in manifest.files)):
                member = zipfile.ZipInfo(name, _EPOCH)
                member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o644) << 16
                member.file_size = (folder / name).stat().st_size
                with safe_join(folder, name).open("rb") as source, archive.open(member, "w") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    return out


def unpack(path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the bundle in a ``.scmz`` file to a folder, which appears only after every check.

    Args:
        path: The file.
        out: The folder; it must not exist, except with ``overwrite`` a bundle.
        overwrite: Replace an existing bundle.

    Raises:
        BundleError: If a path in it is not allowed, or ``out`` may not be replaced or cannot be written.
        IntegrityError: If it is damaged, or holds what its manifest does not list.
        SchemaError: If the manifest is malformed or from a newer version.
    """
    with open_archive(path) as archive:
        archive.unpack(Path(out), overwrite=overwrite)
    return Path(out)


@contextmanager
def open_archive(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """Open a ``.scmz`` file once, so that a file that replaces it later is not read.

    Raises:
        BundleError: If it does not exist.
        IntegrityError: If it is not a regular file or cannot be read.
    """
    try:
        plain = open_regular(path)
    except FileNotFoundError as exc:
        raise BundleError(f"{os.fspath(path)} does not exist, expected a {SUFFIX} file. Check the path.") from exc
    except OSError as exc:
        raise unreadable(path, exc) from exc
    with plain:
        yield Archive(Path(path), CappedReader(io.FileIO(plain.fileno(), closefd=False)))


class Archive:
    """An open ``.scmz`` file."""

    def __init__(self, path: Path, stream: CappedReader) -> None:
        self._path, self._stream = path, stream

    def sha256(self) -> str:
        """Return the sha256 of the file."""
        return sha256_stream(self._stream)

    def manifest_text(self) -> bytes:
        """Return the text of the manifest.

        Raises:
            BundleError: As ``unpack``.
        """
        with self._opened() as archive:
            return archive.read(_members(self._path, archive)[0])

    def unpack(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        sha256: str | None = None,
        check: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        """Write the bundle to a folder, as ``unpack``.

        Args:
            out: The folder.
            overwrite: Replace an existing bundle.
            sha256: The digest that the file must have after it was read.
            check: Called with the unfinished folder before the manifest is parsed.
        """
        with atomic_folder(out, overwrite=overwrite, marker=MANIFEST_NAME, error=BundleError) as folder:
            with self._opened() as archive:
                members = _members(self._path, archive)
                for member in members:
                    target = safe_join(folder, member.filename)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, target.open("xb") as stream:
                        shutil.copyfileobj(source, stream, 1 << 20)
            if sha256 is not None and self.sha256() != sha256:
                raise IntegrityError(f"{self._path} was written to while it was opened. Open it again.")
            check(folder)
            manifest = read_manifest(folder)
            found = {member.filename for member in members} - {SIGNATURE_NAME}
            if odd := found ^ {MANIFEST_NAME, *(entry.path for entry in manifest.files)}:
                raise IntegrityError(
                    f"{self._path} does not hold exactly what its manifest lists, first {min(odd)!r}. {_REPAIR}"
                )
            for entry in manifest.files:
                check_content(folder, entry)

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            self._stream.limit = _DIRECTORY_BYTES
            with zipfile.ZipFile(self._stream) as archive:
                self._stream.limit = None
                yield archive
        except ZIP_ERRORS as exc:
            raise IntegrityError(f"{self._path} is damaged or no {SUFFIX} file: {exc}. {_REPAIR}") from exc
        except OSError as exc:
            if exc.errno in DISK_ERRORS:  # an error of the target disk
                raise
            raise IntegrityError(f"{self._path} cannot be unpacked: {exc.strerror or exc}. {_REPAIR}") from exc
        finally:
            self._stream.limit = None


class CappedReader(io.BufferedReader):
    """A file with a size limit per read, because ``zipfile`` reads the list of members at once.

    An archive states the position and the length of the list in several places; the limit applies to the one that
    ``zipfile`` uses.
    """

    limit: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to ``size`` bytes; refuse more than ``limit``."""
        if self.limit is not None and size is not None and size > self.limit:
            raise zipfile.BadZipFile(
                f"the list of files takes {size} bytes, expected at most {MAX_MEMBERS} files in {self.limit} bytes"
            )
        return super().read(size)


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the members, the manifest first; refuse one that is not a plain file with an allowed name."""
    assert archive.fp is not None, "it is open"
    size = archive.fp.seek(0, os.SEEK_END)
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise BundleError(f"{path} holds {len(members)} files, expected at most {MAX_MEMBERS}. It is refused.")
    for member in members:
        check_relative(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        if not stored or kind not in (0, stat.S_IFREG) or member.flag_bits & 1:
            raise BundleError(
                f"{path}: {member.filename} is compressed, encrypted or a link, expected a plain stored file. {_REPAIR}"
            )
    # Overlapping stored members would expand to more than the size of the file.
    if sum(member.file_size for member in members) > size:
        raise BundleError(f"{path} would unfold to more bytes than it has. It is refused.")
    found = {member.filename: member for member in members}
    if len(found) != len(members):
        raise IntegrityError(f"{path} holds a file twice, expected each once. {_REPAIR}")
    if both := found.keys() & {str(parent) for name in found for parent in PurePosixPath(name).parents}:
        raise BundleError(f"{path} holds {min(both)!r} as a file and as a folder, expected one. {_REPAIR}")
    if MANIFEST_NAME not in found:
        raise BundleError(f"{path} holds no {MANIFEST_NAME}, expected a packed bundle. {_REPAIR}")
    if found[MANIFEST_NAME].file_size > MANIFEST_MAX_BYTES:
        raise SchemaError(f"{path}: its manifest is larger than {MANIFEST_MAX_BYTES} bytes. It is refused.")
    return [found.pop(MANIFEST_NAME), *found.values()]
