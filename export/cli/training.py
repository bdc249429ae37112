"""``train`` and ``distill``: a TrigFlow teacher, then a consistency model from it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .common import json_option, print_json, progress_bar, say

if TYPE_CHECKING:
    from scm_sdk.train.config import TrainConfig
    from scm_sdk.train.data import ImageData

Command = TypeVar("Command", bound=Callable[..., Any])
stable_targets_option = click.option(
    "--stable-targets", is_flag=True, help="Regress onto exact posterior means; for data that fits in memory."
)


def _run_options(
    *, iterations: int, learning_rate: float, optimizer: str, p_mean: float, lr_decay: float
) -> Callable[[Command], Command]:
    """Return the options that both verbs have, with the verb's own defaults."""
    options = [
        click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run."),
        click.option(
            "--data", default="avatars", metavar="SOURCE", help="avatars, fashion-mnist, an image folder or an .npz."
        ),
        click.option("--label", default="", metavar="COLUMN", help="Label column; for a folder: 'folder'."),
        click.option(
            "--rows", nargs=2, type=click.IntRange(0), default=(0, 0), metavar="FIRST LAST",
            help="Train on these rows only; 0 0 is all.",
        ),
        click.option("--iterations", type=click.IntRange(1), default=iterations, help="Length of the run."),
        click.option("--batch-size", type=click.IntRange(1), default=64, help="Samples of one iteration."),
        click.option("--lr", type=click.FloatRange(0, min_open=True), default=learning_rate, help="Learning rate."),
        click.option(
            "--lr-decay", type=click.FloatRange(0, 1), default=lr_decay, help="Last share in which the rate falls."
        ),
        click.option("--optimizer", type=click.Choice(["adam", "radam"]), default=optimizer),
        click.option("--p-mean", type=float, default=p_mean, help="Mean of ln(sigma)."),
        click.option("--p-std", type=click.FloatRange(0, min_open=True), default=1.4, help="Deviation of ln(sigma)."),
        click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0),
        click.option("--init", default="", metavar="FOLDER", help="Checkpoint folder of the first weights."),
        click.option("--label-dropout", type=click.FloatRange(0, 1), default=0.0, help="Share trained without label."),
        click.option("--sigma-data", type=click.FloatRange(0, min_open=True), default=0.5),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Names the run."),
        click.option("--compile", is_flag=True, help="torch.compile the loss; the first iteration takes minutes."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads; all when absent."),
        click.option(
            "--parallel", type=click.Choice(["ddp", "fsdp"]), default="ddp",
            help="Under torchrun: everything in each process, or a share (FSDP2).",
        ),
        click.option(
            "--accumulate", type=click.IntRange(1), default=1, metavar="N", help="Compute a batch in N parts."
        ),
        click.option("--recompute", is_flag=True, help="Compute activations again in the backward pass: less memory."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: see docs."),
        click.option(
            "--timeout", type=click.FloatRange(0, min_open=True), default=600.0,
            help="Seconds that a process waits for the others.",
        ),
        click.option("--sample-every", type=click.IntRange(0), default=1000, help="Iterations between grids; 0: none."),
        click.option("--checkpoint-every", type=click.IntRange(1), default=250, help="Iterations between checkpoints."),
        click.option("-n", "--dry-run", is_flag=True, help="Print the resolved config and stop."),
        json_option,
    ]  # fmt: skip

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.option("--preset", default="avatars16", metavar="NAME", help="Network: avatars16, pixels16, pixels32 or tiny.")
@stable_targets_option
@_run_options(iterations=10_000, learning_rate=1e-3, optimizer="adam", p_mean=-0.8, lr_decay=0.3)
def train(preset: str, **options: Any) -> None:
    """Train a TrigFlow diffusion teacher.

    Run the same command again to go on after an interruption.

    \b
    scm-export train -o runs/teacher --data avatars --label hairColor --rows 0 10000
    """
    from scm_sdk.errors import ConfigError
    from scm_sdk.model.presets import PRESETS
    from scm_sdk.train.data import load_data

    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}.")
    data_config = _data_config(options)
    data = load_data(data_config)
    network = PRESETS[preset](num_classes=data.num_classes, in_channels=data.images.shape[-1])
    config = _config("diffusion", data_config, options, network=network, stable_targets=options["stable_targets"])
    _run(config, options, data)


@click.command()
@click.option("--teacher", default="", metavar="FOLDER", help="Run or checkpoint folder of the teacher.")
@click.option("--no-teacher", is_flag=True, help="Train from data alone (sCT); --init gives the first weights.")
@stable_targets_option
@click.option(
    "--vsd",
    "vsd_weight",
    type=click.FloatRange(0),
    default=0.0,
    help="Weight of variational score distillation beside the consistency loss; the paper's is 1.",
)
@click.option("--vsd-only", is_flag=True, help="Variational score distillation alone.")
@click.option("--vsd-steps", type=click.IntRange(1, 64), default=1, help="Sampler steps that VSD looks at.")
@click.option(
    "--vsd-lr",
    "vsd_learning_rate",
    type=click.FloatRange(0),
    default=0.0,
    help="Learning rate of its fake score; the student's when 0.",
)
@click.option("--vsd-p-mean", type=float, default=0.4, help="Mean of ln(sigma) where VSD compares.")
@click.option("--vsd-p-std", type=click.FloatRange(0, min_open=True), default=2.0, help="Its deviation.")
@click.option("--vsd-warmup", type=click.IntRange(0), default=0, help="Iterations in which only its fake score learns.")
@click.option(
    "--discrete-step",
    type=click.FloatRange(0, math.pi / 2, min_open=True),
    help="Distil in discrete time, by steps of the teacher up to this long, radians: a fast start.",
)
@click.option(
    "--anchor", "anchor_weight", type=click.FloatRange(0), default=0.0, help="Weight of a denoising loss beside it."
)
@click.option("--anchor-p-mean", type=float, default=-1.5, help="Mean of ln(sigma) of that loss: small times.")
@click.option("--anchor-p-std", type=click.FloatRange(0, min_open=True), default=1.0, help="Its deviation.")
@click.option(
    "--trajectory-steps",
    type=click.IntRange(1, 256),
    help="Distil onto the ends of the teacher's trajectories, each solved in this many second-order steps.",
)
@click.option(
    "--huber", type=click.FloatRange(0), default=0.0, help="Error above which that loss grows linearly; 0: the square."
)
@click.option("--mid-time", type=float, default=1.1, help="Second time of the model's two-step sampler, radians.")
@click.option("--tangent-norm", type=click.Choice(["l2", "rms"]), default="l2", help="l2 is the paper's.")
@click.option("--tangent-warmup", type=click.IntRange(0), default=10_000, help="Iterations of tangent warm-up, H.")
@click.option("--tangent-c", type=click.FloatRange(0, min_open=True), default=0.1, help="Constant c of its norm.")
@_run_options(iterations=5_000, learning_rate=3e-4, optimizer="radam", p_mean=-1.0, lr_decay=0.5)
def distill(teacher: str, no_teacher: bool, vsd_only: bool, **options: Any) -> None:
    """Make a consistency model: distil a teacher (sCD) or train from data (sCT), with or without VSD.

    Run the same command again to go on after an interruption.

    \b
    scm-export distill -o runs/avatars --teacher runs/teacher --label hairColor --rows 0 10000
    """
    from scm_sdk.errors import ConfigError

    if no_teacher == bool(teacher):
        raise ConfigError("give either --teacher FOLDER (sCD) or --no-teacher (sCT), not both and not neither.")
    if no_teacher and not options["init"]:
        raise ConfigError("--no-teacher needs --init FOLDER: sCT starts from a trained diffusion model's weights.")
    names = ("tangent_norm", "tangent_warmup", "tangent_c", "stable_targets", "mid_time")
    extra = {name: value for name, value in options.items() if name in names or name.startswith(("vsd_", "anchor_"))}
    objective = "vsd" if vsd_only else "sct" if no_teacher else "scd"
    if (step := options["discrete_step"]) is not None:
        if objective != "scd" or options["vsd_weight"]:
            raise ConfigError("--discrete-step distils a teacher by itself; leave out --no-teacher and VSD.")
        objective, extra = "cd", {**extra, "discrete_step": step}
    if (steps := options["trajectory_steps"]) is not None:
        if objective != "scd" or options["vsd_weight"]:
            raise ConfigError("--trajectory-steps distils a teacher by itself; leave out --discrete-step and VSD.")
        objective, extra = "trajectory", {**extra, "trajectory_steps": steps, "huber": options["huber"]}
    _run(_config(objective, _data_config(options), options, teacher=teacher, **extra), options)


def _data_config(options: dict[str, Any]) -> Any:
    from scm_sdk.train.config import DataConfig

    return DataConfig(source=options["data"], label=options["label"], rows=tuple(options["rows"]))


def _config(objective: str, data: Any, options: dict[str, Any], **more: Any) -> TrainConfig:
    from scm_sdk.train.config import TrainConfig

    same = (
        "batch_size",
        "optimizer",
        "p_mean",
        "p_std",
        "dropout",
        "label_dropout",
        "sigma_data",
        "seed",
        "compile",
    )
    return TrainConfig(
        objective=objective,  # type: ignore[arg-type]
        data=data,
        init_from=options["init"],
        num_iterations=options["iterations"],
        learning_rate=options["lr"],
        decay_fraction=options["lr_decay"],
        **{name: options[name] for name in same},
        **more,
    )


def _run(config: TrainConfig, options: dict[str, Any], data: ImageData | None = None) -> None:
    import torch

    from scm_sdk.train.distributed import Scale, ToldByProcessZero, is_main_process
    from scm_sdk.train.loop import Hooks, StepLog, train
    from scm_sdk.train.prepare import resolve
    from scm_sdk.train.samples import write_samples

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if options["dry_run"]:
        click.echo(resolve(config, data).config.to_json())
        return
    out: Path = options["out"]
    scale = Scale(**{name: options[name] for name in ("parallel", "accumulate", "recompute", "device", "timeout")})
    main = is_main_process()
    if main:
        say(f"{config.objective}: {config.num_iterations} iterations to {out}. Interrupt at will; run again to go on.")
    lines: list[StepLog] = []

    with progress_bar(config.objective, config.num_iterations, hidden=not main) as update:

        def on_log(line: StepLog) -> None:
            lines.append(line)
            update(line.iteration, f"loss {line.loss:.3f} residual {line.residual:.4f} skipped {line.skipped}")

        hooks = Hooks(
            on_step=update,
            on_log=on_log,
            on_sample=lambda model, at: write_samples(model, config.objective, out / "samples", at),
            sample_every=options["sample_every"],
            checkpoint_every=options["checkpoint_every"],
        )
        try:
            train(config, out, hooks, data, scale)
        except ToldByProcessZero as exc:
            sys.exit(exc.exit_code)
        except KeyboardInterrupt:
            if main:
                raise
            sys.exit(130)
    if not main:
        return
    if options["as_json"]:
        from dataclasses import asdict

        print_json({"out": str(out), "last": asdict(lines[-1]) if lines else None})
    else:
        say(f"Done: {out} is a checkpoint. Next: scm-export {'distill' if config.objective == 'diffusion' else 'onnx'}")
