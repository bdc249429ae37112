"""``.scmz``: a bundle as one file, and what a hostile one cannot do."""

import os
import random
import shutil
import stat
import struct
import tracemalloc
import warnings
import zipfile

import msgspec
import pytest
from click.testing import CliRunner

from scm_sdk.bundle import archive
from scm_sdk.bundle.archive import pack, unpack
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import MANIFEST_NAME, Manifest
from scm_sdk.bundle.verify import seal
from scm_sdk.errors import BundleError, IntegrityError, ScmError
from scm_sdk.export.cli import main
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec


@pytest.fixture
def packed(made_bundle, tmp_path):
    return pack(made_bundle, tmp_path / "toy.scmz")


def rewritten(packed, change):
    """Copy an archive member by member; ``change(info, data)`` returns the members to write in its place."""
    out = packed.with_name("hostile.scmz")
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            for member, data in change(info, source.read(info)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # a name that is there twice
                    target.writestr(member, data)
    return out


def refused(path, tmp_path, match, error=BundleError):
    with pytest.raises(error, match=match):
        unpack(path, tmp_path / "out" / "bundle")
    assert not (tmp_path / "out" / "bundle").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name == "escaped"]


def test_it_comes_back_as_it_was(made_bundle, packed, tmp_path):
    unpack(packed, tmp_path / "again")
    files = {p.relative_to(made_bundle): p.read_bytes() for p in made_bundle.rglob("*") if p.is_file()}
    assert {
        p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()
    } == files
    Bundle.open(tmp_path / "again").verify()


def test_the_same_bundle_gives_the_same_bytes(made_bundle, packed, tmp_path):
    copy = shutil.copytree(made_bundle, tmp_path / "elsewhere")
    (copy / "notes.pkl").write_bytes(b"not listed, so it stays here")
    assert pack(copy, tmp_path / "other.scmz").read_bytes() == packed.read_bytes()


def test_a_generator_opens_it(linear_bundle, tmp_path, cache_home):
    spec = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))
    file = pack(linear_bundle(spec), tmp_path / "linear.scmz")
    for _ in range(2):
        with Generator.from_pretrained(file, backend="onnxruntime") as gen:
            assert gen(2, seed=1, output_type="raw").images.shape == (2, 3, 4, 4)
    assert len(list((cache_home / "scm-sdk" / "unpacked").iterdir())) == 1, "unpacked once"


def test_the_verbs(made_bundle, tmp_path):
    run = CliRunner().invoke
    file, out = str(tmp_path / "t.scmz"), str(tmp_path / "out")
    assert run(main, ["bundle", "pack", str(made_bundle), "-o", file]).exit_code == 0
    assert run(main, ["bundle", "unpack", file, "-o", out]).exit_code == 0
    again = run(main, ["bundle", "unpack", file, "-o", out])
    assert again.exit_code == 6 and "exists and is not empty" in again.stderr
    assert run(main, ["bundle", "unpack", file, "-o", out, "--overwrite"]).exit_code == 0


@pytest.mark.parametrize(
    "name", ["../escaped", "/tmp/escaped", "a/../../escaped", "a\\..\\escaped", "C:escaped", "a\nb"]
)
def test_paths_that_lead_out(packed, tmp_path, name):
    bad = rewritten(packed, lambda info, data: [(name if info.filename == "README.md" else info, data)])
    refused(bad, tmp_path, "is not allowed")


def test_links(packed, tmp_path):
    def link(info, data):
        if info.filename == "README.md":
            info.external_attr, data = (stat.S_IFLNK | 0o777) << 16, b"/etc/passwd"
        return [(info, data)]

    refused(rewritten(packed, link), tmp_path, "README.md is compressed, encrypted or a link")


def test_compressed_members(packed, tmp_path):
    def bomb(info, data):
        if info.filename == "README.md":
            info.compress_type, data = zipfile.ZIP_DEFLATED, b"0" * 10_000_000
        return [(info, data)]

    refused(rewritten(packed, bomb), tmp_path, "README.md is compressed")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i, d: [(i, d), ("extra.pkl", b"x")] if i.filename == MANIFEST_NAME else [(i, d)], "extra.pkl"),
        (lambda i, d: [] if i.filename == "README.md" else [(i, d)], "README.md"),
        (lambda i, d: [] if i.filename == MANIFEST_NAME else [(i, d)], "holds no scm_manifest.json"),
        (lambda i, d: [(i, d), (i.filename, d)], "holds a file twice"),
        (lambda i, d: [(i, b"{}" if i.filename == MANIFEST_NAME else d)], "scm_manifest.json"),
        (lambda i, d: [(i, d[::-1] if i.filename == "README.md" else d)], "README.md has sha256"),
    ],
    ids=["extra", "missing", "no_manifest", "twice", "empty_manifest", "altered"],
)
def test_members_are_those_that_the_manifest_lists(packed, tmp_path, change, match):
    refused(rewritten(packed, change), tmp_path, match)


def test_members_that_overlap(packed, tmp_path):
    """Two entries of the directory that point at the same bytes: more comes out than the file holds."""
    data = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as source:
        info = max(source.infolist(), key=lambda each: each.file_size)
    claimed = (len(data)).to_bytes(4, "little")
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(info.filename)] != info.filename.encode():
        at = data.index(b"PK\x01\x02", at + 4)
    data[at + 20 : at + 24] = data[at + 24 : at + 28] = claimed
    (tmp_path / "overlap.scmz").write_bytes(data)
    refused(tmp_path / "overlap.scmz", tmp_path, "would unfold to more bytes than it has")


def test_a_manifest_as_large_as_a_disk(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MANIFEST_MAX_BYTES", 100)
    refused(packed, tmp_path, "its manifest is larger than 100 bytes")


def test_more_members_than_any_bundle(packed, made_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    refused(packed, tmp_path, "expected at most 3")
    with pytest.raises(BundleError, match="expected fewer than 3"):
        pack(made_bundle, tmp_path / "large.scmz")


@pytest.mark.parametrize("claimed", [5, 0xFFFF], ids=["lie", "zip64"])
def test_a_long_list_of_members_is_not_read(tmp_path, claimed):
    """A million members; the short end record may claim five, the long one, which zipfile believes, has them all."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, *[0] * 6) + b"a"
    count, size = 10**6, len(entry) * 10**6
    long_end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, 1)
    place = struct.pack("<4sLQL", b"PK\6\7", 0, size + 1, 1)
    listed = min(claimed * len(entry), 0xFFFFFFFF) if claimed == 5 else 0xFFFFFFFF
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, claimed, claimed, listed, 1 if claimed == 5 else 0xFFFFFFFF, 0)
    (tmp_path / "many.scmz").write_bytes(b"x" + entry * count + long_end + place + end)
    tracemalloc.start()
    try:
        refused(tmp_path / "many.scmz", tmp_path, f"the list of files takes {size} bytes, expected at most 4096")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "match"),
    [("README.md/x", "as a file and as a folder"), ("x" * 256, "is too long"), ("d/" * 2000 + "x", "is too long")],
    ids=["below_a_file", "name", "path"],
)
def test_names_that_no_disk_takes(packed, tmp_path, name, match):
    """Listed in the manifest, too, which is sealed."""

    def change(info, data):
        if info.filename != MANIFEST_NAME:
            return [(info, data)]
        manifest = Manifest.from_json(data)
        files = [*manifest.files, msgspec.structs.replace(manifest.files[0], path=name)]
        return [(info, seal(msgspec.structs.replace(manifest, files=tuple(files))).to_json()), (name, b"")]

    refused(rewritten(packed, change), tmp_path, match)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.scmz")
    (tmp_path / "folder.scmz").mkdir()
    for name in ("pipe.scmz", "folder.scmz"):
        refused(tmp_path / name, tmp_path, f"{name} cannot be read: Not a plain file")
        done = CliRunner().invoke(main, ["bundle", "unpack", str(tmp_path / name), "-o", str(tmp_path / "out")])
        assert done.exit_code == 6 and "Traceback" not in done.stderr


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_damage_ends_in_our_errors(packed, tmp_path, count):
    """Some bytes of a small archive changed, or a part of it cut out or doubled."""
    good = packed.read_bytes()
    draw = random.Random(count)
    damaged = tmp_path / "damaged.scmz"
    directory = good.index(b"PK\1\2")
    for _ in range(count):
        data = bytearray(good)
        start = draw.choice([0, directory, len(good) - 22])  # the parts that say where the others are, too
        at = draw.randrange(start, len(good))
        kind = draw.randrange(4)
        if kind == 0:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 1:
            data[at:at] = data[at : at + draw.randrange(1, 40)]
        else:
            for _ in range(draw.randrange(1, 4)):
                data[draw.randrange(start, len(data))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        damaged.write_bytes(data)
        try:
            unpack(damaged, tmp_path / "out", overwrite=True)
        except BundleError as exc:
            assert "damaged.scmz" in str(exc) or MANIFEST_NAME in str(exc) or "path" in str(exc)
        else:
            Bundle.open(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"toy.scmz", "damaged.scmz", "out"}, "nothing is left behind"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.99])
def test_truncated(packed, tmp_path, keep):
    data = packed.read_bytes()
    (tmp_path / "short.scmz").write_bytes(data[: int(len(data) * keep)])
    refused(tmp_path / "short.scmz", tmp_path, "is damaged or no .scmz file", ScmError)


def test_a_byte_that_turned(packed, tmp_path):
    data = bytearray(packed.read_bytes())
    data[data.index(b"# A model card") + 3] ^= 1
    (tmp_path / "turned.scmz").write_bytes(data)
    refused(tmp_path / "turned.scmz", tmp_path, "is damaged", IntegrityError)


def test_a_damaged_bundle_is_not_packed(bundle_copy, tmp_path):
    (bundle_copy / "README.md").write_text("x", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        pack(bundle_copy, tmp_path / "toy.scmz")
    assert not (tmp_path / "toy.scmz").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_what_is_there_is_named(tmp_path, made_bundle):
    with pytest.raises(BundleError, match="does not exist"):
        unpack(tmp_path / "absent.scmz", tmp_path / "out")
    with pytest.raises(BundleError, match="is a folder"):
        pack(made_bundle, tmp_path)
