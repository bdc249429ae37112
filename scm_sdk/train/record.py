"""The record of training data in a run's folder and in a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .._util.files import read_regular
from ..bundle.layout import CONFIG_MAX_BYTES
from ..errors import ConfigError, TrainError
from .config import DataConfig, TrainConfig

CONFIG_FILE = "train.json"
_TEXT = re.compile(r"(?P<source>.+), label (?P<label>.+?)(?:, rows (?P<first>\d+)\.\.(?P<last>\d+))?")


def describe_data(config: DataConfig) -> str:
    """Return what a model's provenance says of its data: the last part of the source's path, label, rows."""
    rows = "" if config.rows == (0, 0) else f", rows {config.rows[0]}..{config.rows[1] - 1}"
    return f"{Path(config.source).name}, label {config.label or 'none'}{rows}"


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a run afterwards; its config may be of another version and have other fields."""

    objective: str
    data: DataConfig
    label_dropout: float = 0.0


def recorded(folder: Path) -> Recorded | None:
    """Return what the run in a folder was; None where there is none, or none that can be read."""
    try:
        return msgspec.json.decode(read_regular(folder / CONFIG_FILE, most=CONFIG_MAX_BYTES), type=Recorded)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def read_run(folder: Path) -> TrainConfig | None:
    """Return the config of the run in a folder; None where there is none.

    Raises:
        TrainError: If it cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return TrainConfig.from_json(read_regular(path, most=CONFIG_MAX_BYTES))
    except (OSError, ConfigError) as exc:
        raise TrainError(
            f"{path} cannot be read: {exc} It says which run lies in {folder}. Copy it again, or use another folder."
        ) from exc


def recorded_data(folder: Path, provenance: Mapping[str, object]) -> DataConfig | None:
    """Return which data a model was trained on, by its run's config or by its provenance; None where neither says.

    A provenance names a file without its folder.

    Args:
        folder: Of the run, checkpoint or bundle.
        provenance: The model's.
    """
    if (run := recorded(folder)) is not None:
        return run.data
    found = _TEXT.fullmatch(str(provenance.get("data", "")))
    if found is None:
        return None
    source, label, first, last = found.group("source", "label", "first", "last")
    rows = (0, 0) if last is None else (int(first), int(last) + 1)
    return DataConfig(source=source, label="" if label == "none" else label, rows=rows)
