"""``bundle``: verbs on a bundle as a whole."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say
from .located import local_folder, model_argument, revision_option


@click.group()
def bundle() -> None:
    """Check a bundle, pack it into one file, or upload it to a hub."""


@bundle.command()
@model_argument("path")
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Compare every file of a bundle with its sha256 and check every graph; exit 6 if one fails."""
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
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="File (*.scmz) or folder to write; PATH.scmz when absent."
)
@click.option(
    "--only",
    multiple=True,
    metavar="ARTIFACT",
    help="Artifact to keep, for example onnx/fp16/2step; may be repeated. The others are left out, the "
    "checkpoint and the text encoder among them. inspect lists the names.",
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle in the folder OUT.")
@revision_option
@json_option
def pack(
    path: Path, out: Path | None, only: tuple[str, ...], overwrite: bool, revision: str | None, as_json: bool
) -> None:  # fmt: skip
    """Write a bundle, or some of its artifacts, as one .scmz file or as a folder.

    The same bundle gives the same bytes.
    """
    from scm_sdk.archive import SUFFIX
    from scm_sdk.bundle import Bundle

    folder = local_folder(path, revision)
    if out is None and (only or folder != path):
        raise click.UsageError("--out is missing, expected a file or a folder to write to.")
    made = Bundle.open(folder, verify="none").pack(
        out or path.with_name(path.resolve().name + SUFFIX), only=only, overwrite=overwrite
    )
    size = sum(each.stat().st_size for each in (made.rglob("*") if made.is_dir() else [made]) if each.is_file())
    if as_json:
        print_json({"path": str(made), "bytes": size})
    else:
        say(f"{made}: {size / 1e6:.1f} MB. Generator.from_pretrained opens it as it is.")


@bundle.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle in OUT.")
@revision_option
@json_option
def unpack(archive: Path, out: Path, overwrite: bool, revision: str | None, as_json: bool) -> None:
    """Write the bundle of a .scmz file or a hub id to a folder, after every file was checked."""
    from scm_sdk.archive import SUFFIX
    from scm_sdk.archive import unpack as unpack_bundle
    from scm_sdk.bundle import Bundle

    if archive.suffix == SUFFIX and revision is None:
        unpack_bundle(archive, out, overwrite=overwrite)
    else:
        Bundle.open(local_folder(archive, revision)).save_pretrained(out, overwrite=overwrite)
    if as_json:
        manifest = Bundle.open(out, verify="none").manifest
        print_json({"path": str(out), "build_id": manifest.build_id, "files": len(manifest.files)})
    else:
        say(f"{out}: every file as its manifest lists it.")


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--hub-id", default="", metavar="OWNER/NAME", help="Hub id that the card's commands name.")
@json_option
def card(path: Path, hub_id: str, as_json: bool) -> None:
    """Generate the model card of a bundle, in place of one that was edited.

    Commands that change a bundle keep a generated card up to date and leave an edited one alone.
    """
    from scm_sdk.bundle import Bundle
    from scm_sdk.card import CARD_PATH
    from scm_sdk.hub import HUB_PREFIX

    Bundle.open(path).with_card(where=f"{HUB_PREFIX}{hub_id}" if hub_id else "")
    if as_json:
        print_json({"path": str(path / CARD_PATH)})
    else:
        say(f"{path / CARD_PATH}")


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--revision", help="Branch to write to; main when absent.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", default="", help="Message of the commit.")
@json_option
def push(
    path: Path, repo_id: str, revision: str | None, private: bool, create_pr: bool, message: str, as_json: bool
) -> None:
    """Upload a bundle with an up-to-date card to the Hugging Face hub; nothing on disk changes."""
    from scm_sdk.bundle import Bundle
    from scm_sdk.hub import is_repo_id

    if not is_repo_id(repo_id):
        raise click.UsageError(f"{repo_id!r} is no hub id, expected OWNER/NAME.")
    opened = Bundle.open(path)
    url = opened.push_to_hub(repo_id, revision=revision, private=private or None, message=message, create_pr=create_pr)
    if as_json:
        print_json({"url": url})
    else:
        say(url)
