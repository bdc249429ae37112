"""``evaluate``: how good the pictures are."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from .common import json_option, print_json, progress_bar

if TYPE_CHECKING:
    from scm_sdk.evaluate.scoring import Samples, Score


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--steps", multiple=True, type=click.IntRange(1), default=(1, 2), help="May be repeated.")
@click.option("--teacher-steps", type=click.IntRange(2), help="MODEL is a teacher: second-order solver steps.")
@click.option("--num-images", type=click.IntRange(64), default=10_000)
@click.option("--data", default="avatars", metavar="SOURCE", help="As for train.")
@click.option("--label", default="hairColor", metavar="COLUMN")
@click.option("--rows", nargs=2, type=click.IntRange(0), default=(10_000, 20_000), help="Held-out rows.")
@click.option("--real-rows", nargs=2, type=click.IntRange(0), default=(0, 10_000), help="Rows for the floor.")
@click.option("--backend", default="auto")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("auto",),
    help="May be repeated: each is also compared with the first, seed by seed.",
)
@click.option(
    "--max-kid-delta", type=float, help="Worst KID beside the first precision; unless it is surely below, exits 3."
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for features of real pictures.")
@json_option
def evaluate(
    model: Path, steps: tuple[int, ...], teacher_steps: int | None, num_images: int, data: str, label: str,
    rows: tuple[int, int], real_rows: tuple[int, int], backend: str, precisions: tuple[str, ...],
    max_kid_delta: float | None, cache: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare MODEL's pictures with held-out ones: Fréchet distance, KID, precision, recall, label accuracy.

    \b
    scm-export evaluate avatars
    scm-export evaluate avatars --precision fp32 --precision fp16 --precision int8 --max-kid-delta 0.01
    scm-export evaluate runs/teacher --teacher-steps 18
    """
    from scm_sdk.evaluate.scoring import sample_diffusion, sample_student, score

    if max_kid_delta is not None and len(precisions) < 2:
        raise click.UsageError(
            "--max-kid-delta compares with the first --precision, and only one is given. Expected two or more, "
            "for example --precision fp32 --precision int8."
        )

    def draw(count: int, precision: str) -> Samples:
        with progress_bar("sample", num_images) as update:
            if teacher_steps:
                return sample_diffusion(model, num_images, num_steps=teacher_steps, progress=lambda n, _: update(n))
            return sample_student(
                model, num_images, num_inference_steps=count, backend=backend, precision=precision,
                progress=lambda n, _: update(n),
            )  # fmt: skip

    with TemporaryDirectory() as scratch:  # the real pictures' features are computed once for all samplers
        scores = []
        for count in (1,) if teacher_steps else steps:
            first: Samples | None = None
            for precision in precisions:
                samples = draw(count, precision)
                with progress_bar("compare", 1) as update:
                    scores.append(
                        score(
                            samples, source=data, label=label, reference_rows=rows, real_rows=real_rows, beside=first,
                            cache=cache or Path(scratch),
                        )
                    )  # fmt: skip
                    update(1)
                first = first or samples
    if as_json:
        print_json([each.to_dict() for each in scores])
    else:
        _print(scores)
    if max_kid_delta is not None:
        for each in scores:
            each.raise_if_worse(max_kid_delta)


def _print(scores: list[Score]) -> None:
    from rich.console import Console
    from rich.table import Table

    quality = scores[0].quality
    table = Table(
        "sampler", "calls", quality.metric, "real vs real", "KID x1e3 (95 %)", "more than the first",
        "precision", "recall", "labels (real)", "palette", box=None,
        title=f"{quality.num_generated} pictures against {quality.num_reference} held-out ones",
    )  # fmt: skip
    for each in scores:
        q = each.quality
        low, high = q.kid_interval
        table.add_row(
            each.sampler, str(each.network_calls), f"{q.fd:.1f}", f"{q.fd_floor:.1f}",
            f"{q.kid * 1e3:.1f} ({low * 1e3:.1f}..{high * 1e3:.1f})",
            "-" if q.kid_delta is None or q.kid_delta_interval is None else
            f"{q.kid_delta * 1e3:+.2f} ({q.kid_delta_interval[0] * 1e3:+.2f}..{q.kid_delta_interval[1] * 1e3:+.2f})",
            f"{q.precision:.1%}", f"{q.recall:.1%}",
            "-" if each.labels is None else f"{each.labels.accuracy:.1%} ({each.labels_real:.1%})",
            "-" if each.palette is None else f"{each.palette:.1%}",
        )  # fmt: skip
    Console(width=140).print(table)
