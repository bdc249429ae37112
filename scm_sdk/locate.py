"""Where a model lies: a folder, a ``.scmz`` file or a repository of the hub, all of which become a folder."""

from __future__ import annotations

import os
from pathlib import Path

from .archive import SUFFIX
from .errors import BundleError, ConfigError
from .hub import fetch, is_repo_id
from .unpacked import unpacked


def locate(path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Return the local folder of a model.

    What is on this disk comes first. A text ``owner/name`` is taken for a hub id only where there is no folder
    ``owner`` here, so that a mistyped path is not asked for in public.

    Args:
        path: A folder, a ``.scmz`` file, or ``owner/name`` on the hub.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Ask the hub's cache alone.

    Raises:
        BundleError: If it is none of them; see also ``archive.unpack`` and ``hub.fetch``.
        ConfigError: If a revision is given for what is no hub id.
    """
    local, text = Path(path), os.fspath(path)
    if not local.exists() and is_repo_id(text) and not Path(text.partition("/")[0]).exists():
        return fetch(text, revision=revision, local_files_only=local_files_only)
    if revision is not None:
        raise ConfigError(f"revision is {revision!r}, but {local} is no hub id ('owner/name'). Leave the revision out.")
    if local.is_file() and local.suffix == SUFFIX:
        return unpacked(local)
    if not local.is_dir():
        found = "is a file" if local.exists() else "does not exist"
        raise BundleError(
            f"{local} {found}, expected the folder of a bundle or of a checkpoint, a {SUFFIX} file, or a hub id "
            "'owner/name'. Check the path; make one with: scm-export demo"
        )
    return local
