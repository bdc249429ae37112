"""``inspect``: what lies in a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json
from .located import model_argument


@click.command()
@model_argument("bundle")
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Print what BUNDLE holds: samplers, artifacts, files, recorded parity, provenance."""
    import msgspec

    from scm_sdk.bundle import Bundle

    opened = Bundle.open(bundle, verify="none")
    manifest, status = opened.manifest, opened.status
    if as_json:
        print_json({**msgspec.to_builtins(manifest), "status": status.to_dict()})
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{manifest.name}[/]  build {manifest.build_id[:12]}  schema {manifest.schema_version}")
    console.print(f"{status.kind}, objective {status.objective or 'not on record'}", soft_wrap=True)
    console.print(f"training: {status.training}; quality: {status.quality}", soft_wrap=True)
    for text in status.training_warnings:
        console.print(f"[bold yellow]warning:[/] {text}", soft_wrap=True)
    for spec in manifest.samplers:
        times = ", ".join(f"{t:.4f}" for t in spec.times)
        console.print(f"{spec.num_inference_steps} steps at t = {times}: {spec.sample_shape}, "
                      f"{spec.num_classes} classes, batch 1..{spec.max_batch}")  # fmt: skip
    if manifest.samplers[0].class_names:
        console.print("labels: " + ", ".join(manifest.samplers[0].class_names))
    files = Table("file", "role", "bytes", "sha256", box=None)
    for entry in manifest.files:
        files.add_row(entry.path, entry.role, f"{entry.size:,}", entry.sha256[:12])
    console.print(files)
    if manifest.parity:
        parity = Table("parity of", "backend", "found", "noise floor", "samples", "", box=None)
        for record in manifest.parity:
            parity.add_row(
                record.artifact, record.backend, record.finding, f"{record.noise_floor:.1e}",
                str(record.num_samples), "passed" if record.passed else "FAILED",
            )  # fmt: skip
        console.print(parity)
    for key, value in (*manifest.provenance.items(), *manifest.versions.items()):
        console.print(f"{key}: {value}")
