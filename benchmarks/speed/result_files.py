"""Where benchmarks write: results of one class of CPU to a file."""

import json
from pathlib import Path

import click

from scm_sdk._util.processor import cpu_class


def check_class(out: Path | None) -> None:
    """Refuse a file that holds results of another class of CPU, before anything is measured.

    Raises:
        ClickException: If it does.
    """
    if out is None or not out.is_file():
        return
    found = json.loads(out.read_bytes()).get("machine", {}).get("cpu_class")
    if found is not None and found != cpu_class():
        raise click.ClickException(
            f"{out} holds results of {found} CPUs, expected {cpu_class()} as here. Write to another file."
        )
