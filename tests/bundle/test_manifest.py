"""The manifest as text: what it reads back, and what it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.toy_bundles import parity_record
from scm_sdk.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Artifact, FileEntry, Manifest
from scm_sdk.bundle.verify import make_build_id, read_manifest, seal
from scm_sdk.errors import BundleError, SchemaError
from scm_sdk.spec import SamplerSpec, default_times

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DIGEST = "0" * 64


def make(**changes: Any) -> Manifest:
    entry = FileEntry(path="onnx/model.onnx", size=3, sha256=DIGEST, role="graph", built_from=("denoiser/x",))
    parity = parity_record("onnx/model.onnx")
    parts: dict[str, Any] = {
        "build_id": "b",
        "name": "avatars",
        "samplers": (SamplerSpec(times=default_times(2), sample_shape=(3, 16, 16)),),
        "artifacts": (Artifact(path="onnx/model.onnx", format="onnx", num_inference_steps=2),),
        "files": (entry,),
        "parity": (parity,),
    }
    return Manifest(**(parts | changes))


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.dictionaries(st.text(), st.text(), max_size=3))
def test_json_gives_back_an_equal_manifest(provenance: dict[str, Any], versions: dict[str, str]) -> None:
    manifest = make(provenance=provenance, versions=versions)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_json_is_for_people_too() -> None:
    lines = make().to_json().decode().splitlines()
    assert lines[:2] == ["{", f'  "schema_version": {SCHEMA_VERSION},']
    assert len(lines) > 50


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(make().to_json()) | changes).encode()


def test_a_newer_schema_says_update() -> None:
    with pytest.raises(SchemaError, match=r"schema version 3, .* up to 2\."):
        Manifest.from_json(changed(schema_version=3, what_we_do_not_know_yet=[1, 2]))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "cannot be read"),
        (b"\x80\x04\x95", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'{"a":' * 100_000, "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", "cannot be read: .*schema_version"),
        (changed(schema_version="1"), "cannot be read"),
        (changed(schema_version=True), "cannot be read"),
        (changed(schema_version=0), "has schema version 0, expected 1 or more"),
        (changed(color="red"), "breaks schema version 2: .*color"),
        (changed(name=3), r"breaks schema version 2: .*name"),
        (changed(name="x").replace(b'"x"', b'"\xff"'), "breaks schema version 2"),
        (changed(samplers=[{"times": [9.0], "sample_shape": [3]}]), "breaks schema version 2: times are"),
        (changed(artifacts=[{"path": "x", "format": "pickle"}]), "breaks schema version 2: .*pickle"),
        (
            changed(files=[{"path": "x", "size": 1.5, "sha256": "", "role": "graph"}]),
            "breaks schema version 2",
        ),
        (make().to_json()[:-9], "cannot be read"),
        (make().to_json().replace(b'"name"', b'"name": "x", "name"'), "breaks schema .* the key 'name' stands twice"),
        (changed(provenance={"a": {"key": 1}}).replace(b'"key"', b'"key": 2, "\\u006bey"'), "breaks .* 'key' stands"),
    ],
    ids=range(19),
)
def test_other_text_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(SchemaError, match=f"scm_manifest.json {message}"):
        Manifest.from_json(data)


@given(st.data())
def test_any_bytes_give_a_manifest_or_a_schema_error(data: st.DataObject) -> None:
    good = make().to_json()
    cut = data.draw(st.integers(0, len(good)))
    junk = data.draw(st.binary(max_size=4))
    try:
        manifest = Manifest.from_json(good[:cut] + junk + good[cut + data.draw(st.integers(0, 9)) :])
    except SchemaError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_byte_that_changed_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """At every position: one bit, the case, another digit, letter or space, which JSON may well accept."""
    entry = FileEntry(path="onnx/model.onnx", size=3, sha256=DIGEST, role="graph")
    manifest = seal(make(files=(entry,), provenance={"license": "CC0-1.0", "rate": 1e-05, "runs": [1, {"seed": 0}]}))
    good = manifest.to_json()
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(good)
    refused = harmless = 0
    with path.open("r+b", buffering=0) as stream:
        for at, byte in enumerate(good):
            for other in {byte ^ 1, byte ^ 32, *b"1e ,"} - {byte}:
                os.pwrite(stream.fileno(), bytes([other]), at)
                try:
                    read = read_manifest(tmp_path)
                except BundleError as exc:
                    assert MANIFEST_NAME in str(exc)
                    refused += 1
                else:
                    assert read == manifest
                    harmless += 1
            os.pwrite(stream.fileno(), bytes([byte]), at)
    assert refused > harmless > 0, "white space, and 1E-05 for 1e-05"


def test_a_field_that_a_later_schema_adds_leaves_the_ids_of_older_bundles() -> None:
    """A golden value: a change makes every existing bundle appear altered."""
    manifest = make(samplers=(SamplerSpec(times=(1.5, 0.5), sample_shape=(3, 16, 16)),))
    assert make_build_id(manifest) == "19fe5c389ed2cb8d89fe12be15c3215100ba1235e5aca60c7a296e02707a129d"
    other = make(samplers=(SamplerSpec(times=(1.5, 0.5), sample_shape=(3, 16, 16), sigma_data=0.25),))
    assert make_build_id(other) != make_build_id(manifest)
