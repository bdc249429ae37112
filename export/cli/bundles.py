"""``bundle``: verbs on a bundle as a whole."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say


@click.group()
def bundle() -> None:
    """Check a bundle."""


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Compare every file of the bundle at PATH with its sha256; exit 6 if one differs."""
    from scm_sdk.bundle import Bundle

    manifest = Bundle.open(path, verify="digest").manifest
    size = sum(entry.size for entry in manifest.files)
    if as_json:
        print_json({"path": str(path), "build_id": manifest.build_id, "files": len(manifest.files), "bytes": size})
    else:
        say(
            f"{path}: {len(manifest.files)} files, {size / 1e6:.1f} MB, all as recorded. "
            f"Build {manifest.build_id[:12]}."
        )
