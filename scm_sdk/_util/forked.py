"""Detect objects inherited by ``fork``: the threads of their libraries do not exist in the child process.

There a call may wait for ever, and so may the destructor, when the child closes it or ends. So whoever holds such an
object checks with ``check_process`` that it runs where it was opened, and a child never runs the destructors of what
it inherited: the memory is the parent's.
"""

from __future__ import annotations

import ctypes
import os
from weakref import WeakSet

from ..errors import BackendFailure

_OPEN: WeakSet[object] = WeakSet()


def survive_fork(held: object) -> None:
    """Let a child that inherits an object by ``fork`` never destroy it."""
    _OPEN.add(held)


def check_process(pid: int, what: str) -> None:
    """Refuse to use what was opened in another process.

    Args:
        pid: The process that opened it.
        what: Its name, the subject of the message.

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
