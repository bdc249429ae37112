"""The cache directory of this package, and checks that other users cannot write to it.

``SCM_CACHE_DIR``, an absolute path, sets the location. The default is ``scm-sdk`` in ``XDG_CACHE_HOME`` or in the cache
folder of the platform. A cache only saves time: if there is none, or it is not writable, the caller continues without
it after one warning.

Data that decides which code runs (engines, unpacked bundles) is read only from folders that no other user can write to.
Each folder on the path belongs to the user or to root, is not writable by others, and is not a link below the base: the
rules of ssh's ``StrictModes``.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from ..errors import BundleError, ConfigError

CACHE_VARIABLE = "SCM_CACHE_DIR"
UNPACKED = "unpacked"
"""Folder of unpacked ``.scmz`` files."""
_UNMAPPED_UID = 65534
"""User id that a container shows for owners outside of it."""
_WARNED: set[str] = set()
_TEMPORARY: dict[int, Path] = {}
"""Temporary folder by process id: a forked child needs its own."""


def cache_folder() -> Path | None:
    """Return the cache folder, which need not exist; None if no home folder is known.

    Raises:
        ConfigError: If ``SCM_CACHE_DIR`` is not an absolute path.
    """
    found = _locate()
    return None if found is None else found[1]


def trusted_folder(part: str) -> Path | None:
    """Return an existing cache folder that no other user can write to, for reading; else None.

    One warning states why an existing folder is ignored.
    """
    root = cache_folder()
    folder = None if root is None else root / part
    if folder is None or not os.path.lexists(folder):
        return None
    if problem := why_insecure(folder):
        warn_once(f"{folder} is ignored: {problem}. {_REMEDY}")
        return None
    return folder


def writable_folder(part: str, *, purpose: str) -> Path | None:
    """Return a cache folder that no other user can write to, created if missing; else None.

    Unpacked bundles are readable by others, so that root can fill the cache of a container image; other folders are
    not.

    Args:
        part: Name of the folder.
        purpose: What is lost without the folder; the subject of the warning.
    """
    root = cache_folder()
    if root is None:
        problem = "no home folder is known"
    else:
        try:
            _make(root / part, mode=0o755 if part in ("", UNPACKED) else 0o700)
            problem = why_insecure(root / part)
            if not problem and not os.access(root / part, os.W_OK | os.X_OK):
                problem = f"{root / part} cannot be written"
        except OSError as exc:
            problem = f"{root / part} cannot be made: {exc.strerror or exc}"
        if not problem:
            return root / part
    warn_once(f"{purpose}: {problem}. {_REMEDY}")
    return None


def temporary_folder() -> Path:
    """Return a temporary folder of this process, deleted when the process ends.

    Raises:
        BundleError: If no temporary folder can be created.
    """
    pid = os.getpid()
    if pid not in _TEMPORARY:
        try:
            _TEMPORARY[pid] = Path(tempfile.mkdtemp(prefix="scm-sdk-")).resolve()
        except OSError as exc:
            raise BundleError(
                f"no temporary folder can be made: {exc.strerror or exc}. Set {CACHE_VARIABLE} or TMPDIR to a folder "
                "that you may write to."
            ) from exc
        atexit.register(_remove_temporary)
    return _TEMPORARY[pid]


def is_cached(folder: Path) -> bool:
    """Return whether a folder is an unpacked bundle of the cache or of this process."""
    roots = [cache_folder(), *_TEMPORARY.values()]
    return any(folder.resolve().is_relative_to((root / UNPACKED).resolve()) for root in roots if root is not None)


def why_insecure(folder: Path) -> str:
    """Return why other users could change a cache folder; "" if they cannot."""
    found = _locate()
    if found is None or not hasattr(os, "geteuid"):  # Windows: the access list of the profile decides
        return ""
    base = found[0]
    above = Path(os.path.realpath(base.parent))
    below = [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    try:
        for path in (*reversed(below), *reversed(above.parents), above):
            state = os.lstat(path)
            owners = {0, os.geteuid()} | (set() if path in below else {_UNMAPPED_UID})
            if stat.S_ISLNK(state.st_mode):
                return f"{path} is a link, expected a folder"
            if not stat.S_ISDIR(state.st_mode):
                return f"{path} is no folder"
            if state.st_uid not in owners:
                return f"{path} belongs to user {state.st_uid}"
            # In a sticky folder such as /tmp, a user cannot replace the files of another.
            if state.st_mode & 0o022 and (path == folder or not state.st_mode & stat.S_ISVTX):
                return f"{path} can be written by other users (mode {stat.S_IMODE(state.st_mode):04o})"
    except OSError as exc:
        return f"{exc.filename} cannot be looked at: {exc.strerror}"
    return ""


def withdraw_write(folder: Path) -> None:
    """Remove write permission of group and others from a folder and its content."""
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o022:
            path.chmod(mode & ~0o022)


def warn_once(text: str) -> None:
    """Warn about a cache, once per process and text."""
    if text not in _WARNED:
        _WARNED.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


_REMEDY = f"Set {CACHE_VARIABLE} to a folder that you alone may write to"


def _locate() -> tuple[Path, Path] | None:
    """Return the base folder of the environment, and the cache folder in it."""
    if named := os.environ.get(CACHE_VARIABLE):
        if not os.path.isabs(named):
            raise ConfigError(f"{CACHE_VARIABLE} is {named!r}, expected an absolute path.")
        return Path(named), Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative one is ignored
        try:
            home = Path.home()
        except RuntimeError:  # neither HOME nor an entry in the password file
            return None
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or str(home / "AppData" / "Local")
        else:
            base = str(home / ("Library/Caches" if sys.platform == "darwin" else ".cache"))
    return (Path(base), Path(base) / "scm-sdk") if os.path.isabs(base) else None


def _make(folder: Path, *, mode: int = 0o755) -> None:
    """Create a folder and its parents, writable by the user only, regardless of the umask."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        _make(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=mode)


def _remove_temporary() -> None:
    if (folder := _TEMPORARY.pop(os.getpid(), None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
