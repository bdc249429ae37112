"""Resolve the location of a model (a folder, a ``.scmz`` file or a hub id) to a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .._util.locks import FolderLock
from ..errors import BundleError, ConfigError
from .archive import SUFFIX
from .archive_cache import hold, unpacked
from .hub import HUB_PREFIX, fetch, is_repo_id
from .verify import finish_change


def locate(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    check: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Return the local folder of a model.

    The hub is contacted only for ``hf:owner/name``, or for ``owner/name`` with a revision. Any other text is a path on
    this machine, so that a mistyped path is never sent to the hub.

    Args:
        path: A folder, a ``.scmz`` file, or ``hf:owner/name`` on the Hugging Face hub.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Read only the cache of the hub.
        check: Called with the folder before it is returned, for example to check its signature.

    Raises:
        BundleError: If it is none of them; see also ``archive.unpack`` and ``hub.fetch``.
        ConfigError: If a revision is given for a path that is not a hub id.
    """
    local, text = Path(path), os.fspath(path)
    if not text:
        raise BundleError(f"the path is empty, expected a folder, a {SUFFIX} file or {HUB_PREFIX}owner/name.")
    repo_id = text.removeprefix(HUB_PREFIX)
    if repo_id != text or (revision is not None and is_repo_id(text) and not local.exists()):
        folder = fetch(repo_id, revision=revision, local_files_only=local_files_only)
        check(folder)
        return folder
    if revision is not None:
        raise ConfigError(
            f"revision is {revision!r}, but {local} is no hub id ({HUB_PREFIX}owner/name). Leave the revision out."
        )
    if local.is_file() and local.suffix == SUFFIX:
        return unpacked(local, check=check)
    finish_change(local)
    if not local.is_dir():
        found = "is a file" if local.exists() else "does not exist"
        hub = f" If it is a repository of the Hugging Face hub, write {HUB_PREFIX}{text}." if is_repo_id(text) else ""
        raise BundleError(
            f"{local} {found}, expected the folder of a bundle or of a checkpoint, or a {SUFFIX} file. Check the "
            f"path.{hub}"
        )
    check(local)
    return local


def find_and_hold(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    check: Callable[[Path], object] = lambda folder: None,
) -> tuple[Path, FolderLock | None]:
    """Return the local folder of a model, and the lock that keeps it in the cache if a ``.scmz`` file was unpacked.

    Args are those of ``locate``.

    Raises:
        BundleError: As ``locate``.
        ConfigError: As ``locate``.
    """
    while True:
        folder = locate(path, revision=revision, local_files_only=local_files_only, check=check)
        try:
            return folder, hold(folder)
        except FileNotFoundError:  # removed from the cache in the meantime
            continue
