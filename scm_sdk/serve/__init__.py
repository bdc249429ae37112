"""Serve a bundle over HTTP, and call such a server. Extra: ``serve``.

``make_app(Service.open(ServeOptions(bundle=...)))`` is an ASGI application for a server of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._util.public import lazy_names

if TYPE_CHECKING:
    from .app import make_app
    from .options import ServeOptions
    from .service import Service

__all__ = ["ServeOptions", "Service", "make_app"]

_HOMES = {"ServeOptions": ".options", "Service": ".service", "make_app": ".app"}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
