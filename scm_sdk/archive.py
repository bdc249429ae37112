"""``.scmz``: a bundle as one file, to be sent or kept.

A zip file without compression, whose bytes follow from the bundle's alone. Reading one trusts nothing: each member
must be a plain stored file that the manifest inside lists, so an archive never unfolds to more than its own size.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ._bundle_checks import MANIFEST_MAX_BYTES, check_content, check_manifest, read_manifest
from .errors import BundleError, IntegrityError, SchemaError
from .files import DISK_ERRORS, atomic_file, atomic_folder, check_relative, open_regular, safe_join, sha256_stream
from .manifest import MANIFEST_NAME, Manifest

SUFFIX = ".scmz"
MAX_MEMBERS = 4096
_END_BYTES = (1 << 16) + 22
"""An archive ends with its directory's place and a comment of at most 64 KiB."""
_MEMBER_BYTES = 4096
"""Most that a member's entry in the directory takes."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_REPAIR = "Copy it again, or pack it again: scm-export bundle pack"


def pack(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write a bundle as one file; the same bundle gives the same bytes.

    Args:
        folder: The bundle; every file is checked first. Files that it does not list stay out.
        out: The file, by habit ``NAME.scmz``; replaced when it is there.

    Raises:
        BundleError: If the bundle is damaged or ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    manifest = read_manifest(folder)
    if out.is_dir():
        raise BundleError(f"{out} is a folder, expected a file such as {manifest.name}{SUFFIX}.")
    for entry in manifest.files:
        check_content(folder, entry)
    with atomic_file(out, error=BundleError) as temp, zipfile.ZipFile(temp, "x") as archive:
        for name in (MANIFEST_NAME, *sorted(entry.path for entry in manifest.files)):
            member = zipfile.ZipInfo(name, _EPOCH)
            member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            member.file_size = (folder / name).stat().st_size
            with safe_join(folder, name).open("rb") as source, archive.open(member, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return out


def unpack(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False, sha256: str | None = None
) -> Path:
    """Write the bundle in a ``.scmz`` file to a folder, checked as a whole before it appears.

    Args:
        path: The file.
        out: The folder; a new name, or with ``overwrite`` an older bundle.
        overwrite: Replace the bundle that is there.
        sha256: The digest that the file must have, if it was hashed before: it may have been replaced since.

    Raises:
        BundleError: If a path in it is not allowed, or ``out`` may not be replaced or cannot be written.
        IntegrityError: If it is damaged, or holds what its manifest does not list.
        SchemaError: If the manifest is malformed or from a newer version.
    """
    path, out = Path(path), Path(out)
    with atomic_folder(out, overwrite=overwrite, marker=MANIFEST_NAME, error=BundleError) as folder:
        with _opened(path) as archive:
            for member in _members(path, archive):
                target = safe_join(folder, member.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("xb") as stream:
                    shutil.copyfileobj(source, stream, 1 << 20)
            assert archive.fp is not None, "it is open"
            if sha256 is not None and sha256_stream(archive.fp) != sha256:
                raise IntegrityError(f"{path} was replaced while it was opened. Open it again.")
        for entry in read_manifest(folder).files:
            check_content(folder, entry)
    return out


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open_regular(path) as stream:
            _check_directory(path, stream)
            with zipfile.ZipFile(stream) as archive:
                yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as exc:
        raise IntegrityError(f"{path} is damaged or no {SUFFIX} file: {exc}. {_REPAIR}") from exc
    except FileNotFoundError as exc:
        raise BundleError(f"{path} does not exist, expected a {SUFFIX} file. Check the path.") from exc
    except OSError as exc:
        if exc.errno in DISK_ERRORS:  # the disk that is unpacked to
            raise
        raise IntegrityError(f"{path} cannot be unpacked: {exc.strerror or exc}. {_REPAIR}") from exc


def _check_directory(path: Path, stream: BinaryIO) -> None:
    """Refuse an archive of too many members before ``zipfile`` reads the list of them."""
    stream.seek(0, os.SEEK_END)
    stream.seek(max(0, stream.tell() - _END_BYTES))
    tail = stream.read(_END_BYTES)
    end = tail[tail.rfind(b"PK\5\6") :]
    stream.seek(0)
    if len(end) < 22:
        return  # no archive, as zipfile says
    members, listed = struct.unpack("<HI", end[10:16])
    if members > MAX_MEMBERS or listed > MAX_MEMBERS * _MEMBER_BYTES:
        raise BundleError(f"{path} lists {members} files in {listed} bytes, expected at most {MAX_MEMBERS} files.")


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the members, the manifest first, if each is what it lists."""
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
    # Stored members that overlap would unfold to more than the file holds.
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise BundleError(f"{path} would unfold to more bytes than it has. It is refused.")
    found = {member.filename: member for member in members}
    listed = {MANIFEST_NAME, *(entry.path for entry in _manifest(path, archive, found).files)}
    if len(found) != len(members) or set(found) != listed:
        odd = sorted(set(found) ^ listed) or sorted(found)
        raise IntegrityError(f"{path} does not hold exactly what its manifest lists, first {odd[0]!r}. {_REPAIR}")
    return [found.pop(MANIFEST_NAME), *found.values()]


def _manifest(path: Path, archive: zipfile.ZipFile, found: dict[str, zipfile.ZipInfo]) -> Manifest:
    if MANIFEST_NAME not in found:
        raise BundleError(f"{path} holds no {MANIFEST_NAME}, expected a packed bundle. {_REPAIR}")
    if found[MANIFEST_NAME].file_size > MANIFEST_MAX_BYTES:
        raise SchemaError(f"{path}: its manifest is larger than {MANIFEST_MAX_BYTES} bytes. It is refused.")
    manifest = Manifest.from_json(archive.read(found[MANIFEST_NAME]))
    check_manifest(manifest)
    return manifest
