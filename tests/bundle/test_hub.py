"""Models by hub id: which texts are one, and from the cache alone. No network outside this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.hub_fixtures import COMMIT, WEIGHTS, contents, put_in_cache
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.hub import fetch, is_repo_id
from scm_sdk.errors import BackendUnavailable, BundleError, ConfigError, IntegrityError
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel

pytestmark = pytest.mark.usefixtures("hub_cache")


def open_it(path, **options):
    return Generator.from_pretrained(path, backend="onnxruntime", **options)


# From the cache


def test_a_bundle_in_the_cache(hub_cache, linear, offline):
    snapshot = put_in_cache(hub_cache, "someone/linear", contents(linear))
    with (
        open_it("hf:someone/linear") as gen,
        open_it(linear) as here,
    ):
        assert gen.source.path == snapshot
        assert (gen(seed=3, output_type="raw").images == here(seed=3, output_type="raw").images).all()
        gen.reopen(num_threads=1).close()


def test_a_checkpoint_in_the_cache(hub_cache, unet_checkpoint, offline):
    put_in_cache(hub_cache, "someone/unet", contents(unet_checkpoint))
    there, here = ConsistencyModel.from_pretrained("hf:someone/unet"), ConsistencyModel.from_pretrained(unet_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(there.parameters(), here.parameters(), strict=True))


def test_a_revision_in_the_cache(hub_cache, linear, offline):
    put_in_cache(hub_cache, "someone/linear", contents(linear), ref="v1")
    assert fetch("someone/linear", revision="v1") == fetch("someone/linear", revision=COMMIT)
    with pytest.raises(BundleError, match="hf:someone/linear is not in the hub's cache"):
        fetch("someone/linear")
    with pytest.raises(BundleError, match="hf:someone/linear@v2 is not"):
        fetch("someone/linear", revision="v2")


@pytest.mark.parametrize("target", ["../../../elsewhere", "{absolute}", "../refs", "link"])
def test_a_ref_that_leads_out_of_the_snapshots(hub_cache, linear, offline, target):
    snapshot = put_in_cache(hub_cache, "someone/linear", contents(linear))
    (hub_cache / "elsewhere").symlink_to(linear)
    (snapshot.parent / "link").symlink_to(linear)
    (snapshot.parents[1] / "refs" / "main").write_text(target.format(absolute=linear), encoding="utf-8")
    with pytest.raises(
        BundleError, match=r"leads to .* in the hub's cache, expected a folder in .*snapshots|is not in"
    ):
        fetch("someone/linear")


def test_the_cache_alone_by_argument(hub_cache, linear, hub):
    put_in_cache(hub_cache, "someone/linear", contents(linear))
    open_it("hf:someone/linear", local_files_only=True).close()
    assert hub.asked == []


def test_offline_and_not_there(offline):
    with pytest.raises(BundleError, match=r"only the cache may be read \(offline\).*HF_HUB_OFFLINE"):
        Generator.from_pretrained("hf:someone/absent")


def test_no_network_falls_back_to_the_cache(hub_cache, linear):
    put_in_cache(hub_cache, "someone/linear", contents(linear))
    open_it("hf:someone/linear").close()
    with pytest.raises(BundleError, match=r"not in the hub's cache, and the hub cannot be reached"):
        fetch("someone/absent")


def test_an_incomplete_snapshot_is_named(hub_cache, linear, offline):
    files = contents(linear)
    files.pop("onnx/fp32/1step/model.onnx")
    put_in_cache(hub_cache, "someone/linear", files)
    with pytest.raises(IntegrityError, match=r"model\.onnx is missing.* not whole in the cache"):
        fetch("someone/linear")


def test_pickles_in_the_cache_are_no_model(hub_cache, offline):
    put_in_cache(hub_cache, "someone/pickles", {"model.pkl": b"cos\nsystem\n", "pytorch_model.bin": b"x"})
    with pytest.raises(BundleError, match=r"holds none of scm_manifest\.json.* Pickles are never read from a hub"):
        fetch("someone/pickles")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_link_out_of_the_cache_is_refused(hub_cache, unet_checkpoint, offline, tmp_path, name):
    snapshot = put_in_cache(hub_cache, "someone/unet", contents(unet_checkpoint))
    secret = tmp_path / "secret"
    secret.write_text("{}", encoding="utf-8")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(secret)
    with pytest.raises(BundleError, match="is a link that leads out of"):
        ConsistencyModel.from_pretrained("hf:someone/unet")


def test_a_bundle_with_a_link_to_another_repositorys_files(hub_cache, linear, offline):
    other = put_in_cache(hub_cache, "someone/private", {"config.json": b"secret"})
    snapshot = put_in_cache(hub_cache, "someone/linear", contents(linear))
    (snapshot / "onnx/fp32/1step/model.onnx").unlink()
    (snapshot / "onnx/fp32/1step/model.onnx").symlink_to(other / "config.json")
    with pytest.raises(BundleError, match="leads out of"):
        Bundle.open(snapshot)


# Which texts are hub ids


@pytest.mark.parametrize("loader", [Generator, ConsistencyModel])
def test_a_path_is_never_asked_for_in_public(hub, linear, loader):
    hub.repos["runs/avatars"] = contents(linear)  # a registered name that looks like a path
    for path in ("runs/avatars", Path("runs/avatars"), "./runs/x", "/nowhere/x", "a/b/c", "runs", "-x/y", "x/..", "x/"):
        with pytest.raises(BundleError, match=r"does not exist|holds neither"):
            loader.from_pretrained(path)
    with pytest.raises(BundleError, match=r"runs/avatars does not exist.*write hf:runs/avatars"):
        loader.from_pretrained("runs/avatars")
    assert hub.asked == []


def test_a_revision_asks_the_hub(hub, linear):
    hub.repos["someone/linear"] = contents(linear)
    commit = hub.sha("someone/linear")
    with open_it("someone/linear", revision=commit) as plain, open_it("hf:someone/linear", revision=commit) as named:
        assert plain.source.path == named.source.path


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/b/c", "hf:../b", "hf:a/b@main"])
def test_a_malformed_id_is_refused(hub, text):
    with pytest.raises(ConfigError, match="expected 'owner/name'"):
        Generator.from_pretrained(text)
    assert hub.asked == []


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
    with pytest.raises(BackendUnavailable, match=r"hf:someone/linear needs huggingface_hub.*huggingface_hub"):
        Generator.from_pretrained("hf:someone/linear")


def test_nothing_of_it_is_imported_for_a_folder(linear):
    code = (
        "import sys; from scm_sdk import Generator; "
        f"Generator.from_pretrained({str(linear)!r}, backend='onnxruntime').close(); "
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
