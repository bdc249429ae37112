"""Where shards are written: a folder, or a URL that fsspec knows, such as ``s3://bucket/samples``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .._util.files import atomic_file, scratch_folder
from .._util.lazy import require
from ..errors import BackendUnavailable, BundleError, ScmError


class Store:
    """Whole files by name below one root. A file is there completely or not at all.

    Args:
        root: A folder, which need not exist, or a URL of fsspec. A local file is written under a temporary name, synced
            and renamed; an object store publishes an object when its upload is complete.

    Raises:
        BackendUnavailable: If ``root`` is a URL and fsspec, or what it needs for the protocol, is not installed.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        self._remote: Any = None
        if "://" in self.root:
            fsspec = require("fsspec", extra="sample", purpose=f"writing to {self.root}")
            try:
                self._remote, self.root = fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError, OSError) as exc:
                raise BackendUnavailable(
                    f"{self.root} cannot be opened: {exc}. Use a protocol that fsspec knows, and install its package."
                ) from exc

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is none."""
        with self._translated("read"):
            try:
                with self._open(name) as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """Return the size of a file, bytes, or None if there is none."""
        path = self._path(name)
        with self._translated("read"):
            try:
                return int(self._remote.size(path)) if self._remote else os.path.getsize(path)
            except FileNotFoundError:
                return None

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file to read.

        Raises:
            BundleError: If the file is missing or cannot be read.
        """
        with self._translated("read"), self._open(name) as file:
            yield file

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Write a file that appears when the ``with`` block ends without an error.

        Yields:
            A local path to write to.

        Raises:
            BundleError: If the file cannot be written.
        """
        if not self._remote:
            with atomic_file(self._path(name), error=BundleError) as path:
                yield path
            return
        with scratch_folder() as folder:
            path = folder / Path(name).name
            yield path
            with self._translated("written"):
                self._remote.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
                self._remote.put_file(str(path), self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.writing(name) as path:
            path.write_bytes(data)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _open(self, name: str) -> IO[bytes]:
        path = self._path(name)
        file: IO[bytes] = self._remote.open(path) if self._remote else open(path, "rb")  # noqa: SIM115 - the caller's
        return file

    @contextmanager
    def _translated(self, done: str) -> Iterator[None]:
        try:
            yield
        except ScmError:
            raise
        except Exception as exc:  # each protocol of fsspec has errors of its own
            if self._remote is None and not isinstance(exc, OSError):
                raise
            raise BundleError(f"{self.root} cannot be {done}: {exc}. Check the address and its permissions.") from exc
