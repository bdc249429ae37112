"""Where this package keeps what it may make again: the user's cache folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

UNPACKED = "unpacked"
"""Folder of the bundles that ``.scmz`` files held."""


def cache_folder() -> Path:
    """Return the package's folder in the platform's cache folder, which ``XDG_CACHE_HOME`` moves."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        base = Path(home)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "scm-sdk"
