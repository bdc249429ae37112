"""The options of ``train`` and ``distill``; each is named after the field of ``TrainConfig`` that it sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from .common import json_option
from .names import OutputPath, one_of

Command = TypeVar("Command", bound=Callable[..., Any])
stable_targets_option = click.option(
    "--stable-targets", is_flag=True, help="Regress onto exact posterior means; needs the data set in memory."
)


def run_options(
    *, data: str | None, iterations: int, learning_rate: float, optimizer: str, p_mean: float, lr_decay: float
) -> Callable[[Command], Command]:
    """Return the options of both verbs, with the defaults of the verb; without ``data``, those of the teacher."""
    teachers = "" if data else " Default: that of the teacher."
    options = [
        click.option("-o", "--out", required=True, type=OutputPath(), help="Folder of the training run."),
        click.option(
            "--data",
            default=data,
            metavar="SOURCE",
            help=f"Training data: avatars, fashion-mnist, a folder of images or shards, .npz or .npy.{teachers}",
        ),
        click.option(
            "--label",
            default=data and "",
            metavar="COLUMN",
            help=f"Label column of the data; '' for none; 'folder' uses the sub-folders as classes.{teachers}",
        ),
        click.option(
            "--rows",
            nargs=2,
            type=click.IntRange(0),
            default=data and (0, 0),
            metavar="FIRST LAST",
            help=f"Rows of the data to train on, FIRST to LAST - 1; 0 0 for all.{teachers}",
        ),
        click.option(
            "--iterations", "num_iterations", type=click.IntRange(1), default=iterations, help="Number of iterations."
        ),
        click.option("--batch-size", type=click.IntRange(1), default=64, help="Samples per iteration."),
        click.option(
            "--lr",
            "learning_rate",
            type=click.FloatRange(0, min_open=True),
            default=learning_rate,
            help="Learning rate.",
        ),
        click.option(
            "--lr-decay",
            "decay_fraction",
            type=click.FloatRange(0, 1),
            default=lr_decay,
            help="Share of the run, at its end, in which the learning rate falls.",
        ),
        click.option("--optimizer", type=one_of("optimizer", "adam", "radam"), default=optimizer, help="Optimizer."),
        click.option("--p-mean", type=float, default=p_mean, help="Mean of ln(sigma) of the training times."),
        click.option(
            "--p-std",
            type=click.FloatRange(0, min_open=True),
            default=1.4,
            help="Standard deviation of ln(sigma) of the training times.",
        ),
        click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Dropout probability."),
        click.option(
            "--init", "init_from", default="", metavar="FOLDER", help="Checkpoint folder of the initial weights."
        ),
        click.option(
            "--label-dropout", type=click.FloatRange(0, 1), default=0.0, help="Share of samples trained without label."
        ),
        click.option(
            "--sigma-data",
            type=click.FloatRange(0, min_open=True),
            default=0.5,
            help="Standard deviation of the data, data units.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Random seed of the run."),
        click.option(
            "--compile", is_flag=True, help="Compile the loss with torch.compile; the first iteration takes minutes."
        ),
        click.option("--threads", type=click.IntRange(1), help="Number of CPU threads; default: all cores."),
        click.option(
            "--parallel",
            type=one_of("method", "ddp", "fsdp"),
            default="ddp",
            help="Under torchrun: replicate the weights in each process (ddp) or shard them (FSDP2).",
        ),
        click.option(
            "--accumulate",
            type=click.IntRange(1),
            default=1,
            metavar="N",
            help="Number of parts in which a batch is computed.",
        ),
        click.option("--recompute", is_flag=True, help="Recompute activations in the backward pass to save memory."),
        click.option(
            "--device",
            type=one_of("device", "auto", "cpu", "cuda"),
            default="auto",
            help="Device; auto: the GPU of the process under torchrun, else the CPU.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(0, min_open=True),
            default=600.0,
            help="Seconds after which a process stops waiting for the others.",
        ),
        *SCHEDULE_OPTIONS,
        click.option(
            "--sample-every",
            type=click.IntRange(0),
            default=1000,
            help="Iterations between grids of sample images; 0 for none.",
        ),
        click.option("--checkpoint-every", type=click.IntRange(1), default=250, help="Iterations between checkpoints."),
        click.option("-n", "--dry-run", is_flag=True, help="Print the resolved config and stop."),
        json_option,
    ]

    return lambda command: _add(options, command)


def distill_options(command: Command) -> Command:
    """Add the options that only ``distill`` has."""
    return _add(DISTILL_OPTIONS, command)


def _add(options: Iterable[Callable[..., Any]], command: Command) -> Command:
    for option in reversed(list(options)):
        command = option(command)
    return command


SCHEDULE_OPTIONS = [
    click.option(
        "--recipe",
        metavar="NAME",
        help="Settings of a run of the paper, for example cifar10-scd; options override them.",
    ),
    click.option(
        "--lr-schedule",
        "schedule",
        type=one_of("schedule", "linear", "inverse_sqrt"),
        default="linear",
        help="Learning rate schedule; inverse_sqrt is that of EDM2.",
    ),
    click.option(
        "--lr-warmup",
        "warmup_iterations",
        type=click.IntRange(0),
        default=200,
        help="Iterations of linear learning rate warm-up.",
    ),
    click.option(
        "--lr-reference",
        "decay_reference",
        type=click.IntRange(1),
        default=35_000,
        help="Iterations after which inverse_sqrt decays.",
    ),
    click.option(
        "--betas", nargs=2, type=click.FloatRange(0, 1, max_open=True), default=(0.9, 0.99), help="Optimizer betas."
    ),
    click.option("--epsilon", type=click.FloatRange(0, min_open=True), default=1e-8, help="Optimizer epsilon."),
    click.option("--grad-clip", type=click.FloatRange(0), default=10.0, help="Maximum gradient norm; 0 for no limit."),
    click.option(
        "--ema-sigma-rel",
        type=click.FloatRange(0),
        default=0.0,
        help="Relative width of the power-function weight average of the model; 0: an average with a half-life.",
    ),
    click.option(
        "--ema-profile",
        "ema_profiles",
        type=click.FloatRange(0, min_open=True),
        multiple=True,
        help="Relative width of a stored weight average, for scm-export ema; repeat it: 0.05 and 0.1 suffice.",
    ),
    click.option(
        "--ema-every",
        "ema_snapshot_every",
        type=click.IntRange(1),
        default=1000,
        help="Iterations between stored weight averages.",
    ),
    click.option(
        "--precision",
        type=one_of("precision", "fp32", "bf16", "fp16"),
        default="fp32",
        help="Precision of the network's trunk.",
    ),
]

DISTILL_OPTIONS = [
    click.option(
        "--teacher",
        default="",
        metavar="FOLDER",
        help="Folder of the teacher: a run, a checkpoint or a diffusers pipeline.",
    ),
    click.option(
        "--no-teacher", is_flag=True, help="Train from data without a teacher (sCT); --init gives the initial weights."
    ),
    stable_targets_option,
    click.option(
        "--vsd",
        "vsd_weight",
        type=click.FloatRange(0),
        default=0.0,
        help="Weight of the variational score distillation (VSD) loss, added to the main loss; 1 in the paper.",
    ),
    click.option(
        "--vsd-weighting",
        type=one_of("weighting", "learned", "error"),
        default="learned",
        help="Weighting of the VSD loss: learned is the paper's and does not converge near the teacher; error "
        "divides by the teacher's error on each sample, for short runs.",
    ),
    click.option("--vsd-only", is_flag=True, help="Train with the VSD loss only."),
    click.option(
        "--vsd-steps", type=click.IntRange(1, 64), default=1, help="Number of sampler steps at which VSD compares."
    ),
    click.option(
        "--vsd-lr",
        "vsd_learning_rate",
        type=click.FloatRange(0),
        default=0.0,
        help="Learning rate of the VSD fake score; 0: that of the student.",
    ),
    click.option("--vsd-p-mean", type=float, default=0.4, help="Mean of ln(sigma) for VSD."),
    click.option(
        "--vsd-p-std",
        type=click.FloatRange(0, min_open=True),
        default=2.0,
        help="Standard deviation of ln(sigma) for VSD.",
    ),
    click.option(
        "--vsd-warmup", type=click.IntRange(0), default=0, help="Iterations that train only the VSD fake score."
    ),
    click.option(
        "--discrete-step",
        type=click.FloatRange(0, math.pi / 2, min_open=True),
        help="Distill in discrete time with random teacher steps of at most this length, radians; for short runs.",
    ),
    click.option(
        "--anchor",
        "anchor_weight",
        type=click.FloatRange(0),
        default=0.0,
        help="Weight of a denoising loss, added to --discrete-step.",
    ),
    click.option("--anchor-p-mean", type=float, default=-1.5, help="Mean of ln(sigma) of the denoising loss."),
    click.option(
        "--anchor-p-std",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        help="Standard deviation of ln(sigma) of the denoising loss.",
    ),
    click.option(
        "--trajectory-steps",
        type=click.IntRange(1, 256),
        help="Distill onto the end points of the teacher's trajectories, solved in this many second-order steps.",
    ),
    click.option(
        "--huber",
        type=click.FloatRange(0),
        default=0.0,
        help="Error above which the trajectory loss grows linearly, data units; 0: squared error.",
    ),
    click.option("--mid-time", type=float, default=1.1, help="Second time of the model's two-step sampler, radians."),
    click.option(
        "--tangent-norm",
        type=one_of("norm", "l2", "rms", "clamp"),
        default="l2",
        help="Normalization of the tangent; l2 is the paper's.",
    ),
    click.option(
        "--tangent-warmup",
        type=click.IntRange(0),
        default=10_000,
        help="Iterations of tangent warm-up (H in the paper).",
    ),
    click.option(
        "--tangent-c",
        type=click.FloatRange(0, min_open=True),
        default=0.1,
        help="Constant c of the tangent normalization.",
    ),
    click.option("--guidance", type=click.FloatRange(0, min_open=True), help="Fixed guidance scale of the teacher."),
    click.option(
        "--guidance-range",
        nargs=2,
        type=click.FloatRange(0, min_open=True),
        metavar="LOW HIGH",
        help="Range of guidance scales to train on; the model takes the scale as an input. 1 2 in the paper.",
    ),
    click.option(
        "--tangent",
        "tangent_mode",
        type=one_of("tangent", "jvp", "jvp2", "fd"),
        default="jvp2",
        help="Computation of dF/dt: JVP in the trained pass (jvp) or a separate pass (jvp2), or finite differences.",
    ),
    click.option(
        "--tangent-step",
        type=click.FloatRange(0, 0.1, min_open=True),
        default=3e-3,
        help="Relative step of --tangent fd.",
    ),
    click.option(
        "--discrete-points",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Number of grid times of the paper's discrete-time loss, which replaces the tangent; 0: continuous time.",
    ),
    click.option(
        "--tangent-normalization/--no-tangent-normalization",
        "normalize_tangent",
        default=True,
        help="Normalize the tangent; disable for ablations.",
    ),
    click.option(
        "--adaptive-weighting/--no-adaptive-weighting",
        "adaptive_weighting",
        default=True,
        help="Learn the weight of the loss over time; disable for ablations.",
    ),
]
