"""The files of one component of a diffusers folder: JSON of bounded size, weights in one file or in shards.

No weight is read here, and neither torch nor diffusers is imported. The files are untrusted: sizes are limited, names
must stay in the folder, weights must be safetensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..._util.files import read_regular, safe_join
from ...bundle.layout import CONFIG_MAX_BYTES, WEIGHTS_NAME
from ...errors import BundleError, ConfigError

REMEDY = "Give the folder that save_pretrained wrote, whole."


def read_json(path: Path, *, remedy: str = REMEDY) -> dict[str, Any]:
    """Return a JSON object. ``Infinity`` and ``NaN``, which diffusers writes, are numbers.

    Args:
        path: The file.
        remedy: Advice of the error message.

    Raises:
        BundleError: If it is not a regular file, cannot be read or is too large.
        ConfigError: If it is not a JSON object.
    """
    try:
        read = json.loads(read_regular(path, most=CONFIG_MAX_BYTES))
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror}. {remedy}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is no JSON object: {exc}. {remedy}") from exc
    if not isinstance(read, dict):
        raise ConfigError(f"{path} is no JSON object, found a {type(read).__name__}. {remedy}")
    return read


def weight_files(folder: Path, name: str = WEIGHTS_NAME, *, remedy: str = REMEDY) -> list[Path]:
    """Return the safetensors files of a component: one file, or all shards of its index.

    If the files have the name of a variant, as written by ``variant="fp16"``, it must be the only variant.

    Raises:
        BundleError: If there are no files, one is missing, or there are several variants and no default file.
    """
    stem = name.removesuffix(".safetensors")
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return [folder / name]
    if not index.is_file():
        shard = re.compile(rf"{re.escape(stem)}\.[^.]+-\d+-of-\d+\.safetensors")
        whole = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if not shard.fullmatch(path.name)]
        variants = [*whole, *sorted(folder.glob(f"{name}.index.*.json"))]
        if len(variants) > 1:
            found = ", ".join(path.name for path in variants)
            raise BundleError(f"{folder} holds several variants, {found}, expected {name} or one of them. {remedy}")
        if whole:
            return whole
        if not variants:
            others = sorted(path.name for path in folder.glob("*.bin"))
            more = (
                f" {others[0]} is a pickle, which is never loaded: save it with safe_serialization." if others else ""
            )
            raise BundleError(f"{folder} holds neither {name} nor {index.name}, expected the weights.{more} {remedy}")
        index = variants[0]
    named = read_json(index, remedy=remedy).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise BundleError(f"{index} names no shards, expected a weight_map. {remedy}")
    shards = [safe_join(folder, file) for file in sorted(set(named.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise BundleError(
            f"{len(missing)} of {len(shards)} shards are missing in {folder}, first {missing[0]}. Copy it again, whole."
        )
    return shards
