"""Validation of untrusted bundles, in the order in which ``Bundle.open`` applies it.

Each check is cheap for hostile input: sizes are compared before anything is read, and only regular files inside the
folder are opened.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from .._util.cache_dir import is_cached
from .._util.files import check_relative, safe_join, sha256_file, unreadable
from .._util.publish import finish_interrupted, has_journal
from ..errors import BundleError, IntegrityError, SchemaError
from .goldens import check_safetensors
from .manifest import (
    FOLDER_FORMATS,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    SIGNATURE_NAME,
    SUFFIXES,
    FileEntry,
    Manifest,
    Role,
    describe_size,
)

MANIFEST_MAX_BYTES = 8 << 20
REPAIR = "Copy the bundle again, or export it again."

BUILD_ROLES: frozenset[Role] = frozenset({"weights", "config", "graph", "graph-data", "engine", "plan"})
"""Roles of the files that decide the images; cards, goldens and reports only describe them."""


def in_cache(folder: Path) -> bool:
    """Return whether a bundle is in a cache, of the hub or of scm-sdk, where it must not be changed."""
    if (folder / MANIFEST_NAME).is_symlink():  # the layout of snapshots of huggingface_hub
        return True
    return is_cached(folder)


def require_own(folder: Path) -> None:
    """Refuse to write into a cached bundle.

    Raises:
        BundleError: If the bundle is in a cache.
    """
    if in_cache(folder):
        raise BundleError(
            f"{folder} is in a cache, expected a bundle of your own to write to. Copy it first: scm-export bundle "
            "unpack MODEL -o FOLDER"
        )


def finish_change(folder: Path) -> None:
    """Complete an interrupted change of a bundle; see ``publish.finish_interrupted``.

    Raises:
        BundleError: If it cannot be completed, or the bundle is in a cache.
    """
    if has_journal(folder):
        require_own(folder)
    finish_interrupted(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises:
        BundleError: If there is no manifest, or a path in it is not allowed.
        SchemaError: If it is too large, malformed, inconsistent or from a newer version.
        IntegrityError: If it was altered after it was written.
    """
    path = folder / MANIFEST_NAME
    try:
        state = path.stat()
    except (OSError, ValueError) as exc:
        state = None
        cause: Exception | None = exc
    else:
        cause = None
    if state is None or not stat.S_ISREG(state.st_mode):
        found = f"holds no file {MANIFEST_NAME}" if folder.is_dir() else "is not a folder"
        raise BundleError(
            f"{folder} {found}, expected a bundle. Give the folder that scm-export wrote; scm-export -h lists how."
        ) from cause
    if state.st_size > MANIFEST_MAX_BYTES:
        raise SchemaError(
            f"{path} has {state.st_size} bytes, expected at most {MANIFEST_MAX_BYTES}. "
            "Do not use this folder unless you trust who made it."
        )
    try:
        with open(path, "rb") as stream:
            data = stream.read(MANIFEST_MAX_BYTES)
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror}. Check its permissions.") from exc
    manifest = Manifest.from_json(data)
    _check_digests(path, manifest)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Refuse an inconsistent manifest. Reads no file.

    Raises:
        BundleError: If a path is not allowed.
        SchemaError: If the parts are inconsistent.
    """
    for entry in manifest.files:
        check_relative(entry.path)  # first, because the checks below rely on short paths
    files = {entry.path for entry in manifest.files}
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    for entry in manifest.files:
        if entry.size < 0 or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise SchemaError(
                f"{MANIFEST_NAME} gives {entry.path} size {entry.size} and sha256 {entry.sha256!r}, expected "
                f"bytes and 64 hex digits. {REPAIR}"
            )
        if unknown := set(entry.built_from) - files:
            raise SchemaError(f"{entry.path} is built from {_some(unknown)}, expected listed files. {REPAIR}")
    # Case-insensitive, because such files are the same file on some file systems.
    known = {path.casefold() for path in files}
    if len(known) != len(manifest.files) or known & {MANIFEST_NAME.casefold(), SIGNATURE_NAME.casefold()}:
        raise SchemaError(
            f"{MANIFEST_NAME} lists a path twice, or itself or the signature; expected each file once. {REPAIR}"
        )
    if both := known & {path.casefold() for path in folders}:
        raise SchemaError(f"{MANIFEST_NAME} lists {_some(both)} as a file and as a folder, expected one. {REPAIR}")
    for artifact in manifest.all_artifacts:
        where = folders if artifact.format in FOLDER_FORMATS else files
        if artifact.path not in where:
            raise SchemaError(
                f"artifact {artifact.path!r} ({artifact.format}) is none of the listed files or folders: "
                f"{_some(where)}. {REPAIR}"
            )
        if not artifact.path.endswith(suffix := SUFFIXES.get(artifact.format, "")):
            # Libraries choose the format by the name: .ort and .xml are other formats that reference files differently.
            raise SchemaError(
                f"artifact {artifact.path!r} is said to be of format {artifact.format}, expected NAME{suffix}. {REPAIR}"
            )
    steps = [spec.num_inference_steps for spec in manifest.samplers]
    if not steps or len(set(steps)) != len(steps):
        raise SchemaError(
            f"{MANIFEST_NAME} holds samplers of {steps} steps, expected at least one, each number once. {REPAIR}"
        )
    if orphans := {a.num_inference_steps for a in manifest.artifacts} - {0, *steps}:
        raise SchemaError(f"artifacts of {sorted(orphans)} steps have no sampler; samplers have {steps}. {REPAIR}")
    _check_sizes(manifest)


def _check_sizes(manifest: Manifest) -> None:
    """Refuse further image sizes that are inconsistent.

    Raises:
        SchemaError: If they are.
    """
    paths = [artifact.path for artifact in manifest.all_artifacts]
    for size in manifest.sizes:
        steps = [spec.num_inference_steps for spec in size.samplers]
        made = {artifact.num_inference_steps for artifact in size.artifacts}
        if not steps or len(set(steps)) != len(steps) or not made or not made <= set(steps):
            raise SchemaError(
                f"an image size of {MANIFEST_NAME} has samplers of {steps} steps and artifacts of {sorted(made)}, "
                f"expected artifacts, and one sampler for each number of their steps. {REPAIR}"
            )
    if not manifest.sizes:
        return
    sizes = [describe_size(size) for size in manifest.image_sizes]
    if len(set(sizes)) != len(sizes) or len(set(paths)) != len(paths):
        raise SchemaError(
            f"{MANIFEST_NAME} has the image sizes {', '.join(sizes[:5])} with {len(paths)} artifacts, expected each "
            f"size and each artifact once. {REPAIR}"
        )
    if manifest.is_split:
        raise SchemaError(
            f"{MANIFEST_NAME} has the image sizes {', '.join(sizes[:5])} and a decoder of its own, expected one size "
            f"with it. {REPAIR}"
        )


def check_present(folder: Path, entry: FileEntry) -> Path:
    """Return the path of a listed file after checking that it is inside the folder and has its recorded size.

    Raises:
        BundleError: If a link leaves the folder.
        IntegrityError: If it is missing, not a regular file, or has another size.
    """
    path = safe_join(folder, entry.path)
    try:
        state = path.stat()
    except OSError as exc:
        if isinstance(exc, PermissionError):
            raise unreadable(path, exc) from exc
        raise IntegrityError(f"{path} is missing ({exc.strerror}), expected {entry.size} bytes. {REPAIR}") from exc
    if not stat.S_ISREG(state.st_mode):
        raise IntegrityError(f"{path} is not a plain file, expected one of {entry.size} bytes. {REPAIR}")
    if state.st_size != entry.size:
        raise IntegrityError(f"{path} has {state.st_size} bytes, expected {entry.size}. {REPAIR}")
    return path


def check_content(folder: Path, entry: FileEntry, *, sha256: str = "") -> None:
    """Compare a file with its recorded sha256; of a tensor file, also check the header.

    Args:
        folder: The folder of the bundle.
        entry: The recorded file.
        sha256: Digest of the file if it is known; "" reads the file.

    Raises:
        BundleError: If a link leaves the folder.
        IntegrityError: If the file is missing, altered, truncated or not a tensor file.
    """
    path = check_present(folder, entry)
    found = sha256 or sha256_file(path)
    if found != entry.sha256:
        raise IntegrityError(
            f"{path} has sha256 {found[:12]}.., expected {entry.sha256[:12]}..: it was altered or damaged. {REPAIR}"
        )
    if entry.path.endswith(".safetensors"):
        check_safetensors(path)


Stamp = tuple[int, ...]
"""Device, inode, size and times of a file; it changes whenever the file is replaced or written."""
_SETTLED_NS = 2 * 10**9
"""Resolution of file times: a file changed more recently may change again within the same time stamp."""


def stamp(path: str | os.PathLike[str]) -> Stamp:
    """Return the stamp of a file; () if it cannot be read."""
    try:
        state = os.stat(path)
    except OSError:
        return ()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def is_settled(stamp: Stamp) -> bool:
    """Return whether any later change of the file will change its stamp."""
    return bool(stamp) and time.time_ns() - stamp[-1] > _SETTLED_NS


def make_build_id(manifest: Manifest) -> str:
    """Return the sha256 over everything that decides the artifacts: files, samplers and library versions.

    Fields at their defaults are omitted, so that new fields of a later schema do not change the ids of older bundles.
    """
    parts = {
        "files": sorted([e.path, e.sha256] for e in manifest.files if e.role in BUILD_ROLES),
        "samplers": [_chosen(sampler) for sampler in manifest.samplers],
        "artifacts": [_chosen(artifact) for artifact in manifest.artifacts],
        "versions": manifest.versions,
        **({"cut_from": manifest.cut_from} if manifest.cut_from else {}),
        **({"sizes": _chosen(manifest.sizes)} if manifest.sizes else {}),
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def seal(manifest: Manifest) -> Manifest:
    """Return a manifest of the current schema with matching build id and digests.

    The digests detect damage, not tampering: an altered manifest can be sealed again.
    """
    whole = msgspec.structs.replace(manifest, schema_version=SCHEMA_VERSION, build_id=make_build_id(manifest))
    return msgspec.structs.replace(whole, digests=_make_digests(whole))


def _make_digests(manifest: Manifest) -> dict[str, str]:
    left_out = ("digests",) if manifest.sizes else ("digests", "sizes")  # older versions do not know sizes
    parts = {name: getattr(manifest, name) for name in _defaults(Manifest) if name not in left_out}
    encoded = {name: msgspec.json.encode(_chosen(part), order="deterministic") for name, part in parts.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in encoded.items()}


def _check_digests(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest that was changed after sealing.

    Raises:
        IntegrityError: If it is not; the message names the parts.
    """
    found = _make_digests(manifest)
    recorded = manifest.digests
    if manifest.schema_version > 1 or recorded:
        # An unused part that a later version added needs no digest.
        unused = {name for name, default in _defaults(Manifest).items() if getattr(manifest, name) == default}
        known = {name: digest for name, digest in found.items() if name in recorded or name not in unused}
        altered = [name for name in {**known, **recorded} if known.get(name) != recorded.get(name)]
        if altered:
            raise IntegrityError(
                f"{path} was altered or damaged: the sha256 in digests is not that of its {_some(altered)}. {REPAIR}"
            )
    if manifest.build_id != make_build_id(manifest):
        raise IntegrityError(f"{path} was altered: its build_id does not fit its content. {REPAIR}")


def _some(names: Iterable[str]) -> str:
    """Return the first few of many names, for a message."""
    shown = sorted(names)
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return (", ".join(map(repr, shown[:5])) or "none") + more


def _chosen(value: Any) -> Any:
    """Return a struct as a dict of its non-default fields, recursively."""
    if isinstance(value, tuple):
        return [_chosen(item) for item in value]
    if not isinstance(value, msgspec.Struct):
        return value
    found = {}
    for name, default in _defaults(type(value)).items():
        here = getattr(value, name)
        if here != default:
            found[name] = _chosen(here)
    return found


@lru_cache(maxsize=16)
def _defaults(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the default of each field of a struct; cached, because the lookup in msgspec is slow."""
    fields = msgspec.structs.fields(struct)
    return {f.name: f.default if f.default_factory is msgspec.NODEFAULT else f.default_factory() for f in fields}
