"""``selfcheck``: properties that hold for every model on every backend, without data."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, make_table, print_json, print_table
from .located import model_argument
from .names import BACKEND_OR_AUTO, PRECISION_OR_AUTO, STEPS


@click.command()
@model_argument("model", one_size=True)
@click.option("--backend", type=BACKEND_OR_AUTO, default="auto", help="Library that runs the model.")
@click.option("--precision", type=PRECISION_OR_AUTO, default="auto", help="Precision of the artifact that runs.")
@click.option("--steps", type=STEPS, help="Number of network calls; default: 2 if the bundle has it.")
@click.option("--num-samples", type=click.IntRange(2), default=16, help="Number of samples of each check.")
@json_option
def selfcheck(model: Path, backend: str, precision: str, steps: int | None, num_samples: int, as_json: bool) -> None:
    """Check properties that need no data; exit 3 on failure.

    The properties: f(x, 0) = x, equal images in any batch and order, an effect of labels, extreme seeds.

    \b
    scm-export selfcheck avatars
    scm-export selfcheck avatars --backend torch
    """
    from scm_sdk.errors import ParityError
    from scm_sdk.evaluate.selfcheck import selfcheck as run
    from scm_sdk.inference.generator import Generator

    with Generator.from_pretrained(
        model, backend=backend, precision=precision, num_inference_steps=steps, verify="none"
    ) as generator:
        checks = run(generator, num_samples=num_samples)
        row = generator.opened().row
    if as_json:
        print_json({"backend": row.backend, "artifact": row.artifact, "checks": [check.to_dict() for check in checks]})
    else:
        table = make_table("check", "", "found", "allowed", "of what", title=f"{row.artifact} on {row.backend}")
        for check in checks:
            verdict = "-" if check.passed is None else "pass" if check.passed else "FAIL"
            numbers = ("", "") if check.passed is None else (f"{check.value:.2g}", f"{check.allowed:.2g}")
            table.add_row(check.name, verdict, *numbers, check.text)
        print_table(table)
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise ParityError(
            f"{row.artifact} on {row.backend}: {failed[0].text} is {failed[0].value:.2g}, expected at most "
            f"{failed[0].allowed:.2g} ({len(failed)} of {len(checks)} checks failed). Do not ship it; "
            "see what differs: scm-export validate --bisect FOLDER"
        )
