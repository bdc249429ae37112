"""The cache directory of this package, and checks that other users cannot write to it.

One variable moves all of it: ``SCM_CACHE_DIR``, an absolute path. Without it, ``scm-sdk`` in ``XDG_CACHE_HOME`` or in
the platform's cache folder. A cache only saves time: where there is none, or it cannot be written, work goes on without
it after one warning.

What decides which code runs (engines, unpacked bundles) is read only from folders that the user alone can write. Each
folder on the way belongs to the user or to root, no other may write to it, and none below the base is a link: the rules
of ssh's ``StrictModes``.
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
"""Folder of the bundles that ``.scmz`` files held."""
_UNMAPPED_UID = 65534
"""How a container sees owners outside it."""
_WARNED: set[str] = set()
_TEMPORARY: dict[int, Path] = {}
"""By process: after a fork each has its own."""


def cache_folder() -> Path | None:
    """Return the cache folder, which need not exist; None where no home is known.

    Raises:
        ConfigError: If ``SCM_CACHE_DIR`` is not an absolute path.
    """
    found = _locate()
    return None if found is None else found[1]


def trusted_folder(part: str) -> Path | None:
    """Return a folder of the cache that exists and that the user alone can write, to read from; else None.

    One warning says why a folder that exists is ignored.
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
    """Return a folder of the cache that the user alone can write, made if it is missing; else None.

    Unpacked bundles may be read by others, as an image that root fills is; the rest is the user's alone.

    Args:
        part: Its name.
        purpose: What is lost without it; the subject of the one warning.
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
    """Return a folder of this process, deleted when it ends, for what must be on a disk.

    Raises:
        BundleError: If there is no place for one.
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
    """Return whether a folder lies among the unpacked bundles of the cache or of this process."""
    roots = [cache_folder(), *_TEMPORARY.values()]
    return any(folder.resolve().is_relative_to((root / UNPACKED).resolve()) for root in roots if root is not None)


def why_insecure(folder: Path) -> str:
    """Return why others could change what is in a folder of the cache; "" if only its user can."""
    found = _locate()
    if found is None or not hasattr(os, "geteuid"):  # Windows: the profile's own access list decides
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
            # In a sticky folder such as /tmp nobody can replace what belongs to another user.
            if state.st_mode & 0o022 and (path == folder or not state.st_mode & stat.S_ISVTX):
                return f"{path} can be written by other users (mode {stat.S_IMODE(state.st_mode):04o})"
    except OSError as exc:
        return f"{exc.filename} cannot be looked at: {exc.strerror}"
    return ""


def withdraw_write(folder: Path) -> None:
    """Let nobody but the owner write to a folder and what is in it, whatever the umask was."""
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o022:
            path.chmod(mode & ~0o022)


def warn_once(text: str) -> None:
    """Warn about a cache, once in a process."""
    if text not in _WARNED:
        _WARNED.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


_REMEDY = f"Set {CACHE_VARIABLE} to a folder that you alone may write to"


def _locate() -> tuple[Path, Path] | None:
    """Return the folder that the environment names, and the cache folder in it."""
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
    """Make a folder and those above it, writable by the user alone whatever the umask says."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        _make(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=mode)


def _remove_temporary() -> None:
    if (folder := _TEMPORARY.pop(os.getpid(), None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
