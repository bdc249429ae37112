"""``report``: one page about a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalEvents, json_option, print_json, say, timed_batches_option
from .located import model_argument
from .names import BACKEND, OutputPath


@click.command()
@model_argument("bundle", one_size=True)
@click.option("-o", "--out", default=Path("report.html"), type=OutputPath(), help="The HTML file.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=BACKEND,
    help="Backend to show next to PyTorch; may be repeated; default: every one that can run here.",
)
@click.option("--num-images", type=click.IntRange(1), default=32, help="Number of images of each artifact.")
@timed_batches_option
@click.option(
    "--rounds", type=click.IntRange(0), default=20, help="Number of interleaved timing rounds; 0 for no timing."
)
@click.option("--self-checks/--no-self-checks", "checks", default=True, help="Run the checks of scm-export selfcheck.")
@json_option
def report(
    bundle: Path, out: Path, backends: tuple[str, ...], num_images: int, batches: tuple[int, ...], rounds: int,
    checks: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a report of a bundle as HTML, Markdown and JSON.

    The three files have the same name. The report shows the images of everything that runs here next to PyTorch's,
    recorded parity, errors, speed, engines with their census, and the origin of each file.

    \b
    scm-export report avatars -o avatars.html
    """
    from scm_sdk._util.files import check_writable
    from scm_sdk.report.collect import collect
    from scm_sdk.report.render import paths_of, write_report

    if out.suffix not in ("", ".html") or out.is_dir():
        found = "is a folder" if out.is_dir() else f"ends in {out.suffix}"
        raise click.BadParameter(f"{out} {found}, expected the name of an .html file.", param_hint="--out")
    for file in paths_of(out):
        check_writable(file)
    if rounds == 1:
        raise click.BadParameter("1 round has no variance, expected 0 or at least 2", param_hint="--rounds")
    with TerminalEvents() as events:
        data = collect(
            bundle, backends=backends, num_images=num_images, batches=batches, rounds=rounds, checks=checks,
            events=events,
        )  # fmt: skip
    paths = write_report(data, out)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        say("wrote " + ", ".join(map(str, paths)))
