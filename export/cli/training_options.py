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
    "--stable-targets", is_flag=True, help="Regress onto exact posterior means; for data that fits in memory."
)


def run_options(
    *, data: str | None, iterations: int, learning_rate: float, optimizer: str, p_mean: float, lr_decay: float
) -> Callable[[Command], Command]:
    """Return the options that both verbs have, with the verb's own defaults; without data, the teacher's."""
    teachers = "" if data else " The teacher's when absent."
    options = [
        click.option("-o", "--out", required=True, type=OutputPath(), help="Folder of the run."),
        click.option(
            "--data", default=data, metavar="SOURCE",
            help=f"avatars, fashion-mnist, an image folder, an .npz or a folder of shards.{teachers}",
        ),
        click.option(
            "--label", default=data and "", metavar="COLUMN",
            help=f"Label column, '' for none; for a folder 'folder': its sub-folders are the classes.{teachers}",
        ),
        click.option(
            "--rows", nargs=2, type=click.IntRange(0), default=data and (0, 0), metavar="FIRST LAST",
            help=f"Train on rows FIRST to LAST - 1 only; 0 0 is all.{teachers}",
        ),
        click.option(
            "--iterations", "num_iterations", type=click.IntRange(1), default=iterations, help="Length of the run."
        ),
        click.option("--batch-size", type=click.IntRange(1), default=64, help="Samples of one iteration."),
        click.option(
            "--lr", "learning_rate", type=click.FloatRange(0, min_open=True), default=learning_rate,
            help="Learning rate.",
        ),
        click.option(
            "--lr-decay", "decay_fraction", type=click.FloatRange(0, 1), default=lr_decay,
            help="Last share in which the rate falls.",
        ),
        click.option("--optimizer", type=one_of("optimizer", "adam", "radam"), default=optimizer),
        click.option("--p-mean", type=float, default=p_mean, help="Mean of ln(sigma)."),
        click.option("--p-std", type=click.FloatRange(0, min_open=True), default=1.4, help="Deviation of ln(sigma)."),
        click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0),
        click.option(
            "--init", "init_from", default="", metavar="FOLDER", help="Checkpoint folder of the first weights."
        ),
        click.option("--label-dropout", type=click.FloatRange(0, 1), default=0.0, help="Share trained without label."),
        click.option("--sigma-data", type=click.FloatRange(0, min_open=True), default=0.5),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Names the run."),
        click.option("--compile", is_flag=True, help="torch.compile the loss; the first iteration takes minutes."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads; all when absent."),
        click.option(
            "--parallel", type=one_of("method", "ddp", "fsdp"), default="ddp",
            help="Under torchrun: everything in each process, or a share (FSDP2).",
        ),
        click.option(
            "--accumulate", type=click.IntRange(1), default=1, metavar="N", help="Compute a batch in N parts."
        ),
        click.option("--recompute", is_flag=True, help="Compute activations again in the backward pass: less memory."),
        click.option("--device", type=one_of("device", "auto", "cpu", "cuda"), default="auto", help="auto: see docs."),
        click.option(
            "--timeout", type=click.FloatRange(0, min_open=True), default=600.0,
            help="Seconds that a process waits for the others.",
        ),
        *SCHEDULE_OPTIONS,
        click.option("--sample-every", type=click.IntRange(0), default=1000, help="Iterations between grids; 0: none."),
        click.option("--checkpoint-every", type=click.IntRange(1), default=250, help="Iterations between checkpoints."),
        click.option("-n", "--dry-run", is_flag=True, help="Print the resolved config and stop."),
        json_option,
    ]  # fmt: skip

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
        "--recipe", metavar="NAME", help="A run of the paper, cifar10-scd for one; other options given change it."
    ),
    click.option(
        "--lr-schedule", "schedule", type=one_of("schedule", "linear", "inverse_sqrt"), default="linear",
        help="inverse_sqrt is EDM2's.",
    ),
    click.option("--lr-warmup", "warmup_iterations", type=click.IntRange(0), default=200, help="Iterations of rise."),
    click.option(
        "--lr-reference", "decay_reference", type=click.IntRange(1), default=35_000,
        help="Iterations after which inverse_sqrt falls.",
    ),
    click.option("--betas", nargs=2, type=click.FloatRange(0, 1, max_open=True), default=(0.9, 0.99)),
    click.option("--epsilon", type=click.FloatRange(0, min_open=True), default=1e-8, help="The optimizer's."),
    click.option("--grad-clip", type=click.FloatRange(0), default=10.0, help="Largest gradient norm; 0 for any."),
    click.option(
        "--ema-sigma-rel", type=click.FloatRange(0), default=0.0,
        help="Sample with a power-function average of this width; 0: with a half-life.",
    ),
    click.option(
        "--ema-profile", "ema_profiles", type=click.FloatRange(0, min_open=True), multiple=True,
        help="Store the average of this width now and then, to make others from: see ema. 0.05 and 0.1 will do.",
    ),
    click.option("--ema-every", "ema_snapshot_every", type=click.IntRange(1), default=1000, help="Iterations between."),
    click.option(
        "--precision", type=one_of("precision", "fp32", "bf16", "fp16"), default="fp32", help="Of the network's trunk."
    ),
]  # fmt: skip

DISTILL_OPTIONS = [
    click.option("--teacher", default="", metavar="FOLDER", help="Run or checkpoint folder of the teacher."),
    click.option("--no-teacher", is_flag=True, help="Train from data alone (sCT); --init gives the first weights."),
    stable_targets_option,
    click.option(
        "--vsd",
        "vsd_weight",
        type=click.FloatRange(0),
        default=0.0,
        help="Weight of variational score distillation beside the other loss; the paper's is 1.",
    ),
    click.option(
        "--vsd-weighting",
        type=one_of("weighting", "learned", "error"),
        default="learned",
        help="learned is the paper's, whose pull does not fade: near its teacher a student keeps moving by the "
        "learning rate. error divides by the teacher's error on each sample and settles; for small budgets.",
    ),
    click.option("--vsd-only", is_flag=True, help="Variational score distillation alone."),
    click.option("--vsd-steps", type=click.IntRange(1, 64), default=1, help="Sampler steps that VSD looks at."),
    click.option(
        "--vsd-lr",
        "vsd_learning_rate",
        type=click.FloatRange(0),
        default=0.0,
        help="Learning rate of its fake score; the student's when 0.",
    ),
    click.option("--vsd-p-mean", type=float, default=0.4, help="Mean of ln(sigma) where VSD compares."),
    click.option("--vsd-p-std", type=click.FloatRange(0, min_open=True), default=2.0, help="Its deviation."),
    click.option("--vsd-warmup", type=click.IntRange(0), default=0, help="Iterations of its fake score alone."),
    click.option(
        "--discrete-step",
        type=click.FloatRange(0, math.pi / 2, min_open=True),
        help="Distill in discrete time, by steps of the teacher up to this long, radians: a fast start.",
    ),
    click.option(
        "--anchor", "anchor_weight", type=click.FloatRange(0), default=0.0, help="Weight of a denoising loss beside it."
    ),
    click.option("--anchor-p-mean", type=float, default=-1.5, help="Mean of ln(sigma) of that loss: small times."),
    click.option("--anchor-p-std", type=click.FloatRange(0, min_open=True), default=1.0, help="Its deviation."),
    click.option(
        "--trajectory-steps",
        type=click.IntRange(1, 256),
        help="Distill onto the ends of the teacher's trajectories, each solved in this many second-order steps.",
    ),
    click.option(
        "--huber", type=click.FloatRange(0), default=0.0,
        help="Error above which that loss grows linearly; 0: the square.",
    ),
    click.option("--mid-time", type=float, default=1.1, help="Second time of the model's two-step sampler, radians."),
    click.option("--tangent-norm", type=one_of("norm", "l2", "rms", "clamp"), default="l2", help="l2 is the paper's."),
    click.option("--tangent-warmup", type=click.IntRange(0), default=10_000, help="Iterations of tangent warm-up, H."),
    click.option("--tangent-c", type=click.FloatRange(0, min_open=True), default=0.1, help="Constant c of its norm."),
    click.option(
        "--guidance", type=click.FloatRange(0, min_open=True), help="Guidance scale of the teacher, baked in."
    ),
    click.option(
        "--guidance-range", nargs=2, type=click.FloatRange(0, min_open=True), metavar="LOW HIGH",
        help="Scales to draw from; the model takes one as an input. The paper's are 1 2.",
    ),
    click.option(
        "--tangent", "tangent_mode", type=one_of("tangent", "jvp", "jvp2", "fd"), default="jvp2",
        help="In the pass that is trained, in one of its own, or by finite differences.",
    ),
    click.option(
        "--tangent-step", type=click.FloatRange(0, 0.1, min_open=True), default=3e-3, help="Step of fd, relative."
    ),
    click.option(
        "--discrete-points", type=click.IntRange(0), default=0, metavar="N",
        help="The paper's discrete time: a difference over a grid of N times in place of the tangent.",
    ),
    click.option(
        "--tangent-normalization/--no-tangent-normalization", "normalize_tangent", default=True, help="For ablations."
    ),
    click.option(
        "--adaptive-weighting/--no-adaptive-weighting", "adaptive_weighting", default=True, help="For ablations."
    ),
]  # fmt: skip
