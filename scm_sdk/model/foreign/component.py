"""The files of a diffusers folder: JSON of bounded size, weights in one file or in shards, and a copy of a pipeline.

No weight is read here, and neither torch nor diffusers is imported. The files are untrusted: sizes are limited, names
must stay in the folder, weights must be safetensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..._util.files import atomic_write_bytes, read_regular, safe_join
from ..._util.json_struct import to_json
from ...bundle.layout import CONFIG_MAX_BYTES, INDEX_NAME, WEIGHTS_NAME
from ...errors import BundleError, ConfigError

REMEDY = "Give the folder that save_pretrained wrote, whole."
SETTINGS_NAME = "scm_import.json"
"""Settings of an import that the pipeline takes per call, next to the pipeline's index."""
MAX_SIDE, MAX_TOKENS = 1 << 14, 1 << 16
"""Largest height and width, pixels, and length of a prompt that an import takes."""
CONFIG_SUFFIXES = (".json", ".model", ".txt")
"""Ends of the names of configs and tokenizers."""


def check_limits(*, height: int, width: int, tokens: int) -> None:
    """Refuse settings of an import that would exceed any memory.

    Raises:
        ConfigError: If one is above its limit.
    """
    if max(height, width) > MAX_SIDE:
        raise ConfigError(f"images are {height}x{width} pixels, expected at most {MAX_SIDE} along a side.")
    if tokens > MAX_TOKENS:
        raise ConfigError(f"max_sequence_length is {tokens}, expected at most {MAX_TOKENS} tokens.")


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


def copy_pipeline(
    source: Path, target: Path, *, text_encoder: bool, settings: bytes, suffixes: Sequence[str] = CONFIG_SUFFIXES
) -> None:
    """Copy the files of a pipeline, without unrelated files, and write the settings of its import.

    Args:
        source: A verified folder.
        target: Target folder; created if missing.
        text_encoder: Whether to copy the text encoder; the index of a copy without it names none.
        settings: Content of ``SETTINGS_NAME``.
        suffixes: Ends of the names of the files to copy in addition to weights.

    Raises:
        BundleError: If the files cannot be written.
    """
    index = read_json(source / INDEX_NAME)
    wanted = [*weight_files(source / "transformer"), *weight_files(source / "vae")]
    folders = ["transformer", "vae", "scheduler"]
    if text_encoder:
        wanted += weight_files(source / "text_encoder", "model.safetensors")
        folders += ["text_encoder", "tokenizer"]
    else:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    for name in folders:
        wanted += [file for file in sorted((source / name).iterdir()) if file.suffix in suffixes]
    try:
        for file in wanted:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)  # not hard links: the copy must not change with the original
    except OSError as exc:
        raise BundleError(
            f"{target} cannot be written: {exc.strerror or exc}. Free some space or choose another."
        ) from exc
    atomic_write_bytes(target / INDEX_NAME, to_json(index), error=BundleError)
    atomic_write_bytes(target / SETTINGS_NAME, settings, error=BundleError)
