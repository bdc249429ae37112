"""Models by hub id: from the cache alone, from a server over HTTP, and to it. No network outside this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hub_server import hub_server
from scm_sdk.bundle import Bundle
from scm_sdk.errors import BackendUnavailable, BundleError, ConfigError, IntegrityError, ScmError
from scm_sdk.generator import Generator
from scm_sdk.hub import fetch, is_repo_id, push
from scm_sdk.manifest import MANIFEST_NAME
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.spec import SamplerSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def open_it(path, **options):
    return Generator.from_pretrained(path, backend="onnxruntime", **options)


def point_at(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no way out: what would leave this machine ends at once."""
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def server(monkeypatch):
    """A hub of our own."""
    with hub_server() as running:
        point_at(monkeypatch, running.url)
        yield running


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def linear(linear_bundle):
    return linear_bundle(SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4)))


def put_in_cache(cache, repo_id, files, *, ref="main"):
    """Lay files out as huggingface_hub does: blobs by hash, and a snapshot of links to them."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(COMMIT)
    for number, (name, data) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


# From the cache


def test_a_bundle_in_the_cache(cache, linear, offline):
    snapshot = put_in_cache(cache, "someone/linear", contents(linear))
    with (
        open_it("someone/linear") as gen,
        open_it(linear) as here,
    ):
        assert gen.source.path == snapshot
        assert (gen(seed=3, output_type="raw").images == here(seed=3, output_type="raw").images).all()
        gen.reopen(num_threads=1).close()


def test_a_checkpoint_in_the_cache(cache, unet_checkpoint, offline):
    put_in_cache(cache, "someone/unet", contents(unet_checkpoint))
    there, here = ConsistencyModel.from_pretrained("someone/unet"), ConsistencyModel.from_pretrained(unet_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(there.parameters(), here.parameters(), strict=True))


def test_a_revision_in_the_cache(cache, linear, offline):
    put_in_cache(cache, "someone/linear", contents(linear), ref="v1")
    assert fetch("someone/linear", revision="v1") == fetch("someone/linear", revision=COMMIT)
    with pytest.raises(BundleError, match="someone/linear is neither a folder here nor in the cache"):
        fetch("someone/linear")
    with pytest.raises(BundleError, match="someone/linear@v2 is neither"):
        fetch("someone/linear", revision="v2")


def test_the_cache_alone_by_argument(cache, linear, server):
    put_in_cache(cache, "someone/linear", contents(linear))
    open_it("someone/linear", local_files_only=True).close()
    assert server.asked == []


def test_offline_and_not_there(offline):
    with pytest.raises(BundleError, match=r"only the cache may be asked \(offline\).*HF_HUB_OFFLINE"):
        Generator.from_pretrained("someone/absent")


def test_no_network_falls_back_to_the_cache(cache, linear):
    put_in_cache(cache, "someone/linear", contents(linear))
    open_it("someone/linear").close()
    with pytest.raises(BundleError, match=r"nor in the cache of the hub, and the hub cannot be reached \(Connect"):
        fetch("someone/absent")


def test_an_incomplete_snapshot_is_named(cache, linear, offline):
    files = contents(linear)
    files.pop("onnx/fp32/1step/model.onnx")
    put_in_cache(cache, "someone/linear", files)
    with pytest.raises(IntegrityError, match=r"model\.onnx is missing.* not whole in the cache"):
        fetch("someone/linear")


def test_pickles_in_the_cache_are_no_model(cache, offline):
    put_in_cache(cache, "someone/pickles", {"model.pkl": b"cos\nsystem\n", "pytorch_model.bin": b"x"})
    with pytest.raises(BundleError, match=r"holds none of scm_manifest\.json.* Pickles are never read from a hub"):
        fetch("someone/pickles")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_link_out_of_the_cache_is_refused(cache, unet_checkpoint, offline, tmp_path, name):
    snapshot = put_in_cache(cache, "someone/unet", contents(unet_checkpoint))
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(secret)
    with pytest.raises(BundleError, match="is a link that leads out of"):
        ConsistencyModel.from_pretrained("someone/unet")


def test_a_bundle_with_a_link_to_another_repositorys_files(cache, linear, offline):
    other = put_in_cache(cache, "someone/private", {"config.json": b"secret"})
    snapshot = put_in_cache(cache, "someone/linear", contents(linear))
    (snapshot / "onnx/fp32/1step/model.onnx").unlink()
    (snapshot / "onnx/fp32/1step/model.onnx").symlink_to(other / "config.json")
    with pytest.raises(BundleError, match="leads out of"):
        Bundle.open(snapshot)


# Which texts are hub ids


def test_a_mistyped_path_is_not_asked_for_in_public(server, tmp_path):
    (tmp_path / "runs").mkdir()
    for path in ("runs/avatarz", "./runs/x", "/nowhere/x", "a/b/c", "runs", "-x/y", "x/..", "x/"):
        with pytest.raises(BundleError, match=r"does not exist|holds neither"):
            Generator.from_pretrained(path)
    assert server.asked == []


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("a/b", True), ("a-b.c/D_1", True), ("a", False), ("a/b/c", False), ("../b", False), ("a/..", False),
        ("a/b@c", False), ("a\n/b", False),
    ],
)  # fmt: skip
def test_ids(text, is_id):
    assert is_repo_id(text) == is_id


def test_bad_revisions():
    for revision in ("../../etc", "a b", "", "-x", "a\nb"):
        with pytest.raises(ConfigError, match="expected a branch, a tag or a commit"):
            fetch("someone/linear", revision=revision)


def test_a_revision_of_a_folder_is_refused(linear):
    with pytest.raises(ConfigError, match="is no hub id"):
        Generator.from_pretrained(linear, revision="main")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendUnavailable, match=r"hub id 'someone/linear' needs huggingface_hub.*scm-sdk\[hub\]"):
        Generator.from_pretrained("someone/linear")


def test_nothing_of_it_is_imported_for_a_folder(linear):
    code = (
        "import sys; from scm_sdk import Generator; "
        f"Generator.from_pretrained({str(linear)!r}, backend='onnxruntime').close(); "
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Over HTTP


def test_a_bundle_from_a_server(server, linear, tmp_path):
    server.repos["someone/linear"] = contents(linear) | {"evil.pkl": b"cos\nsystem\n", "train.py": b"boom"}
    with open_it("someone/linear") as gen:
        assert gen(seed=1, output_type="raw").images.shape == (1, 3, 4, 4)
        assert not (gen.source.path / "evil.pkl").exists()
    assert not [line for line in server.asked if "evil.pkl" in line or "train.py" in line]
    asked = len(server.asked)
    assert fetch("someone/linear", local_files_only=True) == fetch(
        "someone/linear", revision=server.sha("someone/linear")
    )
    assert len(server.asked) - asked <= 3, "what is in the cache is not fetched again"


def test_names_with_wildcards_fetch_themselves_alone(server, toy, tmp_path):
    toy.export(tmp_path / "toy")
    files = contents(tmp_path / "toy")
    server.repos["someone/toy"] = files | {"reports/parity-2.json": b"not listed", "reports/[x].json": b"{}"}
    fetch("someone/toy")
    assert not [line for line in server.asked if "parity-2" in line]


def test_what_the_server_says(server, linear):
    server.repos["someone/linear"] = contents(linear)
    with pytest.raises(BundleError, match="someone/absent is neither a folder here nor a repository of the hub"):
        Generator.from_pretrained("someone/absent")
    with pytest.raises(BundleError, match="someone/linear@v9: the repository is there, this revision is not"):
        Generator.from_pretrained("someone/linear", revision="v9")
    server.repos["someone/pickles"] = {"model.ckpt": b"x"}
    with pytest.raises(BundleError, match=r"expected a bundle or a checkpoint; it holds model\.ckpt"):
        Generator.from_pretrained("someone/pickles")


def test_files_that_are_not_as_listed(server, linear):
    name = "onnx/fp32/1step/model.onnx"
    server.repos["someone/linear"] = contents(linear)
    server.claimed_sizes[name] = 10**12
    with pytest.raises(IntegrityError, match=r"model\.onnx has 1000000000000 bytes, its manifest lists"):
        fetch("someone/linear")
    server.claimed_sizes.clear()
    server.repos["someone/linear"].pop(name)
    with pytest.raises(IntegrityError, match=r"model\.onnx is not there"):
        fetch("someone/linear")
    data = bytearray(contents(linear)[name])
    data[-1] ^= 1
    server.repos["someone/linear"][name] = bytes(data)
    with pytest.raises(IntegrityError, match="was altered or damaged"):
        Generator.from_pretrained("someone/linear")
    assert not [line for line in server.asked[:4] if name in line], "sizes are compared before anything is fetched"


def test_sizes_are_capped(server, linear, unet_checkpoint):
    server.repos["someone/linear"] = contents(linear)
    with pytest.raises(BundleError, match="expected at most 4096 files and 1000 bytes"):
        fetch("someone/linear", max_bytes=1000)
    server.claimed_sizes[MANIFEST_NAME] = 1 << 40
    with pytest.raises(BundleError, match=r"scm_manifest\.json has 1099511627776 bytes, more than any model needs"):
        fetch("someone/linear")
    server.repos["someone/unet"] = contents(unet_checkpoint)
    server.claimed_sizes["config.json"] = 1 << 30
    with pytest.raises(BundleError, match=r"config\.json has 1073741824 bytes"):
        fetch("someone/unet")
    assert not [line for line in server.asked if "/resolve/" in line and "scm_manifest" not in line]


@pytest.mark.parametrize("path", ["../../escaped", "/etc/escaped", "a\\..\\escaped"])
def test_a_manifest_whose_paths_lead_out(server, linear, path):
    files = contents(linear)
    manifest = json.loads(files[MANIFEST_NAME])
    manifest["files"][0]["path"] = path
    server.repos["someone/linear"] = files | {MANIFEST_NAME: json.dumps(manifest).encode(), path: b"x"}
    with pytest.raises(ScmError):
        fetch("someone/linear")
    assert not [line for line in server.asked if "escaped" in line]


# Pushing


def test_a_bundle_goes_there_and_back(server, linear):
    (linear / "notes.txt").write_text("not listed: it stays here")
    address = Bundle.open(linear).push_to_hub("me/linear", message="First")
    assert address.startswith(f"{server.url}/me/linear/commit/")
    assert server.repos["me/linear"] == {n: d for n, d in contents(linear).items() if n != "notes.txt"}
    with open_it("me/linear") as gen:
        assert gen.source.build_id == Bundle.open(linear).manifest.build_id


def test_a_model_goes_there_and_back_with_its_card(server, unet_checkpoint):
    model = ConsistencyModel.from_pretrained(unet_checkpoint)
    model.push_to_hub("me/unet")
    assert set(server.repos["me/unet"]) == {"config.json", WEIGHTS, "README.md"}
    card = server.repos["me/unet"]["README.md"].decode()
    assert 'Generator.from_pretrained("me/unet")' in card
    again = ConsistencyModel.from_pretrained("me/unet")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_pushing_without_a_network_says_so(linear):
    with pytest.raises(BundleError, match=r"me/linear could not be filled: Connect.*Nothing was committed"):
        Bundle.open(linear).push_to_hub("me/linear")
    with pytest.raises(ConfigError, match="expected 'owner/name'"):
        Bundle.open(linear).push_to_hub("linear")


def test_a_damaged_bundle_is_not_pushed(server, linear):
    opened = Bundle.open(linear)
    (linear / "onnx/fp32/1step/model.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        opened.push_to_hub("me/linear")
    assert server.asked == []


def test_links_are_not_followed_when_pushing(server, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="leads out of"):
        push(tmp_path / "out", ["config.json"], "me/x")
    assert server.asked == []


def test_save_pretrained_copies_what_is_listed(linear, tmp_path):
    (linear / "notes.txt").write_text("not listed")
    copy = Bundle.open(linear).save_pretrained(tmp_path / "copy")
    assert contents(copy.path) == {n: d for n, d in contents(linear).items() if n != "notes.txt"}
    with pytest.raises(BundleError, match="exists and is not empty"):
        Bundle.open(linear).save_pretrained(tmp_path / "copy")
