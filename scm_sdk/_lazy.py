"""Import a heavy, optional library at the moment it is needed, or say how to get it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .errors import BackendUnavailable


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it.

    A bare folder of that name, as some stub packages leave one, is not the module.
    """
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the package around it is absent
        return False
    return spec is not None and spec.loader is not None and spec.origin is not None


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or raise with the command that installs it.

    Args:
        module: Import name, for example ``"onnxruntime"``.
        extra: The extra of this package that brings it.
        purpose: What it is needed for; the subject of the message, for example
            ``"backend 'onnxruntime'"``.

    Raises:
        BackendUnavailable: If the module is absent or fails to import.
    """
    try:
        return import_module(module)
    except ImportError as exc:
        raise BackendUnavailable(
            f"{purpose} needs {module}, which could not be imported ({exc}). "
            f"Install it with: pip install 'scm-sdk[{extra}]'. See what runs here: scm-export doctor"
        ) from exc
