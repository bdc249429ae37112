"""Before the first iteration: load what a run's config names, complete it, and claim the run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from .._version import __version__
from ..errors import TrainError
from ..files import atomic_write_bytes
from ..model.consistency import ConsistencyModel, ModelConfig
from .config import TrainConfig
from .data import ImageData, load_data

CONFIG_FILE = "train.json"
LOCK_FILE = ".lock"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run starts from.

    Attributes:
        config: The run, with its network filled in.
        model_config: The config of the model that it makes.
        data: The images.
        initial: The model whose weights start the run, or None for random weights.
        teacher: The model that is distilled, or None.
    """

    config: TrainConfig
    model_config: ModelConfig
    data: ImageData
    initial: ConsistencyModel | None
    teacher: ConsistencyModel | None


def resolve(config: TrainConfig, data: ImageData | None = None) -> Prepared:
    """Load the data and the models a config names and complete the config from them.

    Args:
        config: The run.
        data: What ``load_data(config.data)`` returned, where the caller has it already.

    Raises:
        TrainError: If data, network and models do not belong together.
    """
    data = load_data(config.data) if data is None else data
    initial = ConsistencyModel.from_pretrained(config.first_weights) if config.first_weights else None
    teacher = ConsistencyModel.from_pretrained(config.teacher) if config.teacher else None
    network = config.network or (initial.config.network if initial else None)
    assert network is not None  # TrainConfig refuses a run without either
    network = msgspec.structs.replace(network, dropout=config.dropout)
    height, width, channels = data.images.shape[1:]
    if (channels, height, width) != network.sample_shape:
        raise TrainError(
            f"the images are (C, H, W) = {(channels, height, width)}, the network takes {network.sample_shape}. "
            "Choose a network of the data's size."
        )
    if network.num_classes != data.num_classes:
        raise TrainError(
            f"the data has {data.num_classes} classes, the network {network.num_classes}. "
            "Choose the label column the network was made for."
        )
    rows = "" if config.data.rows == (0, 0) else f", rows {config.data.rows[0]}..{config.data.rows[1] - 1}"
    model_config = ModelConfig(
        network=network,
        sigma_data=config.sigma_data,
        class_names=data.class_names,
        mid_time=config.mid_time,
        provenance={
            "data": f"{Path(config.data.source).name}, label {config.data.label or 'none'}{rows}",
            "license": data.license or "other",
            "objective": config.objective + ("+vsd" if config.vsd_weight else ""),
            "software": f"scm-sdk {__version__}",
        },
    )
    for model, folder in ((initial, config.first_weights), (teacher, config.teacher)):
        if model is not None:
            found = msgspec.structs.replace(model.config.network, dropout=network.dropout)
            if found != network or model.sigma_data != config.sigma_data:
                raise TrainError(f"the network of {folder} differs from the run's; give models of one shape.")
    config = msgspec.structs.replace(config, network=network)
    return Prepared(config=config, model_config=model_config, data=data, initial=initial, teacher=teacher)


@contextmanager
def claimed_folder(config: TrainConfig, out: Path) -> Iterator[None]:
    """Hold a run's folder: no other process may train in it, and it holds this run's config.

    Raises:
        TrainError: If another process holds it, it holds a run with another config, or it cannot be
            written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout as exc:
        raise TrainError(
            f"another process is training in {out}, expected one at a time. Wait for it or use another folder."
        ) from exc
    except OSError as exc:
        raise TrainError(f"{out} cannot be written: {exc.strerror}. Choose a folder that you may write to.") from exc
    try:
        _claim(config, out)
        yield
    finally:
        lock.release()


def _claim(config: TrainConfig, out: Path) -> None:
    path = out / CONFIG_FILE
    if not path.exists():
        atomic_write_bytes(path, config.to_json().encode() + b"\n", error=TrainError)
        return
    there = msgspec.to_builtins(TrainConfig.from_json(path.read_bytes()))
    here = msgspec.to_builtins(config)
    here["compile"] = there["compile"]  # how it runs, not what it is
    if differ := [f"{key}: {there[key]} there, {here[key]} here" for key in here if here[key] != there[key]]:
        raise TrainError(
            f"{out} holds a run with other settings ({'; '.join(differ)}). "
            "Use the same settings to go on with it, or another folder for a new run."
        )
