"""``report``: everything that is known about a bundle, on one page."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say, timed_batches_option
from .located import model_argument
from .names import BACKEND


@click.command()
@model_argument("bundle")
@click.option("-o", "--out", default=Path("report.html"), type=click.Path(path_type=Path), help="The HTML file.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=BACKEND,
    help="Backend to show beside PyTorch; may be repeated; every one that can run here when absent.",
)
@click.option("--num-images", type=click.IntRange(1), default=32, help="Number of images of each artifact.")
@timed_batches_option
@click.option(
    "--rounds", type=click.IntRange(0), default=20, help="Number of interleaved timing rounds; 0 times nothing."
)
@json_option
def report(
    bundle: Path, out: Path, backends: tuple[str, ...], num_images: int, batches: tuple[int, ...], rounds: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Write a report of a bundle: an HTML file, a Markdown file and a JSON file of the same name.

    It shows the images of everything that runs here beside PyTorch's, recorded parity, errors, speed, engines with
    their census, and the origin of each file.

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
