"""``report``: everything that is known about a bundle, on one page."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say
from .located import model_argument


@click.command()
@model_argument("bundle")
@click.option("-o", "--out", default=Path("report.html"), type=click.Path(path_type=Path), help="The HTML file.")
@click.option("--backend", "backends", multiple=True, help="Beside PyTorch; every one that can run here when absent.")
@click.option("--num-images", type=click.IntRange(1), default=32, help="Pictures of each artifact.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8, 32), help="Batches to time.")
@click.option("--rounds", type=click.IntRange(0), default=20, help="Interleaved rounds of the timing; 0: none.")
@json_option
def report(
    bundle: Path, out: Path, backends: tuple[str, ...], num_images: int, batches: tuple[int, ...], rounds: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Write OUT (one HTML file that loads nothing), Markdown and JSON beside it.

    Pictures of everything that runs here beside PyTorch's, the recorded ladder, errors, speed, engines with their
    census, and where each file comes from.

    \b
    scm-export report avatars -o avatars.html
    """
    from scm_sdk.report.collect import collect
    from scm_sdk.report.render import write_report

    if rounds == 1:
        raise click.BadParameter("1 round has no spread, expected 0 or at least 2", param_hint="--rounds")
    data = collect(
        bundle, backends=backends, num_images=num_images, batches=batches, rounds=rounds,
        progress=lambda text: say(f"  {text} …"),
    )  # fmt: skip
    paths = write_report(data, out)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        say("wrote " + ", ".join(map(str, paths)))
