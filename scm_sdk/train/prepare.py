"""Prepare a run: load its data and models, complete its config, and lock its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from .._util.files import atomic_write_bytes, remove_leftovers
from .._version import __version__
from ..errors import ConfigError, TrainError
from ..model.consistency import ConsistencyModel, ModelConfig, NetworkConfig
from ..model.foreign.diffusers_folder import is_diffusers_folder, load_diffusers
from ..model.networks.custom import OwnConfig
from ..model.networks.presets import PRESETS
from .config import TrainConfig
from .data.images import ImageData, load_data, shortened
from .objectives.guidance import LABEL_DROPOUT, require_guidable
from .record import CONFIG_FILE, describe_data, read_run

LOCK_FILE = ".lock"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Inputs of a run.

    Attributes:
        config: The run, with its network filled in.
        model_config: The config of the trained model.
        data: The images.
        initial: The model whose weights start the run, or None for random weights.
        teacher: The distilled model, or None.
    """

    config: TrainConfig
    model_config: ModelConfig
    data: ImageData
    initial: ConsistencyModel | None
    teacher: ConsistencyModel | None


def resolve(config: TrainConfig, data: ImageData | None = None) -> Prepared:
    """Load the data and the models of a config and complete the config from them.

    Args:
        config: The run.
        data: Result of ``load_data(config.data)``, if the caller has loaded it.

    Raises:
        ConfigError: If data, network and models do not match.
        TrainError: If the data cannot be read.
    """
    data = load_data(config.data) if data is None else data
    initial = _load(config.first_weights, config) if config.first_weights else None
    teacher = _load(config.teacher, config) if config.teacher else None
    network = config.network or (initial.config.network if initial else None)
    assert network is not None  # TrainConfig refuses a run without either
    network = msgspec.structs.replace(network, dropout=config.dropout)
    if config.guided:
        assert teacher is not None  # TrainConfig refuses guidance without one
        require_guidable(teacher, config.teacher)
    network = _with_guidance_input(network, config)
    height, width, channels = data.images.shape[1:]
    theirs = f"Give the data and the label column that {config.first_weights} was trained on (--data, --label)."
    if (channels, height, width) != network.sample_shape:
        raise ConfigError(
            f"the images are (C, H, W) = {(channels, height, width)}, the network takes {network.sample_shape}. "
            + (theirs if config.network is None else f"Choose a network of the data's size: {_presets_for(data)}.")
        )
    if network.num_classes != data.num_classes:
        raise ConfigError(
            f"the data has {data.num_classes} classes, the network {network.num_classes}. "
            + (theirs if config.network is None else "Choose the label column the network was made for (--label).")
        )
    for model, folder in ((initial, config.first_weights), (teacher, config.teacher)):
        if model is not None and not config.kind.generative:
            _check_classes(model, folder, data)
    model_config = ModelConfig(
        network=network,
        sigma_data=config.sigma_data,
        class_names=data.class_names,
        mid_time=config.mid_time,
        provenance={
            "data": describe_data(config.data),
            "license": data.license or "other",
            "objective": config.objective + ("+vsd" if config.vsd.weight else ""),
            "software": f"scm-sdk {__version__}",
            **({"discrete_points": str(config.tangent.discrete_points)} if config.tangent.discrete_points else {}),
            **_about_guidance(config),
        },
    )
    if config.takes_guidance:
        low, high = config.guidance
        model_config = msgspec.structs.replace(model_config, guidance_range=(low, high), default_guidance=low)
    for model, folder in ((initial, config.first_weights), (teacher, config.teacher)):
        if model is not None:
            _check_alike(model, folder, model_config, weights=model is initial)
    _check_labels(config, network)
    config = msgspec.structs.replace(config, network=network)
    return Prepared(config=config, model_config=model_config, data=data, initial=initial, teacher=teacher)


def _presets_for(data: ImageData) -> str:
    """Return the names of the presets for images of this shape."""
    height, width, channels = data.images.shape[1:]
    names = []
    for name, make in PRESETS.items():
        with suppress(ConfigError):
            if make(num_classes=data.num_classes, in_channels=channels).sample_shape == (channels, height, width):
                names.append(name)
    if names:
        return f"--preset {' or '.join(names)}"
    return "no --preset has it, so give a UNetConfig in Python, or resize the data to 16x16 or 32x32"


def _check_classes(model: ConsistencyModel, folder: str, data: ImageData) -> None:
    """Refuse to distill a model with other classes, because equal label numbers would mean different classes."""
    theirs = model.config.class_names
    if theirs and data.class_names and theirs != data.class_names:
        raise ConfigError(
            f"the classes of {folder} are {shortened(theirs)}, those of the data {shortened(data.class_names)}: "
            "expected the same in the same order. Give the data and the label column that it was trained on "
            "(--data, --label)."
        )


def _load(folder: str, config: TrainConfig) -> ConsistencyModel:
    """Load a checkpoint, or a diffusers denoiser as a TrigFlow model with the run's ``sigma_data``."""
    if is_diffusers_folder(Path(folder)):
        return load_diffusers(folder, sigma_data=config.sigma_data)
    return ConsistencyModel.from_pretrained(folder)


def _check_alike(model: ConsistencyModel, folder: str, wanted: ModelConfig, *, weights: bool) -> None:
    """Refuse initial weights of another network; a teacher may be another network for the same samples."""
    more = model.config.guidance and not wanted.guidance
    if weights and (more or _shape(model.config.network) != _shape(wanted.network)):
        raise ConfigError(f"the network of {folder} differs from the run's; give models of one shape.")
    names = ("sample_shape", "num_classes", "sigma_data")
    mine, its = ({name: getattr(config, name) for name in names} for config in (wanted, model.config))
    if mine != its:
        raise ConfigError(f"the model of {folder} has {its}, expected {mine} as the run has. Give models of one kind.")


def _shape(network: NetworkConfig) -> dict[str, object]:
    """Return the fields that decide whether weights match: all except dropout and the optional guidance input."""
    fields: dict[str, object] = msgspec.to_builtins(network)
    return {name: value for name, value in fields.items() if name not in ("dropout", "dropout_resolution", "guidance")}


def _with_guidance_input(network: NetworkConfig, config: TrainConfig) -> NetworkConfig:
    """Add a guidance input to a student that takes the guidance scale.

    Raises:
        ConfigError: If the network has a guidance input that the run does not use, or cannot have one.
    """
    has = getattr(network, "guidance", False)
    if has and not config.takes_guidance:
        raise ConfigError(
            f"the network takes a guidance scale, but guidance is {config.guidance}: it would learn nothing of it. "
            "Give a range to draw from, for example 1 2."
        )
    if has or not config.takes_guidance:
        return network
    if "guidance" not in network.__struct_fields__ or isinstance(network, OwnConfig):
        raise ConfigError(
            f"guidance is {config.guidance}, but this kind of network has no input for the scale. Give one scale "
            "alone, which is baked in."
        )
    return msgspec.structs.replace(network, guidance=True)


def _about_guidance(config: TrainConfig) -> dict[str, str]:
    """Return the provenance entries about guidance: whether the model can be guided, or was."""
    if config.kind.generative:
        return {LABEL_DROPOUT: f"{config.label_dropout:g}"} if config.label_dropout else {}
    return {"guidance": " to ".join(f"{scale:g}" for scale in sorted(set(config.guidance)))} if config.guided else {}


def _check_labels(config: TrainConfig, network: NetworkConfig) -> None:
    """Refuse inputs that the data does not provide: it has class labels, and "no label" only for some networks."""
    if asked := [tensor.name for tensor in getattr(network, "conditioning", ())]:
        raise ConfigError(
            f"the network takes {', '.join(asked)}, but the data has class labels alone. Bind those inputs in Python "
            "and call train.objectives."
        )
    if config.label_dropout and not getattr(network, "has_null_label", True):
        raise ConfigError(
            f"label_dropout is {config.label_dropout}, expected 0: the network has no label for none. Leave it out."
        )


@contextmanager
def claimed_folder(config: TrainConfig, out: Path) -> Iterator[None]:
    """Lock a run's folder, check its config, and delete partial files of killed processes.

    Raises:
        TrainError: If another process holds the lock, the folder holds a run with another config, or it cannot be
            written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / LOCK_FILE).is_symlink():
            raise TrainError(f"{out / LOCK_FILE} is a link, expected a plain file or none. Delete it.")
        lock = FileLock(out / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout as exc:
        raise TrainError(
            f"another process is training in {out}, expected one at a time. Wait for it or use another folder."
        ) from exc
    except OSError as exc:
        raise TrainError(f"{out} cannot be written: {exc.strerror}. Choose a folder that you may write to.") from exc
    try:
        remove_leftovers(out, below=True)
        _claim(config, out)
        yield
    finally:
        lock.release()


def _claim(config: TrainConfig, out: Path) -> None:
    path = out / CONFIG_FILE
    if not path.exists():
        atomic_write_bytes(path, config.to_json().encode() + b"\n", error=TrainError)
        return
    there = dict(_flat(msgspec.to_builtins(read_run(out))))
    here = dict(_flat(msgspec.to_builtins(config)))
    here["compile"] = there["compile"]  # settings that do not change the result
    keys = [*here, *(key for key in there if key not in here)]
    if differ := [
        f"{key}: {there.get(key)} there, {here.get(key)} here" for key in keys if here.get(key) != there.get(key)
    ]:
        raise TrainError(
            f"{out} holds a run with other settings ({'; '.join(differ)}). "
            "Use the same settings to continue it, or another folder for a new run."
        )


def _flat(plain: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Return the values of a nested config by their dotted names."""
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
