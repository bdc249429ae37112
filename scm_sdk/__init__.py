"""Train, export and run continuous-time consistency models (sCM).

``import scm_sdk`` loads nothing heavy: each public name is imported on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .bundle.bundle import Bundle
    from .inference.generator import Generator
    from .model.consistency import ConsistencyModel
    from .model.sampler import Sampler
    from .spec import SamplerSpec

__all__ = ["Bundle", "ConsistencyModel", "Generator", "Sampler", "SamplerSpec", "__version__"]

_HOME = {
    "Bundle": ".bundle.bundle",
    "ConsistencyModel": ".model.consistency",
    "Generator": ".inference.generator",
    "Sampler": ".model.sampler",
    "SamplerSpec": ".spec",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
