"""``train`` and ``distill``: a TrigFlow teacher, then a consistency model from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import print_json, progress_bar, say
from .libraries import TRAIN, requires
from .training_options import distill_options, run_options, stable_targets_option

if TYPE_CHECKING:
    from scm_sdk.train.config import DataConfig, TrainConfig
    from scm_sdk.train.data.images import ImageData


PRESET_NAMES = "avatars16, pixels16, pixels32, tiny, cifar10, imagenet64_s to _xl or imagenet512_s to _xxl"


DATA_FIELDS = {"source": "data", "label": "label", "rows": "rows"}
"""Fields of ``DataConfig`` by the options that set them."""


@click.command()
@requires(*TRAIN)
@click.option("--preset", default="avatars16", metavar="NAME", help=f"Network: {PRESET_NAMES}.")
@stable_targets_option
@run_options(data="avatars", iterations=10_000, learning_rate=1e-3, optimizer="adam", p_mean=-0.8, lr_decay=0.3)
@click.option(
    "--double-norm/--no-double-norm",
    default=True,
    help="Double normalization of the modulation; disable for ablations.",
)
@click.option(
    "--time-fourier-scale", type=click.FloatRange(0), default=0.0,
    help="Scale of Fourier features of the time, for ablations; 0: sinusoidal features.",
)  # fmt: skip
def train(preset: str, double_norm: bool, time_fourier_scale: float, **options: Any) -> None:
    """Train a TrigFlow diffusion teacher.

    Run the same command again to continue after an interruption. Watch the residual, which falls; the loss has a
    learned weight and may become negative.

    \b
    scm-export train -o runs/teacher --data avatars --label hairColor --rows 0 10000
    """
    import msgspec

    from scm_sdk.errors import ConfigError
    from scm_sdk.model.networks.presets import PRESETS
    from scm_sdk.train.config import DataConfig, TrainConfig
    from scm_sdk.train.data.images import load_data

    _require_folders(options)
    if options["recipe"]:
        config = _recipe_config(options, student=False)
        _run(
            msgspec.structs.replace(config, network=_changed(config.network, double_norm, time_fourier_scale)), options
        )
        return
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}.")
    data_config = DataConfig(source=options["data"], label=options["label"], rows=options["rows"])
    data = load_data(data_config)
    network = PRESETS[preset](num_classes=data.num_classes, in_channels=data.images.shape[-1])
    network = _changed(network, double_norm, time_fourier_scale)
    settings = {**_settings(options), "objective": "diffusion", "data": data_config, "network": network}
    _run(TrainConfig.from_settings(settings), options, data)


@click.command()
@requires(*TRAIN)
@distill_options
@run_options(data=None, iterations=5_000, learning_rate=3e-4, optimizer="radam", p_mean=-1.0, lr_decay=0.5)
def distill(no_teacher: bool, vsd_only: bool, **options: Any) -> None:
    """Distill a teacher, or train from data, into a consistency model.

    With a teacher this is sCD; --no-teacher is sCT. Data, label column and rows default to those of the teacher. Run
    the same command again to continue after an interruption. Watch the residual, which falls; the loss has a learned
    weight and may become negative.

    \b
    scm-export distill -o runs/avatars --teacher runs/teacher
    scm-export distill -o runs/cifar10 --recipe cifar10-scd --data cifar10.npz --teacher runs/teacher
    """
    from scm_sdk.errors import ConfigError
    from scm_sdk.train.config import TrainConfig

    _require_folders(options)
    options["guidance"] = _guidance(options)
    if options["recipe"]:
        if no_teacher or vsd_only:
            raise ConfigError(
                "a recipe sets the objective, expected neither --no-teacher nor --vsd-only. Leave them out."
            )
        _run(_recipe_config(options, student=True), options)
        return
    if no_teacher == bool(options["teacher"]):
        raise ConfigError("expected exactly one of --teacher FOLDER (sCD) and --no-teacher (sCT).")
    if no_teacher and not options["init_from"]:
        raise ConfigError("--no-teacher needs --init FOLDER: sCT starts from a trained diffusion model's weights.")
    objective = "vsd" if vsd_only else "sct" if no_teacher else "scd"
    if options["discrete_step"] is not None:
        if objective != "scd":
            raise ConfigError("--discrete-step is an objective of its own; leave out --no-teacher and --vsd-only.")
        objective = "cd"
    if options["trajectory_steps"] is not None:
        if objective != "scd":
            raise ConfigError(
                "--trajectory-steps is an objective of its own; leave out --discrete-step and --vsd-only."
            )
        objective = "trajectory"
    settings = {**_settings(options), "objective": objective, "data": _data_of_teacher(options)}
    _run(TrainConfig.from_settings(settings), options)


def _changed(network: Any, double_norm: bool, time_fourier_scale: float) -> Any:
    """Return a network's config with the stabilizers of the options."""
    import msgspec

    from scm_sdk.errors import ConfigError

    changes = {} if double_norm else {"double_norm": False}
    if changes and "double_norm" not in network.__struct_fields__:
        raise ConfigError("this kind of network always uses double normalization. Leave --no-double-norm out.")
    return msgspec.structs.replace(network, **changes, time_fourier_scale=time_fourier_scale)


def _require_folders(options: dict[str, Any]) -> None:
    """Refuse a missing model folder; ``--dry-run`` of a recipe needs none."""
    from scm_sdk.errors import ConfigError

    if options["dry_run"] and options["recipe"]:
        return
    for name, option in (("teacher", "--teacher"), ("init_from", "--init")):
        folder = Path(options.get(name) or ".")
        if not folder.is_dir():
            raise ConfigError(
                f"{option} is {folder}, which {'is a file' if folder.exists() else 'does not exist'}, expected the "
                "folder of a training run, of a saved model or of a pipeline that diffusers saved. Check the path."
            )


def _guidance(options: dict[str, Any]) -> tuple[float, float] | None:
    from scm_sdk.errors import ConfigError

    fixed, drawn = options["guidance"], options["guidance_range"]
    if fixed and drawn:
        raise ConfigError(
            f"--guidance is {fixed} and --guidance-range {drawn}, expected one of them: the scale is fixed, or an "
            "input of the model."
        )
    return (fixed, fixed) if fixed else drawn


def _data_of_teacher(options: dict[str, Any]) -> DataConfig:
    """Return the data of the options, or else the data that the teacher was trained on."""
    import msgspec

    from scm_sdk.errors import BundleError, ConfigError
    from scm_sdk.model.checkpoint import read_config
    from scm_sdk.train.config import DataConfig
    from scm_sdk.train.parallel.distributed import is_main_process
    from scm_sdk.train.record import describe_data, recorded_data

    folder = Path(options["teacher"] or options["init_from"])
    try:
        recorded = recorded_data(folder, read_config(folder / "config.json").provenance)
    except (BundleError, ConfigError):  # not a checkpoint of scm-sdk: loading it reports the problem
        recorded = None
    if options["data"] is None and recorded is None:
        raise ConfigError(
            f"{folder} does not record its training data: it has no readable train.json, and no data in its "
            "config.json. Give the data: --data, --label and --rows."
        )
    given = {field: options[name] for field, name in DATA_FIELDS.items() if options[name] is not None}
    if recorded is None:
        return DataConfig(**given)
    if given.get("source", recorded.source) != recorded.source:
        given = {"rows": (0, 0), **given}  # the teacher's rows refer to the teacher's data
    data = msgspec.structs.replace(recorded, **given)
    if is_main_process():
        other = "" if data == recorded else f"; this run uses {describe_data(data)}"
        say(f"{folder} was trained on {describe_data(recorded)}{other}")
    return data


def _settings(options: dict[str, Any]) -> dict[str, object]:
    """Return the options that are settings of a run, by their names in ``TrainConfig.from_settings``."""
    from scm_sdk.train.config import SETTINGS, TrainConfig

    names = {*SETTINGS, *TrainConfig.__struct_fields__} - {"data"}
    return {name: value for name, value in options.items() if value is not None and name in names}


def _recipe_config(options: dict[str, Any], *, student: bool) -> TrainConfig:
    """Return a recipe's config with the options of the command line applied."""
    import msgspec
    from click.core import ParameterSource

    from scm_sdk.errors import ConfigError
    from scm_sdk.train.recipes import recipe

    base = recipe(options["recipe"])
    if base.kind.generative == student:
        verb = "train" if student else "distill"
        raise ConfigError(
            f"recipe {options['recipe']!r} has objective {base.objective!r}. Use it with: scm-export {verb}"
        )
    context = click.get_current_context()
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if options.get("guidance"):
        given["guidance"] = low, high = options["guidance"]
        assert base.network is not None  # every recipe has one
        base = msgspec.structs.replace(base, network=msgspec.structs.replace(base.network, guidance=low < high))
    data = msgspec.structs.replace(
        base.data, **{field: given[name] for field, name in DATA_FIELDS.items() if name in given}
    )
    return base.with_settings({**_settings(given), "data": data})


def _run(config: TrainConfig, options: dict[str, Any], data: ImageData | None = None) -> None:
    import torch

    from scm_sdk.train.data.samples import write_samples
    from scm_sdk.train.loop import Hooks, StepLog, train
    from scm_sdk.train.parallel.distributed import RemoteError, Scale, is_main_process
    from scm_sdk.train.prepare import resolve
    from scm_sdk.train.record import describe_data

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if options["dry_run"]:
        # A recipe is printed unresolved: its data may be on another machine.
        print_json(json.loads((config if options["recipe"] else resolve(config, data).config).to_json()))
        return
    out: Path = options["out"]
    scale = Scale(**{name: options[name] for name in ("parallel", "accumulate", "recompute", "device", "timeout")})
    main = is_main_process()
    if main:
        say(
            f"{config.objective}: {config.num_iterations} iterations to {out}. Ctrl-C saves; run the command "
            "again to continue."
        )
    lines: list[StepLog] = []
    done = 0

    with progress_bar(config.objective, config.num_iterations, hidden=not main) as update:

        def on_log(line: StepLog) -> None:
            lines.append(line)
            update(line.iteration, f"residual {line.residual:.4f} loss {line.loss:.3f} skipped {line.skipped}")

        def on_step(iteration: int) -> None:
            nonlocal done
            done = iteration
            update(iteration)

        def on_start(config: TrainConfig, data: ImageData) -> None:
            say(f"data: {describe_data(config.data)}: {data.describe()}")
            if config.batch_size > len(data):
                say(
                    f"warning: --batch-size {config.batch_size} is larger than the data: each image is used "
                    f"{config.batch_size / len(data):.3g} times in every iteration."
                )

        hooks = Hooks(
            on_start=on_start,
            on_step=on_step,
            on_log=on_log,
            on_sample=lambda model, at: write_samples(model, config.objective, out / "samples", at),
            sample_every=options["sample_every"],
            checkpoint_every=options["checkpoint_every"],
        )
        try:
            train(config, out, hooks, data, scale)
        except RemoteError as exc:
            sys.exit(exc.exit_code)
        except KeyboardInterrupt:
            if main:
                raise
            sys.exit(130)
        except SystemExit:
            if main:
                say(f"Terminated. Saved after iteration {done}; run the same command again to continue.")
            raise
    if not main:
        return
    if options["as_json"]:
        from dataclasses import asdict

        print_json({"out": str(out), "last": asdict(lines[-1]) if lines else None})
    else:
        say(f"Done: {out} is a checkpoint. Next: scm-export {'distill' if config.kind.generative else 'onnx'}")
