"""``bundle``: verify, sign, pack, unpack, upload, model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import Command, json_option, print_json, say
from .group import SummaryGroup
from .located import local_folder, revision_option

if TYPE_CHECKING:
    from scm_sdk.bundle.signing import Signer


def trust_config_option(command: Command) -> Command:
    """Add ``--trust-config``."""
    return click.option(
        "--trust-config", type=click.Path(path_type=Path), metavar="FILE",
        help="Certificates of a Sigstore instance (ClientTrustConfig, JSON); default: the public instance.",
    )(command)  # fmt: skip


@click.group(cls=SummaryGroup)
def bundle() -> None:
    """Check, sign or pack a bundle, or upload it to a hub."""


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Public key (PEM) of the required signer.",
)
@click.option("--identity", help="Sigstore identity of the required signer; needs a network.")
@click.option("--identity-provider", metavar="URL", help="OpenID Connect provider of --identity.")
@trust_config_option
@revision_option
@json_option
def verify(
    path: Path, public_key: Path | None, identity: str | None, identity_provider: str | None,
    trust_config: Path | None, revision: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare every file of a bundle with its sha256 and check every graph; exit 6 if one fails.

    If a signer is given (--public-key or --identity), the signature is verified first.
    """
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.bundle.manifest import SIGNATURE_NAME
    from scm_sdk.bundle.signing import check_signature

    signer = _signer(public_key, identity, identity_provider, trust_config)

    def check(found: Path) -> None:
        if signer is not None:
            check_signature(found, signer)

    folder = local_folder(path, revision, check=check)
    manifest = Bundle.open(folder, verify="digest").manifest
    size = sum(entry.size for entry in manifest.files)
    is_signed = (folder / SIGNATURE_NAME).exists()
    if as_json:
        print_json(
            {"path": str(folder), "build_id": manifest.build_id, "files": len(manifest.files), "bytes": size,
             "signed": is_signed, "signed_by": str(signer) if signer else None}
        )  # fmt: skip
        return
    checked = f" Signed by {signer}." if signer else " It is signed; the signature was not checked." * is_signed
    say(
        f"{path}: {len(manifest.files)} files, {size / 1e6:.1f} MB, all as recorded. "
        f"Build {manifest.build_id[:12]}.{checked}"
    )


def _signer(
    public_key: Path | None, identity: str | None, provider: str | None, trust_config: Path | None
) -> Signer | None:
    from scm_sdk.bundle.signing import Identity, PublicKey

    if public_key is not None and (identity, provider, trust_config) == (None, None, None):
        return PublicKey(public_key)
    if identity is not None and provider is not None and public_key is None:
        return Identity(identity=identity, provider=provider, trust_config=trust_config)
    if (public_key, identity, provider, trust_config) != (None, None, None, None):
        raise click.UsageError("expected --public-key alone, or --identity with --identity-provider.")
    return None


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--private-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Private key (PEM) of an elliptic curve P-256, P-384 or P-521.",
)
@click.option(
    "--password-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the password of an encrypted key.",
)
@click.option(
    "--sigstore",
    is_flag=True,
    help="Sign without a key, with a browser login at Sigstore's provider; needs a network.",
)
@click.option("--ambient", is_flag=True, help="With --sigstore: the identity of this CI job instead of a login.")
@trust_config_option
@json_option
def sign(
    path: Path, private_key: Path | None, password_file: Path | None, sigstore: bool, ambient: bool,
    trust_config: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Sign every file of a bundle, by the OpenSSF model-signing library.

    The signature is scm_signature.json in the bundle. Changing the bundle afterwards makes it invalid: sign last.
    """
    from scm_sdk.bundle.signing import PrivateKey, Sigstore
    from scm_sdk.bundle.signing import sign as sign_bundle

    by: PrivateKey | Sigstore
    if sigstore and private_key is None and password_file is None:
        by = Sigstore(ambient=ambient, trust_config=trust_config)
    elif private_key is not None and not (sigstore or ambient or trust_config):
        by = PrivateKey(private_key, None if password_file is None else _password(password_file))
    else:
        raise click.UsageError("expected --private-key, with --password-file if it is encrypted, or --sigstore.")
    written = sign_bundle(path, by)
    if as_json:
        print_json({"path": str(written)})
    else:
        say(f"{written}: signed. Check it: scm-export bundle verify BUNDLE --public-key FILE, or --identity")


def _password(path: Path) -> str:
    from scm_sdk.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}. Expected a password in its first line.") from exc


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="File (.scmz) or folder to write; default: PATH.scmz."
)
@click.option(
    "--only",
    multiple=True,
    metavar="ARTIFACT",
    help="Artifact to keep, for example onnx/fp16/2step; may be repeated. Others are excluded, also the "
    "checkpoint and the text encoder. inspect lists the names.",
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
    from scm_sdk.bundle.archive import SUFFIX
    from scm_sdk.bundle.bundle import Bundle

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
        say(f"{made}: {size / 1e6:.1f} MB. Generator.from_pretrained opens it.")


@bundle.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle in OUT.")
@revision_option
@json_option
def unpack(archive: Path, out: Path, overwrite: bool, revision: str | None, as_json: bool) -> None:
    """Write the bundle of a .scmz file or a hub id to a folder, after every file was checked."""
    from scm_sdk.bundle.archive import SUFFIX
    from scm_sdk.bundle.archive import unpack as unpack_bundle
    from scm_sdk.bundle.bundle import Bundle

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
@click.option("--hub-id", default="", metavar="OWNER/NAME", help="Hub id for the commands in the card.")
@json_option
def card(path: Path, hub_id: str, as_json: bool) -> None:
    """Generate the model card of a bundle, in place of one that was edited.

    Commands that change a bundle keep a generated card up to date and leave an edited one alone.
    """
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.bundle.card import CARD_PATH
    from scm_sdk.bundle.hub import HUB_PREFIX

    Bundle.open(path).with_card(where=f"{HUB_PREFIX}{hub_id}" if hub_id else "")
    if as_json:
        print_json({"path": str(path / CARD_PATH)})
    else:
        say(f"{path / CARD_PATH}")


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--revision", help="Branch to write to; default: main.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", default="", help="Commit message.")
@json_option
def push(
    path: Path, repo_id: str, revision: str | None, private: bool, create_pr: bool, message: str, as_json: bool
) -> None:
    """Upload a bundle with an up-to-date card to the Hugging Face hub; nothing on disk changes."""
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.bundle.hub import is_repo_id

    if not is_repo_id(repo_id):
        raise click.UsageError(f"{repo_id!r} is no hub id, expected OWNER/NAME.")
    opened = Bundle.open(path)
    url = opened.push_to_hub(repo_id, revision=revision, private=private or None, message=message, create_pr=create_pr)
    if as_json:
        print_json({"url": url})
    else:
        say(url)
