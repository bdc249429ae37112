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
    """Return the provenance entry of training data: the file name of the source, label, rows."""
    rows = "" if config.rows == (0, 0) else f", rows {config.rows[0]}..{config.rows[1] - 1}"
    return f"{Path(config.source).name}, label {config.label or 'none'}{rows}"


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of a recorded run that are read later; its config may have another version and other fields."""

    objective: str
    data: DataConfig
    label_dropout: float = 0.0


def recorded(folder: Path) -> Recorded | None:
    """Return the recorded run of a folder; None if it is missing or unreadable."""
    try:
        return msgspec.json.decode(read_regular(folder / CONFIG_FILE, most=CONFIG_MAX_BYTES), type=Recorded)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def read_run(folder: Path) -> TrainConfig | None:
    """Return the config of the run in a folder; None if there is none.

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
            f"{path} cannot be read: {exc} It says which run is in {folder}. Copy it again, or use another folder."
        ) from exc


def recorded_data(folder: Path, provenance: Mapping[str, object]) -> DataConfig | None:
    """Return the training data of a model from its run or its provenance; None if unknown.

    A provenance names a file without its folder.

    Args:
        folder: Folder of the run, checkpoint or bundle.
        provenance: Provenance of the model.
    """
    if (run := recorded(folder)) is not None:
        return run.data
    found = _TEXT.fullmatch(str(provenance.get("data", "")))
    if found is None:
        return None
    source, label, first, last = found.group("source", "label", "first", "last")
    rows = (0, 0) if last is None else (int(first), int(last) + 1)
    return DataConfig(source=source, label="" if label == "none" else label, rows=rows)
