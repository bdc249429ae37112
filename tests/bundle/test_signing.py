"""Signed bundles, with real keys: what is accepted, and each thing that is not."""

import base64
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from helpers.commands import invoke
from scm_sdk._util.lazy import install_command
from scm_sdk.bundle.archive import pack, unpack
from scm_sdk.bundle.bundle import Bundle, write_manifest
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import MANIFEST_NAME, SIGNATURE_NAME, Artifact, FileEntry
from scm_sdk.bundle.signing import (
    SIGNATURE_MAX_BYTES,
    Identity,
    PrivateKey,
    PublicKey,
    check_current,
    check_signature,
    sign,
)
from scm_sdk.errors import BackendUnavailable, BundleError, ConfigError, IntegrityError
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec

model_signing = pytest.importorskip("model_signing", reason="the extra 'sign' is not installed")

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))
GRAPH = "onnx/fp32/1step/model.onnx"


def write_pair(folder: Path, name: str, curve: str = "SECP256R1", password: bytes | None = None) -> SimpleNamespace:
    """Write a private key and its public key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pair = SimpleNamespace(private=folder / f"{name}.pem", public=folder / f"{name}.pub")
    pair.private.write_bytes(key.private_bytes(pem, pkcs8, encryption))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    pair.public.write_bytes(public)
    return pair


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("keys")
    return SimpleNamespace(ours=write_pair(folder, "ours"), other=write_pair(folder, "other"), folder=folder)


@pytest.fixture
def ours(keys: SimpleNamespace) -> PublicKey:
    return PublicKey(keys.ours.public)


@pytest.fixture
def signed(bundle_copy: Path, keys: SimpleNamespace) -> Path:
    """A signed toy bundle that the test may damage."""
    sign(bundle_copy, PrivateKey(keys.ours.private))
    return bundle_copy


@pytest.fixture
def runs(linear_bundle: Callable[..., Path], keys: SimpleNamespace) -> Path:
    """A signed bundle that runs."""
    path = linear_bundle(SPEC)
    sign(path, PrivateKey(keys.ours.private))
    return path


def open_it(path: Path | str, signer: PublicKey | Identity) -> Generator:
    return Generator.from_pretrained(path, backend="onnxruntime", require_signature=signer)


# What is accepted


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_what_was_signed_is_accepted(curve: str, bundle_copy: Path, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "key", curve)
    assert sign(bundle_copy, PrivateKey(pair.private)) == bundle_copy / SIGNATURE_NAME
    check_signature(bundle_copy, PublicKey(pair.public))
    assert SIGNATURE_NAME not in {entry.path for entry in Bundle.open(bundle_copy).manifest.files}
    moved = bundle_copy.rename(tmp_path / "moved")
    check_signature(moved, PublicKey(str(pair.public)))
    sign(moved, PrivateKey(pair.private))
    check_signature(moved, PublicKey(pair.public))


def test_the_library_itself_verifies_it(signed: Path, keys: SimpleNamespace) -> None:
    """Who has model-signing alone can check a bundle as well."""
    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys.ours.public)
    config.verify(signed, signed / SIGNATURE_NAME)


def test_a_generator_asks_each_time(runs: Path, ours: PublicKey) -> None:
    with open_it(runs, ours) as gen:
        with pickle.loads(pickle.dumps(gen)) as again:
            assert len(again(1, seed=0).images) == 1
        (runs / "notes.txt").write_bytes(b"added")
        for later in (gen.reopen, lambda: pickle.loads(pickle.dumps(gen))):
            with pytest.raises(IntegrityError, match=r"notes\.txt was not signed: it was added"):
                later()


def test_a_key_with_a_password(bundle_copy: Path, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "locked", password=b"open sesame")
    with pytest.raises(ConfigError, match=r"locked\.pem cannot be used as a private key.*password"):
        sign(bundle_copy, PrivateKey(pair.private))
    assert not (bundle_copy / SIGNATURE_NAME).exists()
    (tmp_path / "password").write_text("open sesame\n", encoding="utf-8")
    done = invoke(
        "bundle", "sign", bundle_copy, "--private-key", pair.private, "--password-file", tmp_path / "password"
    )
    assert done.exit_code == 0, done.output
    check_signature(bundle_copy, PublicKey(pair.public))
    assert "sesame" not in repr(PrivateKey(pair.private, "open sesame"))


# What is not


def forge(path: Path, change: Callable[[dict], object]) -> None:
    """Change what a signature states, without a key."""
    envelope = json.loads(path.read_bytes())
    statement = json.loads(base64.b64decode(envelope["dsseEnvelope"]["payload"]))
    change(statement)
    envelope["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(envelope), encoding="utf-8")


def remove_from_statement(path: Path) -> None:
    (path / GRAPH).unlink()
    forge(path / SIGNATURE_NAME, lambda s: s["predicate"]["resources"].pop())


def name_folders(path: Path) -> None:
    (path / SIGNATURE_NAME).unlink()
    (path / SIGNATURE_NAME).mkdir()


def fill_signature(path: Path) -> None:
    with open(path / SIGNATURE_NAME, "wb") as stream:
        stream.truncate(SIGNATURE_MAX_BYTES + 1)


def change_schema(path: Path) -> None:
    (path / MANIFEST_NAME).write_bytes(b"{")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "unsigned": (lambda path: (path / SIGNATURE_NAME).unlink(), "is not signed: it holds no scm_signature.json"),
    "altered": (lambda path: (path / GRAPH).write_bytes(b"Graph" * 20), f"{GRAPH} is not the file that was signed"),
    "removed": (lambda path: (path / "README.md").unlink(), "README.md was signed and is missing: it was removed"),
    "added": (lambda path: (path / "hook.py").write_bytes(b""), "hook.py was not signed: it was added later"),
    "hidden": (lambda path: (path / ".gitattributes").write_bytes(b""), ".gitattributes was not signed: it was added"),
    "manifest": (change_schema, "was signed, then changed: scm_manifest.json is another.*sign it again"),
    "forged": (remove_from_statement, "is not signed by the key .*ours.pub: scm_signature.json does not verify"),
    "no JSON": (lambda path: (path / SIGNATURE_NAME).write_bytes(b"{"), "does not verify"),
    "other JSON": (lambda path: (path / SIGNATURE_NAME).write_bytes(b"[[]]"), "does not verify"),
    "deep JSON": (lambda path: (path / SIGNATURE_NAME).write_bytes(b"[" * 200_000), "does not verify"),
    "folder": (name_folders, "is no plain file"),
    "huge": (fill_signature, f"is no plain file of at most {SIGNATURE_MAX_BYTES} bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_thing_that_is_not_as_it_was_signed(case: str, signed: Path, ours: PublicKey) -> None:
    damage, text = REFUSED[case]
    damage(signed)
    with pytest.raises(IntegrityError, match=text):
        Generator.from_pretrained(signed, require_signature=ours)
    done = invoke("bundle", "verify", signed, "--public-key", ours.path)
    assert done.exit_code == 6, done.output


def test_another_key_is_another_signer(signed: Path, keys: SimpleNamespace) -> None:
    with pytest.raises(IntegrityError, match=r"is not signed by the key .*other\.pub: .*does not verify"):
        check_signature(signed, PublicKey(keys.other.public))
    sign(signed, PrivateKey(keys.other.private))
    with pytest.raises(IntegrityError, match=r"is not signed by the key .*ours\.pub"):
        check_signature(signed, PublicKey(keys.ours.public))


def test_a_signature_that_leaves_files_out_is_not_of_the_whole(
    bundle_copy: Path, keys: SimpleNamespace, ours: PublicKey
) -> None:
    """Other programs may sign a part of a folder, or hash it otherwise."""
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys.ours.private)
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["onnx"])
    config.set_hashing_config(hashing).sign(bundle_copy, bundle_copy / SIGNATURE_NAME)
    with pytest.raises(IntegrityError, match=f"{GRAPH} was not signed"):
        check_signature(bundle_copy, ours)
    (bundle_copy / SIGNATURE_NAME).unlink()
    config.set_hashing_config(model_signing.hashing.Config().use_shard_serialization())
    config.sign(bundle_copy, bundle_copy / SIGNATURE_NAME)
    with pytest.raises(IntegrityError, match="is over shards by sha256, expected files by sha256"):
        check_signature(bundle_copy, ours)


# Changes afterwards


def test_who_changes_a_signed_bundle_is_warned_and_it_is_refused(runs: Path, ours: PublicKey, keys) -> None:
    with pytest.warns(UserWarning, match=r"was signed and is changed.*Sign it again"):
        Bundle.open(runs).with_budgets("p95=9s@b1")
    with pytest.raises(IntegrityError, match=r"was signed, then changed: .* sign it again"):
        open_it(runs, ours)
    sign(runs, PrivateKey(keys.ours.private))
    Bundle.open(runs).with_budgets("p95=9s@b1")  # as it is: no warning
    open_it(runs, ours).close()
    with pytest.warns(UserWarning, match="was signed and is changed"), extend_bundle(runs) as draft:
        draft.path("onnx/fp16/1step/model.onnx").write_bytes((runs / GRAPH).read_bytes())
        draft.add(Artifact(path="onnx/fp16/1step/model.onnx", format="onnx", num_inference_steps=1), [])
    with pytest.raises(IntegrityError, match=r"was signed, then changed: .*onnx/fp16/1step/model\.onnx"):
        open_it(runs, ours)
    for passed_on in (
        lambda: pack(runs, runs.parent / "b.scmz"),
        lambda: Bundle.open(runs).save_pretrained(runs.parent / "copy"),
        lambda: Bundle.open(runs).push_to_hub("me/b"),
    ):
        with pytest.raises(IntegrityError, match=r"was signed, then changed.* delete scm_signature\.json"):
            passed_on()
    assert not (runs.parent / "copy").exists() and not (runs.parent / "b.scmz").exists()
    sign(runs, PrivateKey(keys.ours.private))
    open_it(runs, ours).close()


def test_what_the_manifest_does_not_list_is_not_signed(bundle_copy: Path, keys: SimpleNamespace) -> None:
    (bundle_copy / "notes.txt").write_bytes(b"")
    with pytest.raises(BundleError, match=r"is not signed: notes\.txt"):
        sign(bundle_copy, PrivateKey(keys.ours.private))
    (bundle_copy / "notes.txt").unlink()
    shutil.move(bundle_copy / "onnx", bundle_copy.parent / "elsewhere")
    os.symlink(bundle_copy.parent / "elsewhere", bundle_copy / "onnx")
    with pytest.raises(BundleError):
        sign(bundle_copy, PrivateKey(keys.ours.private))
    assert not (bundle_copy / SIGNATURE_NAME).exists()


def test_a_damaged_bundle_is_not_signed(bundle_copy: Path, keys: SimpleNamespace) -> None:
    (bundle_copy / GRAPH).write_bytes(b"Graph" * 20)
    with pytest.raises(IntegrityError, match=rf"{GRAPH} has 100 bytes"):
        sign(bundle_copy, PrivateKey(keys.ours.private))


def test_a_manifest_may_not_list_the_signature(signed: Path, toy) -> None:
    manifest = toy.export(signed.parent / "b").manifest
    entry = FileEntry(path=SIGNATURE_NAME, size=1, sha256="0" * 64, role="config")
    with pytest.raises(ConfigError, match="lists a path twice, or itself or the signature"):
        write_manifest(signed.parent / "b", msgspec.structs.replace(manifest, files=(*manifest.files, entry)))


# In one file, and from the hub


def test_a_file_holds_its_signature(runs: Path, ours: PublicKey, keys: SimpleNamespace, tmp_path: Path) -> None:
    file = pack(runs, tmp_path / "runs.scmz")
    for _ in range(2):  # unpacked now, found in the cache then
        open_it(file, ours).close()
        with pytest.raises(IntegrityError, match=r"is not signed by the key .*other\.pub"):
            open_it(file, PublicKey(keys.other.public))
    check_signature(unpack(file, tmp_path / "out"), ours)
    assert invoke("bundle", "verify", file, "--public-key", keys.ours.public).exit_code == 0
    (runs / SIGNATURE_NAME).unlink()
    with pytest.raises(IntegrityError, match="is not signed"):
        open_it(pack(runs, tmp_path / "unsigned.scmz"), ours)


@pytest.mark.parametrize("member", [GRAPH, MANIFEST_NAME, SIGNATURE_NAME])
def test_a_file_that_was_changed(member: str, runs: Path, ours: PublicKey, tmp_path: Path) -> None:
    """The signature is checked before the manifest is read: whatever it holds, it is not its error that is raised."""
    with zipfile.ZipFile(pack(runs, tmp_path / "runs.scmz")) as source:
        contents = {info: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(tmp_path / "hostile.scmz", "w") as target:
        for info, data in contents.items():
            target.writestr(info, b"{" + b" " * (len(data) - 1) if info.filename == member else data)
    found = {GRAPH: f"{GRAPH} is not the file", MANIFEST_NAME: "signed, then changed", SIGNATURE_NAME: "not signed by"}
    with pytest.raises(IntegrityError, match=found[member]):
        open_it(tmp_path / "hostile.scmz", ours)


def test_a_hub_id(hub, runs: Path, ours: PublicKey, keys: SimpleNamespace, tmp_path: Path) -> None:
    Bundle.open(runs).push_to_hub("me/runs")
    pushed = hub.repos["me/runs"]
    assert {name: pushed[name] for name in (MANIFEST_NAME, SIGNATURE_NAME)} == {
        name: (runs / name).read_bytes() for name in (MANIFEST_NAME, SIGNATURE_NAME)
    }, "as it was signed, without a new card"
    open_it("hf:me/runs", ours).close()
    Generator.from_pretrained(
        "hf:me/runs", local_files_only=True, backend="onnxruntime", require_signature=ours
    ).close()
    with pytest.raises(IntegrityError, match=r"is not signed by the key .*other\.pub"):
        open_it("hf:me/runs", PublicKey(keys.other.public))
    hub.repos["me/unsigned"] = {name: data for name, data in pushed.items() if name != SIGNATURE_NAME}
    with pytest.raises(IntegrityError, match="is not signed"):
        open_it("hf:me/unsigned", ours)
    out = tmp_path / "out"
    assert invoke("bundle", "unpack", "hf:me/runs", "-o", out).exit_code == 0
    check_signature(out, ours)


def test_a_slim_bundle_is_not_signed(runs: Path, tmp_path: Path) -> None:
    slim = Bundle.open(runs).subset(tmp_path / "slim", ["onnx"])
    assert not check_current(slim.path) and check_current(runs)


# Keys, and the library


def test_keys_that_are_none(bundle_copy: Path, signed: Path, keys: SimpleNamespace, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    for name, key in (
        ("rsa", rsa.generate_private_key(65537, 2048)),
        ("ed25519", ed25519.Ed25519PrivateKey.generate()),
        ("secp256k1", ec.generate_private_key(ec.SECP256K1())),
    ):
        (tmp_path / f"{name}.pub").write_bytes(key.public_key().public_bytes(*public))
        (tmp_path / f"{name}.pem").write_bytes(key.private_bytes(*private))
    (tmp_path / "text.pub").write_bytes(b"no key")
    (tmp_path / "text.pem").write_bytes(b"no key")
    for name in ("rsa", "ed25519", "secp256k1", "text", "gone"):
        with pytest.raises(ConfigError, match=rf"{name}\.pub cannot be used as a public key.*elliptic curve P-256"):
            check_signature(signed, PublicKey(tmp_path / f"{name}.pub"))
        with pytest.raises(ConfigError, match=rf"{name}\.pem cannot be used as a private key.*elliptic curve P-256"):
            sign(signed, PrivateKey(tmp_path / f"{name}.pem"))
    check_signature(signed, PublicKey(keys.ours.public))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, made_bundle: Path, keys: SimpleNamespace) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(BackendUnavailable, match="a signature needs model_signing"):
        Generator.from_pretrained(made_bundle, require_signature=PublicKey(keys.ours.public))
    for options in (["sign", made_bundle, "--private-key", keys.ours.private],
                    ["verify", made_bundle, "--public-key", keys.ours.public]):  # fmt: skip
        done = invoke("bundle", *options)
        assert done.exit_code == 7 and install_command("sign") in done.stderr, done.output
    assert invoke("bundle", "verify", made_bundle).exit_code == 0, "hashes need no library"


@pytest.mark.parametrize(
    "options",
    [
        ["sign"],
        ["sign", "--private-key", "k", "--sigstore"],
        ["sign", "--ambient"],
        ["verify", "--identity", "a@b.c"],
        ["verify", "--public-key", "k", "--identity", "a@b.c"],
        ["verify", "--trust-config", "f"],
    ],
)
def test_options_that_do_not_go_together(options: list[str], made_bundle: Path) -> None:
    done = invoke("bundle", options[0], made_bundle, *options[1:])
    assert done.exit_code == 2 and "expected --p" in done.stderr


def test_the_verbs(bundle_copy: Path, keys: SimpleNamespace) -> None:
    assert json.loads(invoke("bundle", "verify", bundle_copy, "--json").stdout)["signed"] is False
    done = invoke("bundle", "sign", bundle_copy, "--private-key", keys.ours.private, "--json")
    assert json.loads(done.stdout) == {"path": str(bundle_copy / SIGNATURE_NAME)}
    assert "It is signed; the signature was not checked" in invoke("bundle", "verify", bundle_copy).stderr
    found = invoke("bundle", "verify", bundle_copy, "--public-key", keys.ours.public, "--json")
    assert json.loads(found.stdout)["signed_by"] == f"the key {keys.ours.public}"


# Sigstore. Signing needs a network and a login and is not run here.


@pytest.fixture
def by_sigstore(tmp_path: Path) -> SimpleNamespace:
    """Two files that were signed in the public instance, and that instance's certificates as sigstore ships them.

    ``golden/sigstore.json`` is a test file of github.com/sigstore/model-transparency (Apache-2.0).
    """
    from cryptography import x509

    folder, config = tmp_path / "signed", tmp_path / "trust.json"
    folder.mkdir()
    for name in ("signme-1", "signme-2"):
        (folder / name).write_text(name, encoding="utf-8")
    shutil.copyfile(Path(__file__).resolve().parents[1] / "golden/sigstore.json", folder / SIGNATURE_NAME)
    store = files("sigstore._store").joinpath("https%3A%2F%2Ftuf-repo-cdn.sigstore.dev")
    names = (("trustedRoot", "trusted_root.json"), ("signingConfig", "signing_config.v0.2.json"))
    parts = {name: json.loads(store.joinpath(file).read_bytes()) for name, file in names}
    config.write_text(
        json.dumps({"mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"} | parts), encoding="utf-8"
    )
    material = json.loads((folder / SIGNATURE_NAME).read_bytes())["verificationMaterial"]
    certificate = x509.load_der_x509_certificate(base64.b64decode(material["certificate"]["rawBytes"]))
    people = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    issuer = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")).value
    assert isinstance(issuer, x509.UnrecognizedExtension)
    who = Identity(identity=people[0].value, provider=issuer.value.decode(), trust_config=config)
    return SimpleNamespace(folder=folder, who=who, config=config)


def test_an_identity_is_verified_offline(by_sigstore: SimpleNamespace) -> None:
    from dataclasses import replace

    folder, who = by_sigstore.folder, by_sigstore.who
    check_signature(folder, who)
    for other in (replace(who, identity="nobody@example.org"), replace(who, provider="https://example.org")):
        with pytest.raises(IntegrityError, match=r"is not signed by .*example\.org.* does not verify"):
            check_signature(folder, other)
    (folder / "signme-1").write_text("signme-3", encoding="utf-8")
    with pytest.raises(IntegrityError, match="signme-1 is not the file that was signed"):
        check_signature(folder, who)
    forge(folder / SIGNATURE_NAME, lambda statement: statement["predicate"]["resources"].pop())
    with pytest.raises(IntegrityError, match="does not verify"):
        check_signature(folder, who)


def test_a_key_is_no_identity(by_sigstore: SimpleNamespace, signed: Path, ours: PublicKey, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"is not signed by .* does not verify"):
        check_signature(signed, by_sigstore.who)
    with pytest.raises(IntegrityError, match=r"is not signed by the key .*ours\.pub"):
        check_signature(by_sigstore.folder, ours)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    for name in ("other.json", "gone.json"):
        who = Identity(identity="a@b.c", provider="https://example.org", trust_config=tmp_path / name)
        with pytest.raises(ConfigError, match=f"{name} cannot be used as a trust configuration"):
            check_signature(signed, who)
