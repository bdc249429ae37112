"""``bundle``: verbs on a bundle as a whole."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say
from .located import local_folder, model_argument, revision_option


@click.group()
def bundle() -> None:
    """Check a bundle, put it into one file or on the Hugging Face hub."""


@bundle.command()
@model_argument("path")
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


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file; PATH.scmz when absent.")
def pack(path: Path, out: Path | None) -> None:
    """Write the bundle at PATH as one .scmz file; the same bundle gives the same bytes."""
    from scm_sdk.archive import SUFFIX
    from scm_sdk.archive import pack as pack_bundle

    written = pack_bundle(path, out or path.with_name(path.resolve().name + SUFFIX))
    say(f"{written}: {written.stat().st_size / 1e6:.1f} MB. Generator.from_pretrained opens it as it is.")


@bundle.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@revision_option
def unpack(archive: Path, out: Path, overwrite: bool, revision: str | None) -> None:
    """Write the bundle in ARCHIVE, a .scmz file or a hub id, to a folder; it is checked before it appears."""
    from scm_sdk.archive import SUFFIX
    from scm_sdk.archive import unpack as unpack_bundle
    from scm_sdk.bundle import Bundle

    if archive.suffix == SUFFIX and revision is None:
        unpack_bundle(archive, out, overwrite=overwrite)
    else:
        Bundle.open(local_folder(archive, revision)).save_pretrained(out, overwrite=overwrite)
    say(f"{out}: every file as its manifest lists it.")


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--hub-id", default="", metavar="OWNER/NAME", help="Where the card says that the bundle is.")
def card(path: Path, hub_id: str) -> None:
    """Generate the model card of the bundle at PATH, in place of one that was edited.

    Commands that change a bundle keep a generated card up to date and leave an edited one alone.
    """
    from scm_sdk.bundle import Bundle
    from scm_sdk.card import CARD_PATH
    from scm_sdk.hub import HUB_PREFIX

    Bundle.open(path).with_card(where=f"{HUB_PREFIX}{hub_id}" if hub_id else "")
    say(f"{path / CARD_PATH}")


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--revision", help="Branch to write to; main when absent.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", default="", help="Of the commit.")
def push(path: Path, repo_id: str, revision: str | None, private: bool, create_pr: bool, message: str) -> None:
    """Upload the bundle at PATH, with an up-to-date card, to the Hugging Face hub; nothing on disk changes."""
    from scm_sdk.bundle import Bundle
    from scm_sdk.hub import is_repo_id

    if not is_repo_id(repo_id):
        raise click.UsageError(f"{repo_id!r} is no hub id, expected OWNER/NAME.")
    opened = Bundle.open(path)
    say(opened.push_to_hub(repo_id, revision=revision, private=private or None, message=message, create_pr=create_pr))
