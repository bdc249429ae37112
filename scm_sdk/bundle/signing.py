"""Signatures of bundles, by the OpenSSF ``model-signing`` library: the signer, and the integrity of every file.

The signature is a file in the bundle's folder, a Sigstore bundle over the sha256 of every other file, and is not listed
in the manifest. It is verified before any other file of the folder is read.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .._util.files import atomic_file, final_path, sha256_file
from .._util.lazy import require
from .._util.publish import undisturbed
from ..errors import BundleError, ConfigError, IntegrityError
from .manifest import MANIFEST_NAME, SIGNATURE_NAME
from .verify import check_content, read_manifest, require_own

SIGNATURE_MAX_BYTES = 16 << 20
_MAKE_KEYS = (
    "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem; "
    "openssl pkey -in key.pem -pubout -out key.pub"
)
_AGAIN = "If you changed it, sign it again: scm-export bundle sign; otherwise copy the bundle again."


@dataclass(frozen=True)
class PublicKey:
    """Accepts signatures of the holder of a private key.

    Attributes:
        path: PEM file of the public key; an elliptic curve P-256, P-384 or P-521.
    """

    path: str | os.PathLike[str]

    def __str__(self) -> str:
        return f"the key {os.fspath(self.path)}"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Accepts signatures of a Sigstore identity, without a key.

    Attributes:
        identity: The identity at the provider: an e-mail address, or the URL of a CI workflow.
        provider: URL of the OpenID Connect provider of the identity.
        trust_config: File with the certificates of a Sigstore instance, for a private instance or a machine without
            a network; None downloads those of the public instance.
    """

    identity: str
    provider: str
    trust_config: str | os.PathLike[str] | None = None

    def __str__(self) -> str:
        return f"{self.identity} of {self.provider}"


Signer = PublicKey | Identity
"""Accepted signer."""


@dataclass(frozen=True)
class PrivateKey:
    """Signs with a key.

    Attributes:
        path: PEM file of the private key; an elliptic curve P-256, P-384 or P-521.
        password: Password of an encrypted key.
    """

    path: str | os.PathLike[str]
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Sigstore:
    """Signs without a key, with a login at an OpenID Connect provider. Needs a network.

    Attributes:
        ambient: Use the identity of the current CI job instead of a login.
        trust_config: As in ``Identity``.
    """

    ambient: bool = False
    trust_config: str | os.PathLike[str] | None = None


def sign(folder: str | os.PathLike[str], by: PrivateKey | Sigstore) -> Path:
    """Sign every file of a bundle; an existing signature is replaced.

    Args:
        folder: The bundle; every file is checked first.
        by: The signer.

    Returns:
        Path of the signature.

    Raises:
        BackendUnavailable: If model-signing is not installed.
        ConfigError: If the key cannot be used.
        IntegrityError: If the bundle is damaged.
        BundleError: If it holds unlisted files, is in a cache or cannot be written, or Sigstore cannot be reached.
    """
    folder = Path(folder)
    library = _library()
    require_own(folder)
    config = _signing_config(library, by).set_hashing_config(_whole_folder(library))
    with undisturbed(folder, purpose=f"sign {folder}"):
        manifest = read_manifest(folder)
        for entry in manifest.files:
            check_content(folder, entry)
        odd = _files(folder) ^ {MANIFEST_NAME, *(entry.path for entry in manifest.files)}
        if odd:
            raise BundleError(
                f"{folder} is not signed: {min(odd)} is a file that its manifest does not list, or is in a linked "
                "folder, expected a folder of listed files alone. Move it away, or copy the bundle: scm-export bundle "
                "pack BUNDLE -o COPY"
            )
        with atomic_file(folder / SIGNATURE_NAME, error=BundleError) as temp:
            try:
                config.sign(folder, temp)
            except Exception as exc:  # errors of the library, its dependencies and the system have no common base class
                raise BundleError(
                    f"{folder} could not be signed: {_first_line(exc)}. Signing without a key needs a network and a "
                    "login."
                ) from exc
    return folder / SIGNATURE_NAME


def check_signature(folder: str | os.PathLike[str], signer: Signer) -> None:
    """Verify that a folder is exactly as its signer signed it. Only bytes and names are read; nothing is parsed.

    Args:
        folder: The folder of a bundle.
        signer: The accepted signer.

    Raises:
        BackendUnavailable: If model-signing is not installed.
        ConfigError: If the key or the trust configuration cannot be used.
        IntegrityError: If the folder is unsigned or signed by another signer, or a file was added, removed or altered.
        BundleError: If Sigstore's certificates cannot be fetched.
    """
    folder = Path(folder)
    library = _library()
    hashing = _whole_folder(library)
    config = _verifying_config(library, signer).set_hashing_config(hashing)
    signature = _signature_of(folder)
    try:
        config.verify(folder, signature)
    except Exception as exc:  # as in sign
        if not hashing.reached:
            raise IntegrityError(
                f"{folder} is not signed by {signer}: {SIGNATURE_NAME} does not verify ({_first_line(exc)}). Expected "
                "a signature of exactly that signer. Get the bundle from whom you trust."
            ) from exc
        changes = describe_changes(folder) or "it was changed while it was checked. Check it again."
        raise IntegrityError(f"{folder}: {changes}") from exc


def check_current(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder has a signature, after comparing the signed digests with the files; needs no key.

    It does not verify the signer. For code that copies or uploads a signature.

    Raises:
        IntegrityError: If the bundle was changed since it was signed.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / SIGNATURE_NAME):
        return False
    if changes := describe_changes(folder):
        raise IntegrityError(
            f"{folder}: {changes} Without a signature it may be passed on, too: delete {SIGNATURE_NAME}."
        )
    return True


def warn_if_signed(folder: Path) -> None:
    """Warn before a change of a signed bundle, which invalidates the signature."""
    if os.path.lexists(folder / SIGNATURE_NAME):
        warnings.warn(
            f"{final_path(str(folder))} was signed and is changed: its signature no longer fits. Sign it again: "
            "scm-export bundle sign",
            UserWarning,
            stacklevel=3,
        )


def describe_changes(folder: Path) -> str:
    """Describe the differences of a folder from its signature; "" if there are none.

    Raises:
        IntegrityError: If the signature or a file cannot be read.
    """
    signed = _signed_digests(folder)
    found = _files(folder)
    altered = [name for name in sorted(found & signed.keys()) if sha256_file(folder / name) != signed[name]]
    removed, added = sorted(signed.keys() - found), sorted(found - signed.keys())
    if MANIFEST_NAME in altered:
        others = [name for name in (*altered, *added, *removed) if name != MANIFEST_NAME][:3]
        also = f" ({', '.join(others)} with it)" if others else ""
        return f"the bundle was signed, then changed: {MANIFEST_NAME} is another{also}. {_AGAIN}"
    if altered:
        return f"{altered[0]} is not the file that was signed: it was altered or damaged. {_AGAIN}"
    if removed:
        return f"{removed[0]} was signed and is missing: it was removed. {_AGAIN}"
    if added:
        return f"{added[0]} was not signed: it was added later. {_AGAIN}"
    return ""


def _library() -> ModuleType:
    return require("model_signing", extra="sign", purpose="a signature")


def _signing_config(library: ModuleType, by: PrivateKey | Sigstore) -> Any:
    config = library.signing.Config()
    if isinstance(by, Sigstore):
        try:
            return config.use_sigstore_signer(use_ambient_credentials=by.ambient, trust_config=_path(by.trust_config))
        except Exception as exc:
            raise _sigstore_error(exc, by.trust_config) from exc
    password: Any = None if by.password is None else by.password.encode()  # annotated as str, used as bytes
    try:
        return config.use_elliptic_key_signer(private_key=Path(by.path), password=password)
    except Exception as exc:
        raise _key_error("private", by.path, exc) from exc


def _verifying_config(library: ModuleType, signer: Signer) -> Any:
    config = library.verifying.Config()
    if isinstance(signer, Identity):
        try:
            return config.use_sigstore_verifier(
                identity=signer.identity, oidc_issuer=signer.provider, trust_config=_path(signer.trust_config)
            )
        except Exception as exc:
            raise _sigstore_error(exc, signer.trust_config) from exc
    try:
        return config.use_elliptic_key_verifier(public_key=Path(signer.path))
    except Exception as exc:
        raise _key_error("public", signer.path, exc) from exc


def _whole_folder(library: ModuleType) -> Any:
    """Return the hashing configuration: every file except the signature, regardless of exclusions in a signature."""

    class WholeFolder(library.hashing.Config):  # type: ignore[misc, name-defined]
        reached = False

        def hash(self, model_path: Path, **options: Any) -> Any:
            self.reached = True  # called by the verification only for a valid signature
            return super().hash(model_path, **options)

        def add_ignored_paths(self, **_: Any) -> None:
            return

    # A snapshot in the hub's cache consists of links; their targets are checked when files are opened.
    return WholeFolder().set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False).set_allow_symlinks(True)


def _files(folder: Path) -> set[str]:
    """Return the relative paths of all files in a folder except the signature."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return {name for name in found if name != SIGNATURE_NAME}


def _signature_of(folder: Path) -> Path:
    path = folder / SIGNATURE_NAME
    try:
        state = path.stat()
    except OSError as exc:
        raise IntegrityError(
            f"{folder} is not signed: it holds no {SIGNATURE_NAME}, expected a signature. Ask who made it to sign it: "
            "scm-export bundle sign"
        ) from exc
    if not stat.S_ISREG(state.st_mode) or state.st_size > SIGNATURE_MAX_BYTES:
        raise IntegrityError(f"{path} is no plain file of at most {SIGNATURE_MAX_BYTES} bytes. It is refused.")
    return path


def _signed_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file by relative path from the signature, without verification."""
    try:
        envelope = json.loads(_signature_of(folder).read_bytes())["dsseEnvelope"]
        predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
        kind = predicate["serialization"]
        if (kind["method"], kind["hash_type"]) == ("files", "sha256"):
            return {str(each["name"]): str(each["digest"]) for each in predicate["resources"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise IntegrityError(f"{folder / SIGNATURE_NAME} cannot be read: {_first_line(exc)}. {_AGAIN}") from exc
    raise IntegrityError(
        f"{folder / SIGNATURE_NAME} is over {kind['method']} by {kind['hash_type']}, expected files by sha256, as "
        "scm-export bundle sign makes it."
    )


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _key_error(kind: str, path: str | os.PathLike[str], exc: Exception) -> ConfigError:
    return ConfigError(
        f"{os.fspath(path)} cannot be used as a {kind} key: {_first_line(exc)}. Expected a PEM file of an elliptic "
        f"curve P-256, P-384 or P-521, with its password if it is encrypted. Make a pair: {_MAKE_KEYS}"
    )


def _sigstore_error(exc: Exception, trust_config: str | os.PathLike[str] | None) -> ConfigError | BundleError:
    if trust_config is not None:
        return ConfigError(
            f"{os.fspath(trust_config)} cannot be used as a trust configuration: {_first_line(exc)}. Expected the JSON "
            "of a Sigstore instance's ClientTrustConfig."
        )
    return BundleError(
        f"Sigstore's certificates could not be fetched: {_first_line(exc)}. An identity needs a network; without one "
        "give a trust configuration, or use a key."
    )


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {text[0][:200]}" if text else type(exc).__name__
