"""Hugging Face hub repositories: download one into huggingface_hub's cache, or upload one.

The list of files is determined before anything large is downloaded: for a bundle its signature and the files of its
manifest with their sizes; for other models JSON, text and safetensors. Pickles, Python and other files are never
downloaded, and downloaded files are checked like any untrusted folder.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from .._util.files import check_relative, safe_join
from .._util.lazy import require
from ..errors import BundleError, ConfigError, IntegrityError
from .layout import CONFIG_MAX_BYTES, CONFIG_NAME, DECODER_FOLDER, INDEX_NAME, WEIGHTS_NAME
from .manifest import MANIFEST_NAME, SIGNATURE_NAME
from .verify import MANIFEST_MAX_BYTES, read_manifest

MAX_BYTES = 64 << 30
"""Maximum size of a download, bytes."""
MAX_FILES = 4096
_CHECKPOINT = (
    CONFIG_NAME, WEIGHTS_NAME, f"{DECODER_FOLDER}/{CONFIG_NAME}", f"{DECODER_FOLDER}/{WEIGHTS_NAME}", "README.md",
)  # fmt: skip
_PIPELINE_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".md"}
_MARKERS = (MANIFEST_NAME, INDEX_NAME, CONFIG_NAME)
_HEAVY = {".onnx", ".onnx_data", ".safetensors", ".engine"}
HUB_PREFIX = "hf:"
"""Prefix of a hub id where a path is expected: ``hf:owner/name``."""
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repo_id(text: str) -> bool:
    """Return whether a text has the form ``owner/name``."""
    return _REPO_ID.fullmatch(text) is not None


def fetch(
    repo_id: str, *, revision: str | None = None, local_files_only: bool = False, max_bytes: int = MAX_BYTES
) -> Path:
    """Download the model files of a repository and return their local folder.

    Without a network, or with ``HF_HUB_OFFLINE=1``, only the cache is read.

    Args:
        repo_id: ``owner/name``.
        revision: A branch, a tag or a commit; None is ``main``. Only a commit is immutable.
        local_files_only: Read only the cache.
        max_bytes: Maximum total size of the download.

    Returns:
        The snapshot's folder in huggingface_hub's cache: links to its files, not to be written to.

    Raises:
        BackendUnavailable: If huggingface_hub is not installed.
        ConfigError: If the id or the revision is malformed.
        BundleError: If there is no such repository or revision, it is not in the cache and the hub cannot be
            reached, it holds no model for scm-sdk, or it is too large.
        IntegrityError: If a file does not have the size that the manifest gives, or is missing in the cache.
    """
    library = _library(f"{HUB_PREFIX}{repo_id}")
    _check_names(repo_id, revision)
    shown = f"{HUB_PREFIX}{repo_id}" + (f"@{revision}" if revision else "")
    reason: Exception | None = None
    if not local_files_only and not library.constants.HF_HUB_OFFLINE:
        try:
            info = library.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        except Exception as exc:  # errors of huggingface_hub, its HTTP library and the system have no common base class
            _raise_if_answered(library, exc, shown)
            reason = exc
        else:
            return _download(library, repo_id, revision, shown, info, max_bytes)
    return _from_cache(library, repo_id, revision, shown, reason)


def push(
    folder: Path, files: Sequence[str], repo_id: str, *, contents: Mapping[str, bytes] | None = None,
    revision: str | None = None, private: bool | None = None, message: str = "", create_pr: bool = False,
) -> str:  # fmt: skip
    """Upload files of a folder in one commit; the repository and the branch are created if missing.

    Args:
        folder: The folder; only ``files`` are uploaded.
        files: Relative paths.
        contents: Content that replaces that of a file on disk, by path.
        repo_id: ``owner/name``; you must be logged in (``hf auth login``, or ``HF_TOKEN``).
        revision: A branch; None is ``main``.
        private: Visibility of a new repository; None is the owner's default.
        message: Commit message.
        create_pr: Open a pull request instead of writing to the branch.

    Returns:
        URL of the commit.

    Raises:
        BackendUnavailable: If huggingface_hub is not installed.
        ConfigError: If the id or the revision is malformed.
        BundleError: If a path leaves the folder, or the hub refuses or cannot be reached.
    """
    library = _library("push_to_hub")
    _check_names(repo_id, revision)
    contents = contents or {}
    operations = [
        library.CommitOperationAdd(name, contents[name] if name in contents else safe_join(folder, name))
        for name in files
    ]
    api = library.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id, operations, revision=revision, commit_message=message or "Upload with scm-sdk",
            create_pr=create_pr or None,
        )  # fmt: skip
    except Exception as exc:  # as in fetch
        raise BundleError(
            f"{repo_id} could not be filled: {_first_line(exc)}. Nothing was committed. Check the name and the "
            "network, and that you may write there: hf auth login"
        ) from exc
    return str(commit.pr_url if create_pr and commit.pr_url else commit.commit_url)


def _library(purpose: str) -> ModuleType:
    for part in ("constants", "errors"):  # which scm-sdk does not install by default
        require(f"huggingface_hub.{part}", extra="hub", purpose=purpose)
    return require("huggingface_hub", extra="hub", purpose=purpose)


def _check_names(repo_id: str, revision: str | None) -> None:
    if not is_repo_id(repo_id):
        raise ConfigError(f"hub id is {repo_id!r}, expected 'owner/name' of letters, digits, '-', '_' and '.'.")
    if revision is not None and not re.fullmatch(r"[\w][\w./-]{0,200}", revision):
        raise ConfigError(f"revision is {revision!r}, expected a branch, a tag or a commit.")
    if revision is not None and ".." in revision:
        raise ConfigError(f"revision is {revision!r}, expected a branch, a tag or a commit without '..'.")


def _raise_if_answered(library: ModuleType, exc: Exception, shown: str) -> None:
    """Raise for an answer of the hub; return if the hub was not reached."""
    errors = library.errors
    if isinstance(exc, errors.GatedRepoError):
        raise BundleError(f"{shown} is gated. Ask for access on its page, then: hf auth login") from exc
    if isinstance(exc, errors.RevisionNotFoundError):
        raise BundleError(
            f"{shown}: the repository is there, this revision is not. Check it, or leave it out."
        ) from exc
    if isinstance(exc, errors.RepositoryNotFoundError):
        raise BundleError(
            f"{shown} is no repository of the hub that you may read. Check the name; for a private one: hf auth login"
        ) from exc


def _download(library: ModuleType, repo_id: str, revision: str | None, shown: str, info: Any, max_bytes: int) -> Path:
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    marker = next((name for name in _MARKERS if name in sizes), None)
    if marker is None:
        raise BundleError(_no_model(shown, sizes))
    if (sizes[marker] or 0) > (MANIFEST_MAX_BYTES if marker == MANIFEST_NAME else CONFIG_MAX_BYTES):
        raise BundleError(f"{shown}: {marker} has {sizes[marker]} bytes, more than any model needs. It is refused.")
    if marker == MANIFEST_NAME:
        first = _snapshot(library, repo_id, info.sha, [MANIFEST_NAME], shown)
        listed = {entry.path: entry.size for entry in read_manifest(first).files}
        for name, size in listed.items():
            if sizes.get(name, -1) not in (size, None):
                found = f"has {sizes[name]} bytes" if name in sizes else "is not there"
                raise IntegrityError(f"{shown}: {name} {found}, its manifest lists {size} bytes. Ask who published it.")
        wanted = {name: sizes[name] for name in (MANIFEST_NAME, SIGNATURE_NAME) if name in sizes} | listed
    else:
        wanted = {name: size for name, size in sizes.items() if name in _of_model(sizes)}
    for name in wanted:
        check_relative(name)
    total = sum(size or 0 for size in wanted.values())
    if total > max_bytes or len(wanted) > MAX_FILES:
        raise BundleError(
            f"{shown} holds {len(wanted)} files of {total} bytes, expected at most {MAX_FILES} files and {max_bytes} "
            "bytes. Fetch it yourself if you trust it, and give its folder."
        )
    folder = _snapshot(library, repo_id, revision, sorted(wanted), shown)
    if folder.name != info.sha:
        raise BundleError(f"{shown} changed while it was being fetched. Try again, or name a commit as revision.")
    _check_there(folder, wanted, shown)
    return folder


def _from_cache(library: ModuleType, repo_id: str, revision: str | None, shown: str, reason: Exception | None) -> Path:
    why = f"the hub cannot be reached ({_first_line(reason)})" if reason else "only the cache may be read (offline)"
    try:
        path = library.snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=list(_MARKERS[:1])
        )
    except Exception as exc:  # as in fetch
        raise BundleError(
            f"{shown} is not in the hub's cache, and {why}. Check the name, go online, or unset HF_HUB_OFFLINE."
        ) from exc
    folder = _snapshot_of(library, repo_id, Path(path), shown)
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    if MANIFEST_NAME in names:
        wanted = {MANIFEST_NAME, *(entry.path for entry in read_manifest(folder).files)} | ({SIGNATURE_NAME} & names)
    else:
        wanted = _of_model(names)
        if not wanted:
            raise BundleError(_no_model(f"{shown} in the cache", names))
    try:
        _check_there(folder, wanted, shown)
    except IntegrityError as exc:
        raise IntegrityError(f"{exc} It is not whole in the cache, and {why}.") from exc
    return folder


def _snapshot(library: ModuleType, repo_id: str, revision: str | None, names: Sequence[str], shown: str) -> Path:
    patterns = [glob.escape(name) for name in names]
    try:
        path = Path(library.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as exc:  # as in fetch
        raise BundleError(f"{shown} could not be fetched: {_first_line(exc)}. Run it again to continue.") from exc
    return _snapshot_of(library, repo_id, path, shown)


def _snapshot_of(library: ModuleType, repo_id: str, folder: Path, shown: str) -> Path:
    """Return the folder if it is a snapshot of the repository, because a ref is a file that can name any folder.

    Raises:
        BundleError: If it is not.
    """
    snapshots = Path(library.constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots")
    if folder.resolve().parent != snapshots.resolve():
        raise BundleError(
            f"{shown} leads to {folder.resolve()} in the hub's cache, expected a folder in {snapshots}. Delete "
            f"{snapshots.parent} and fetch it again."
        )
    return folder


def _check_there(folder: Path, names: Iterable[str], shown: str) -> None:
    for name in names:
        path = safe_join(folder, name)
        if not path.is_file():
            raise IntegrityError(f"{shown}: {name} is missing, expected a file.")
        if PurePosixPath(name).suffix not in _HEAVY and path.stat().st_size > CONFIG_MAX_BYTES * 4:
            raise BundleError(f"{shown}: {name} has {path.stat().st_size} bytes, more than any model needs.")


def _of_model(names: Iterable[str]) -> set[str]:
    """Return the model files of a repository without a manifest."""
    names = set(names)
    if INDEX_NAME in names:
        return {name for name in names if PurePosixPath(name).suffix in _PIPELINE_SUFFIXES}
    return set(_CHECKPOINT) & names if CONFIG_NAME in names else set()  # pyright: ignore[reportReturnType]


def _no_model(shown: str, names: Iterable[str]) -> str:
    there = ", ".join(sorted(names)[:5]) or "nothing"
    return (
        f"{shown} holds none of {', '.join(_MARKERS)}, expected a bundle or a checkpoint; it holds {there}. Pickles "
        "are never read from a hub; see: scm-export import -h"
    )


def _first_line(exc: BaseException | None) -> str:
    text = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {text[0][:200]}" if text else type(exc).__name__
