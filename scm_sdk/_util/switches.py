"""Boolean environment variables."""

from __future__ import annotations

import os

from ..errors import ConfigError

_YES = ("1", "true", "yes", "on")
_NO = ("", "0", "false", "no", "off")


def is_on(variable: str) -> bool:
    """Return whether an environment variable is on; absent or empty is off.

    Raises:
        ConfigError: If the value is neither on nor off.
    """
    value = os.environ.get(variable, "")
    if value.lower() not in _YES + _NO:
        raise ConfigError(
            f"{variable} is {value!r}, expected {', '.join(_YES)}, or {', '.join(_NO[1:])} or nothing. Correct it."
        )
    return value.lower() in _YES
