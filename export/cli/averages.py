"""``ema`` and ``average``: weight averages computed from stored weights."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say
from .libraries import TRAIN, requires
from .names import OutputPath


@click.command()
@requires(*TRAIN)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--sigma-rel", required=True, type=float, help="Width of the average, relative to the run's length.")
@click.option(
    "--iteration", type=click.IntRange(1), help="Last iteration of the average; default: the last stored one."
)
@click.option("-o", "--out", required=True, type=OutputPath(), help="Checkpoint folder to write.")
@json_option
def ema(run: Path, sigma_rel: float, iteration: int | None, out: Path, as_json: bool) -> None:
    """Compute a weight average of any width from a run's snapshots.

    The average has a power-function profile. RUN was trained with --ema-profile.

    \b
    scm-export train -o runs/teacher --ema-profile 0.05 --ema-profile 0.1
    scm-export ema runs/teacher --sigma-rel 0.03 -o runs/teacher-0.03
    """
    from scm_sdk.train.averages.posthoc import reconstruct

    _require_no_run(out)
    made = reconstruct(run, sigma_rel, iteration=iteration)
    made.model.save_pretrained(out)
    about = {
        "out": str(out),
        "sigma_rel": made.sigma_rel,
        "iteration": made.iteration,
        "num_snapshots": made.num_snapshots,
        "profile_error": made.error,
    }
    if as_json:
        print_json(about)
    else:
        say(
            f"Done: {out} is the average of {made.iteration} iterations with sigma_rel {sigma_rel:g}, made from "
            f"{made.num_snapshots} snapshots; its profile is off by {made.error:.2%}."
        )


@click.command()
@requires(*TRAIN)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=OutputPath(), help="Checkpoint folder to write.")
@json_option
def average(models: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Average the weights of runs that started from one checkpoint.

    The average of MODELS is usually better than each of them.

    \b
    scm-export average runs/one runs/other -o runs/avatars
    """
    from scm_sdk.train.averages.average import average_models

    _require_no_run(out)
    average_models(models).save_pretrained(out)
    if as_json:
        print_json({"out": str(out), "models": [str(model) for model in models]})
    else:
        say(f"Done: {out} is the mean of {len(models)} models. Next: scm-export onnx {out} -o bundle")


def _require_no_run(out: Path) -> None:
    from scm_sdk.errors import ConfigError

    if (out / "train.json").exists():
        raise ConfigError(f"{out} holds a training run, whose own model would be lost. Choose another folder.")
