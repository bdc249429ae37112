"""What a bundle's file is for, told from its name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import get_args

from .errors import ConfigError
from .manifest import Role

_OF_NAME: dict[str, Role] = {
    "README.md": "card",
    "config.json": "config",
    "scheduler_config.json": "config",
    "build.json": "config",
    ".safetensors": "weights",
    ".onnx": "graph",
    ".onnx_data": "graph-data",
    ".engine": "engine",
}
_OF_FOLDER: dict[str, Role] = {
    "golden": "golden",
    "reports": "report",
    "precision": "plan",
    "calibration": "calibration",
}


def role_of(relative: str) -> Role:
    """Return the role of a file.

    Raises:
        ConfigError: If its name does not tell it.
    """
    path = PurePosixPath(relative)
    role = _OF_FOLDER.get(path.parts[0]) if len(path.parts) > 1 else None
    role = role or _OF_NAME.get(path.name) or _OF_NAME.get(path.suffix)
    if role is None:
        raise ConfigError(
            f"the role of {relative} cannot be told from its name, expected one of "
            f"{', '.join(get_args(Role))}. Give it in roles, or leave the file out."
        )
    return role
