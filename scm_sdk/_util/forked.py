"""Detect objects inherited by ``fork``: the threads of their libraries do not exist in the child process.

In the child a call or the destructor may block indefinitely. The owner of such an object therefore calls
``check_process``, which verifies that it runs in the process that opened it, and a child never runs the destructors of
inherited objects: the memory belongs to the parent.
"""

from __future__ import annotations

import ctypes
import os
from weakref import WeakSet

from ..errors import BackendFailure

_OPEN: WeakSet[object] = WeakSet()


def survive_fork(held: object) -> None:
    """Keep a child that inherits an object by ``fork`` from destroying it."""
    _OPEN.add(held)


def check_process(pid: int, what: str) -> None:
    """Refuse to use an object that another process opened.

    Args:
        pid: The process that opened it.
        what: Name of the object, the subject of the message.

    Raises:
        BackendFailure: If this is another process.
    """
    if os.getpid() != pid:
        raise BackendFailure(
            f"this {what} was opened in another process ({pid}), expected one of this process ({os.getpid()}). Open it "
            "here: call Generator.from_pretrained after the fork, or start processes with the method 'spawn'."
        )


def _keep_inherited() -> None:
    for held in tuple(_OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)
