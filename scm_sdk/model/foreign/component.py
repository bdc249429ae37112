"""The files of one component of a diffusers folder: JSON of bounded size, weights in one file or in shards.

No weight is read here, and neither torch nor diffusers is imported. Files from elsewhere are not trusted: sizes are
capped, names may not lead out of the folder, weights are safetensors or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ..._names import WEIGHTS_NAME
from ...errors import BundleError, ConfigError
from ...files import safe_join

REMEDY = "Give the folder that save_pretrained wrote, whole."
_JSON_MAX_BYTES = 8 << 20


def read_json(path: Path, *, remedy: str = REMEDY) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        path: The file.
        remedy: What to do about a bad one, for the message.

    Raises:
        BundleError: If it cannot be read or is too large.
        ConfigError: If it is no JSON object.
    """
    try:
        if path.stat().st_size > _JSON_MAX_BYTES:
            raise BundleError(f"{path} has {path.stat().st_size} bytes, expected at most {_JSON_MAX_BYTES}. {remedy}")
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror}. {remedy}") from exc
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path} is no JSON object: {exc}. {remedy}") from exc


def weight_files(folder: Path, name: str = WEIGHTS_NAME, *, remedy: str = REMEDY) -> list[Path]:
    """Return the safetensors files of a component: one, or all shards that its index names.

    Raises:
        BundleError: If there are none, or one is missing.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return [folder / name]
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        more = f" {others[0]} is a pickle, which is never loaded: save it with safe_serialization." if others else ""
        raise BundleError(f"{folder} holds neither {name} nor {index.name}, expected the weights.{more} {remedy}")
    named = read_json(index, remedy=remedy).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise BundleError(f"{index} names no shards, expected a weight_map. {remedy}")
    shards = [safe_join(folder, file) for file in sorted(set(named.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise BundleError(
            f"{len(missing)} of {len(shards)} shards are missing in {folder}, first {missing[0]}. Copy it again, whole."
        )
    return shards
