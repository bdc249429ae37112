"""The files of onnxruntime-web that a site needs, from its npm package: pinned by version and by each file's sha256.

They come from a path that the caller gives, from the cache, or through ``npm pack``, which reads the user's own
configuration. In all cases only files of the pinned content are used.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from scm_sdk._util.cache_dir import trusted_folder, writable_folder
from scm_sdk._util.files import atomic_write_bytes, read_regular, scratch_folder, sha256_bytes
from scm_sdk.errors import BackendUnavailable, ConfigError, IntegrityError

Device = Literal["wasm", "webgpu"]

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
_CACHED = f"{PACKAGE}-{VERSION}"
_MAX_BYTES = 64 << 20
"""Largest file that is read."""
_NPM_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class RuntimeFiles:
    """Names of one device's files.

    Attributes:
        module: The ES module that is imported.
        glue: The ES module that starts the WebAssembly program.
        binary: The program.
    """

    module: str
    glue: str
    binary: str

    @property
    def names(self) -> tuple[str, str, str]:
        """The three names."""
        return self.module, self.glue, self.binary


RUNTIME_FILES: dict[Device, RuntimeFiles] = {
    "wasm": RuntimeFiles(
        module="ort.wasm.min.mjs", glue="ort-wasm-simd-threaded.mjs", binary="ort-wasm-simd-threaded.wasm"
    ),
    "webgpu": RuntimeFiles(
        module="ort.webgpu.min.mjs",
        glue="ort-wasm-simd-threaded.asyncify.mjs",
        binary="ort-wasm-simd-threaded.asyncify.wasm",
    ),
}
SHA256 = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
"""Of ``dist/`` in the npm package."""


def cached_files() -> dict[str, bytes] | None:
    """Return the files of all devices if the cache has them, else None. Nothing is fetched."""
    folder = trusted_folder(_CACHED)
    if folder is None:
        return None
    try:
        found = {name: read_regular(folder / name, most=_MAX_BYTES) for name in SHA256}
    except OSError:
        return None
    return found if all(sha256_bytes(data) == SHA256[name] for name, data in found.items()) else None


def runtime_files(devices: Sequence[Device], source: Path | None = None) -> dict[str, bytes]:
    """Return the content of the files that some devices need, by name.

    Args:
        devices: The devices.
        source: Folder or ``.tgz`` file of the npm package; None takes the cache, or fetches the package with npm.

    Raises:
        ConfigError: If ``source`` is not the package.
        IntegrityError: If a file is not the pinned one.
        BackendUnavailable: If it must be fetched and npm is not installed or fails.
    """
    if source is not None:
        found = _read_package(source)
    else:
        cached = cached_files()
        found = _fetch() if cached is None else cached
    return {name: found[name] for device in devices for name in RUNTIME_FILES[device].names}


@lru_cache(len(SHA256))
def packed(data: bytes) -> bytes:
    """Return data as gzip, the same bytes on every machine with the same zlib."""
    return gzip.compress(data, 9, mtime=0)


def _fetch() -> dict[str, bytes]:
    """Fetch the package with npm, check it and keep its files in the cache."""
    asked = f"{PACKAGE}@{VERSION}"
    offline = f"On another machine run: npm pack {asked}; then give the file: --onnxruntime-web {_CACHED}.tgz"
    npm = shutil.which("npm")
    if npm is None:
        raise BackendUnavailable(f"{asked} is not in the cache, and npm, which fetches it, is not installed. {offline}")
    with scratch_folder() as folder:
        command = [npm, "pack", asked, "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=_NPM_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise BackendUnavailable(f"npm pack {asked} failed: {exc}. {offline}") from exc
        archive = folder / f"{_CACHED}.tgz"
        if done.returncode or not archive.is_file():
            reason = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
            raise BackendUnavailable(f"npm pack {asked} failed: {reason.strip()}. Check the network. {offline}")
        found = _read_package(archive)
    if (cache := writable_folder(_CACHED, purpose=f"{asked} is fetched again each time")) is not None:
        for name, data in found.items():
            atomic_write_bytes(cache / name, data)
    return found


def _read_package(source: Path) -> dict[str, bytes]:
    """Read the pinned files from a folder or an archive of the package."""
    try:
        if source.is_dir():
            dist = source / "dist" if (source / "dist").is_dir() else source
            found = {name: read_regular(dist / name, most=_MAX_BYTES) for name in SHA256}
        else:
            with tarfile.open(source, "r:gz") as archive:
                found = {name: _member(archive, f"package/dist/{name}") for name in SHA256}
    except (OSError, tarfile.TarError, KeyError, EOFError) as exc:
        reason = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.strerror else exc
        raise ConfigError(
            f"{source} is not the npm package {PACKAGE}: {reason}. Expected its folder or {_CACHED}.tgz, which "
            f"npm pack {PACKAGE}@{VERSION} writes."
        ) from exc
    for name, data in found.items():
        digest = sha256_bytes(data)
        if digest != SHA256[name]:
            raise IntegrityError(
                f"{name} of {source} has sha256 {digest[:16]}.., expected {SHA256[name][:16]}.. of version {VERSION}. "
                f"Give that version: npm pack {PACKAGE}@{VERSION}"
            )
    return found


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return a file of an archive."""
    member = archive.getmember(name)
    stream = archive.extractfile(member) if member.isreg() and member.size <= _MAX_BYTES else None
    if stream is None:
        raise tarfile.ReadError(f"{name} is no file of at most {_MAX_BYTES} bytes")
    return stream.read()
