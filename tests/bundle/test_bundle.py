"""A bundle on disk: what was touched, cut or forged does not open."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scm_sdk.bundle.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.bundle.goldens import GOLDEN_PATH
from scm_sdk.bundle.manifest import MANIFEST_NAME, Artifact, Manifest, ParityRecord
from scm_sdk.bundle.verify import MANIFEST_MAX_BYTES, check_manifest, seal
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, SchemaError, ScmError
from scm_sdk.spec import default_times

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
GRAPH = "onnx/fp32/1step/model.onnx"


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter the manifest as an attacker would: with a build id and digests that fit."""
    plain = json.loads((path / MANIFEST_NAME).read_bytes())
    change(plain)
    data = json.dumps(plain).encode()
    try:
        manifest = Manifest.from_json(data)
    except ScmError:
        pass
    else:
        data = seal(manifest).to_json()
    (path / MANIFEST_NAME).write_bytes(data)


def test_opening_may_skip_the_hashes_but_not_the_sizes(bundle_copy: Path) -> None:
    damaged = bytearray((bundle_copy / WEIGHTS).read_bytes())
    damaged[-1] ^= 1
    (bundle_copy / WEIGHTS).write_bytes(damaged)
    quick = Bundle.open(bundle_copy, verify="none")
    with pytest.raises(IntegrityError, match="altered or damaged"):
        quick.verify()
    (bundle_copy / WEIGHTS).write_bytes(damaged[:-1])
    with pytest.raises(IntegrityError, match=r"has \d+ bytes, expected \d+"):
        Bundle.open(bundle_copy, verify="none")
    with pytest.raises(ConfigError, match="verify is 'maybe', expected one of none, digest"):
        Bundle.open(bundle_copy, verify="maybe")  # type: ignore[arg-type]


def test_artifacts_are_picked_by_what_is_asked(made_bundle: Path, toy: Any) -> None:
    bundle = Bundle.open(made_bundle, verify="none")
    assert bundle.artifacts() == (toy.checkpoint, *toy.graphs)
    assert bundle.artifacts(format="onnx") == toy.graphs
    assert bundle.artifacts(num_inference_steps=2) == (toy.checkpoint, toy.graphs[1])
    assert bundle.artifacts(num_inference_steps=7) == (toy.checkpoint,)
    assert bundle.artifacts(precision="int8") == ()


def test_specs_by_steps(made_bundle: Path, tmp_path: Path, toy: Any) -> None:
    bundle = Bundle.open(made_bundle, verify="none")
    assert bundle.spec(2) == toy.specs[1]
    assert bundle.spec(4).times == default_times(4), "a checkpoint runs any number"
    graphs_only = toy.export(tmp_path / "b", artifacts=toy.graphs)
    with pytest.raises(ConfigError, match="num_inference_steps is 4, expected one of 1, 2"):
        graphs_only.spec(4)


def test_a_file_that_is_not_listed_is_not_given(bundle_copy: Path) -> None:
    (bundle_copy / "extra.bin").write_bytes(b"never opened")
    opened = Bundle.open(bundle_copy)
    for name in ("extra.bin", "../toy", "onnx/fp32/1step/model.onn", ""):
        with pytest.raises(BundleError, match=r"lists no .*expected one of: README.md"):
            opened.file(name)


@pytest.mark.parametrize("victim", [WEIGHTS, GRAPH, GOLDEN_PATH, "README.md", "denoiser/config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied", "longer", "one bit", "a folder", "a pipe"])
def test_each_damage_to_each_file_is_named(victim: str, damage: str, bundle_copy: Path) -> None:
    path = bundle_copy / victim
    content = path.read_bytes()
    if damage in ("missing", "a folder", "a pipe"):
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a pipe":
        os.mkfifo(path)
    elif damage != "missing":
        flipped = bytes([content[0] ^ 1]) + content[1:]
        cut = content[: len(content) // 2]
        changed = {"truncated": cut, "emptied": b"", "longer": content + b"\0", "one bit": flipped}
        path.write_bytes(changed[damage])
    expected = {
        "missing": r"is missing \(No such file",
        "one bit": r"has sha256 [0-9a-f]{12}\.\., expected",
        "a folder": "is not a plain file",
        "a pipe": "is not a plain file",
    }.get(damage, rf"has \d+ bytes, expected {len(content)}")
    with pytest.raises(IntegrityError, match=rf"{victim} {expected}.*Copy the bundle again, or export it again"):
        Bundle.open(bundle_copy)


def test_what_is_no_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, found in (
        (tmp_path / "gone", "is not a folder"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path, f"holds no file {MANIFEST_NAME}"),
        (Path("nul\0byte"), "is not a folder"),
    ):
        with pytest.raises(BundleError, match=rf"{found}, expected a bundle"):
            Bundle.open(path)
    (bundle_copy / MANIFEST_NAME).unlink()
    (bundle_copy / MANIFEST_NAME).mkdir()
    with pytest.raises(BundleError, match="holds no file"):
        Bundle.open(bundle_copy)


def test_a_newer_or_broken_or_huge_manifest(bundle_copy: Path) -> None:
    forge(bundle_copy, lambda plain: plain.update(schema_version=3))
    with pytest.raises(SchemaError, match=r"has schema version 3, .*newer version"):
        Bundle.open(bundle_copy)
    (bundle_copy / MANIFEST_NAME).write_bytes(b"{")
    with pytest.raises(SchemaError, match="cannot be read"):
        Bundle.open(bundle_copy)
    with open(bundle_copy / MANIFEST_NAME, "wb") as stream:
        stream.truncate(MANIFEST_MAX_BYTES + 1)
    with pytest.raises(SchemaError, match=f"has {MANIFEST_MAX_BYTES + 1} bytes, expected at most"):
        Bundle.open(bundle_copy)


def test_an_edited_manifest_is_noticed(bundle_copy: Path) -> None:
    text = (bundle_copy / MANIFEST_NAME).read_text("utf-8")
    (bundle_copy / MANIFEST_NAME).write_text(text.replace('"max_batch": 32', '"max_batch": 33'), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"was altered or damaged: .*'samplers'"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "part, change",
    [
        ("parity", lambda plain: plain["parity"][0].update(passed=True)),
        ("parity", lambda plain: plain["parity"][0].update(artifact="another")),
        ("parity", lambda plain: plain.update(parity=[])),
        ("provenance", lambda plain: plain["provenance"].update(license="MIT-0.0")),
        ("budgets", lambda plain: plain.update(budgets=["p50 < 9 s"])),
        ("name", lambda plain: plain.update(name="another")),
        ("files", lambda plain: plain["files"][0].update(role="report")),
        ("versions", lambda plain: plain.update(versions={})),
        ("schema_version", lambda plain: plain.update(schema_version=1)),
        ("build_id", lambda plain: plain.update(build_id="0" * 64)),
        ("more", lambda plain: plain["digests"].update(more="0" * 64)),
        ("artifacts", lambda plain: plain.update(digests={})),
    ],
)
def test_a_record_that_was_altered_is_named(part: str, change: Callable[..., object], bundle_copy: Path) -> None:
    record = ParityRecord(
        artifact=GRAPH, reference="denoiser", backend="onnxruntime", threshold=1e-5, noise_floor=1e-6, max_abs=1e-3,
        num_samples=3, passed=False,
    )  # fmt: skip
    Bundle.open(bundle_copy).with_parity(record).with_budgets("p50 < 1 ms")
    path = bundle_copy / MANIFEST_NAME
    plain = json.loads(path.read_bytes())
    change(plain)
    path.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(IntegrityError, match=f"{MANIFEST_NAME} was altered or damaged: .*'{part}'"):
        Bundle.open(bundle_copy, verify="none")


def test_a_manifest_of_version_1_is_read_and_written_anew(bundle_copy: Path) -> None:
    """It has no digests; what is written next has."""
    path = bundle_copy / MANIFEST_NAME
    plain = json.loads(path.read_bytes())
    del plain["digests"]
    path.write_text(json.dumps(plain | {"schema_version": 1}), encoding="utf-8")
    old = Bundle.open(bundle_copy)
    new = old.with_budgets("p50 < 1 ms").manifest
    assert (new.schema_version, new.build_id) == (2, old.manifest.build_id)
    assert set(new.digests) == set(plain) - {"digests"}


def test_many_files_are_checked_in_one_pass(made_bundle: Path) -> None:
    """The work does not grow with the square of the files: no comparison of each path with each other."""
    entry = Bundle.open(made_bundle).manifest.files[0]
    calls = 0

    class Counted(str):
        def __eq__(self, other: object) -> bool:
            nonlocal calls
            calls += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    def listed(count: int) -> int:
        nonlocal calls
        calls = 0
        files = tuple(
            msgspec.structs.replace(
                entry, path=Counted(f"d/f{i}.onnx"), built_from=(Counted(f"d/f{max(0, i - 1)}.onnx"),)
            )
            for i in range(count)
        )
        artifacts = tuple(Artifact(path=Counted(f"d/f{i}.onnx"), format="onnx") for i in range(count))
        whole = msgspec.structs.replace(Bundle.open(made_bundle).manifest, files=files, artifacts=artifacts)
        check_manifest(whole)
        return calls

    assert listed(2000) < 2.5 * listed(1000)


def test_a_manifest_without_folders_names_none(made_bundle: Path) -> None:
    manifest = Bundle.open(made_bundle, verify="none").manifest
    files = tuple(entry for entry in manifest.files if entry.path == "README.md")
    with pytest.raises(SchemaError, match=r"'denoiser' .* is none of the listed files or folders: none"):
        check_manifest(msgspec.structs.replace(manifest, files=files))


def first_file(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain["files"][0].update(changes)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (first_file(path="/etc/passwd"), BundleError, "'/etc/passwd' is not allowed"),
        (first_file(path="../secret"), BundleError, "'../secret' is not allowed"),
        (first_file(path="a\\..\\b"), BundleError, "is not allowed"),
        (first_file(path="C:/x"), BundleError, "is not allowed"),
        (first_file(path=MANIFEST_NAME), SchemaError, "lists a path twice, or itself"),
        (first_file(path=WEIGHTS), SchemaError, "lists a path twice"),
        (first_file(path=WEIGHTS.upper()), SchemaError, "lists a path twice"),
        (first_file(path=f"{WEIGHTS}/x"), SchemaError, f"lists '{WEIGHTS}' as a file and as a folder"),
        (first_file(path=f"{WEIGHTS.upper()}/x"), SchemaError, "as a file and as a folder"),
        (first_file(path="x" * 256), BundleError, "is too long, expected at most .* 255 bytes"),
        (first_file(path="é" * 128), BundleError, "is too long, expected at most .* 255 bytes"),
        (first_file(path="a/" * 600 + "b"), BundleError, "is too long, expected at most 1024 characters"),
        (first_file(size=-1), SchemaError, "size -1 and sha256"),
        (first_file(sha256="../" * 21 + "x"), SchemaError, "expected bytes and 64 hex digits"),
        (first_file(built_from=["x"]), SchemaError, r"is built from 'x', expected listed files"),
        (first_file(size=2**70), IntegrityError, f"bytes, expected {2**70}"),
        (
            lambda p: p["artifacts"][1].update(path="../x.onnx"),
            SchemaError,
            "'../x.onnx' .* none of the listed",
        ),
        (lambda p: p["artifacts"][1].update(path="README.md"), SchemaError, "'README.md' is said to be of format onnx"),
        (lambda p: p["artifacts"][1].update(path="onnx"), SchemaError, "'onnx' .* none of the listed"),
        (lambda p: p["artifacts"][0].update(path="."), SchemaError, "'.' .* none of the listed"),
        (
            lambda p: p["artifacts"][1].update(num_inference_steps=5),
            SchemaError,
            r"of \[5\] steps have no sampler",
        ),
        (lambda p: p.update(samplers=[]), SchemaError, r"holds samplers of \[\] steps"),
        (lambda p: p.update(samplers=p["samplers"] * 2), SchemaError, "each number once"),
        (lambda p: p["samplers"][0].update(times=[3.0]), SchemaError, "breaks schema version 2: times are"),
    ],
    ids=range(24),
)
def test_forged_manifests_are_refused(
    change: Callable[[dict[str, Any]], object], error: type[BundleError], message: str, bundle_copy: Path
) -> None:
    forge(bundle_copy, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle_copy, verify="none")
    assert caught.type is error


@pytest.mark.parametrize("verify", ["none", "digest"])
def test_a_link_out_of_the_bundle_is_refused(verify: Any, bundle_copy: Path) -> None:
    outside = bundle_copy.parent / "outside"
    shutil.move(bundle_copy / "denoiser", outside)
    (bundle_copy / "denoiser").symlink_to(outside)
    with pytest.raises(BundleError, match="is a link that leads out of"):
        Bundle.open(bundle_copy, verify=verify)


def test_a_forged_tensor_header_is_refused(tmp_path: Path, toy: Any) -> None:
    """The digest fits, so that only the library's own check is left."""
    header = b'{"w":{"dtype":"F32","shape":[9999999],"data_offsets":[0,8]}}'
    for name, content in {
        "short": len(header).to_bytes(8, "little") + header + b"\0" * 8,
        "pickle": b"\x80\x04K.",
    }.items():
        with publish_bundle(tmp_path / name) as folder:
            toy.fill(folder)
            (folder / WEIGHTS).write_bytes(content)
            write_bundle(folder, name="x", samplers=toy.specs, artifacts=[toy.checkpoint])
        with pytest.raises(IntegrityError, match=f"{WEIGHTS} is no valid safetensors file"):
            Bundle.open(tmp_path / name)
