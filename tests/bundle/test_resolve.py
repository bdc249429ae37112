"""Commands take hub ids with ``--revision`` and ``.scmz`` files; bundles that are in a cache are never written to."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import invoke
from helpers.hub_fixtures import COMMIT, contents, put_in_cache
from scm_sdk.bundle.archive import pack
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import MANIFEST_NAME
from scm_sdk.bundle.resolve import locate
from scm_sdk.bundle.verify import in_cache
from scm_sdk.errors import BundleError
from scm_sdk.evaluate.stored_budgets import keep_budgets

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def snapshot(hub_cache: Path, linear: Path) -> Path:
    """A bundle in the hub's cache as someone/linear, revision v1."""
    made: Path = put_in_cache(hub_cache, "someone/linear", contents(linear), ref="v1")
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{}", "--json"), ("bundle", "verify", "{}", "--json"), ("doctor", "{}", "--json"),
        ("generate", "{}", "--backend", "onnxruntime", "--plan", "--json"),
    ],
)  # fmt: skip
def test_a_revision_of_a_hub_id_is_taken(snapshot: Path, arguments: tuple[str, ...]) -> None:
    filled = [each.format("hf:someone/linear") for each in arguments]
    done = invoke(*filled, "--revision", "v1")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) and f"hf:someone/linear@v1 is {snapshot}" in done.stderr.replace("\n", "")
    missing = invoke(*filled, "--revision", "v2")
    assert missing.exit_code == 6 and "hf:someone/linear@v2 is not in the hub's cache" in missing.output
    assert invoke(*filled).exit_code == 6, "main is not in the cache"


def test_pictures_of_a_commit(snapshot: Path, tmp_path: Path) -> None:
    arguments = ["--num-images", 1, "--seed", 3, "--backend", "onnxruntime"]
    done = invoke("generate", "hf:someone/linear", "--revision", COMMIT, *arguments, "-o", tmp_path / "a.png")
    assert done.exit_code == 0 and (tmp_path / "a.png").is_file(), done.output


@pytest.mark.parametrize("arguments", [("generate",), ("inspect",), ("validate",), ("all", "-o", "x"), ("bench",)])
def test_a_revision_of_a_folder_is_refused(linear: Path, arguments: tuple[str, ...]) -> None:
    done = invoke(*arguments, linear, "--revision", "v1")
    assert done.exit_code == 2 and "is no hub id (hf:owner/name). Leave the revision out" in done.output


def test_a_revision_of_nothing_and_of_a_pickle_is_refused(tmp_path: Path) -> None:
    assert "without BUNDLE" in invoke("doctor", "--revision", "v1").output
    (tmp_path / "net.pkl").write_bytes(b"x")
    done = invoke("import", tmp_path / "net.pkl", "-o", tmp_path / "out", "--revision", "v1")
    assert done.exit_code == 2 and "expected a hub id for it" in done.output


def test_an_import_fetches_a_pipeline(hub_cache: Path, tmp_path: Path) -> None:
    put_in_cache(hub_cache, "someone/other", {"model_index.json": b'{"_class_name": "FluxPipeline"}'})
    done = invoke("import", "hf:someone/other", "-o", tmp_path / "out")
    assert done.exit_code == 2 and "is a 'FluxPipeline' of diffusers, expected one of SanaSprintPipeline" in done.output
    assert not (tmp_path / "out").exists()


def test_a_bundle_in_the_hubs_cache_is_compared_and_not_written_to(
    hub_cache: Path, unet_bundle: Path, tmp_path: Path
) -> None:
    snapshot = put_in_cache(hub_cache, "someone/unet", contents(unet_bundle))
    before = contents(hub_cache)
    done = invoke(
        "validate", "hf:someone/unet", "--backend", "onnxruntime", "--steps", 1, "--num-seeds", 2, "--batch", 1
    )
    assert done.exit_code == 0 and "nothing was recorded" in done.output, done.output
    assert contents(hub_cache) == before
    for write in (
        lambda: Bundle.open(snapshot).with_budgets("p95=1s@b1"),
        lambda: keep_budgets(snapshot, "p95=1s@b1"),
        lambda: extend_bundle(snapshot).__enter__(),
    ):
        with pytest.raises(BundleError, match="is in a cache, expected a bundle of your own"):
            write()
    refused = invoke("bench", "hf:someone/unet", "--budget", "p95=1s@b1", "--keep-budget", "--batch", 1)
    assert refused.exit_code == 6 and "scm-export bundle unpack MODEL -o FOLDER" in refused.output
    assert contents(hub_cache) == before
    copied = invoke("bundle", "unpack", "hf:someone/unet", "-o", tmp_path / "mine")
    assert copied.exit_code == 0 and not in_cache(tmp_path / "mine"), copied.output
    assert contents(tmp_path / "mine") == contents(unet_bundle)
    assert not (tmp_path / "mine" / MANIFEST_NAME).is_symlink()


def test_an_unpacked_archive_is_not_written_to(linear: Path, tmp_path: Path) -> None:
    archive = pack(linear, tmp_path / "linear.scmz")
    assert invoke("inspect", archive, "--json").exit_code == 0
    folder = locate(archive)
    assert in_cache(folder) and not in_cache(linear)
    with pytest.raises(BundleError, match="is in a cache"), extend_bundle(folder):
        pass


@pytest.mark.slow
def test_an_import_by_hub_id_records_the_commit(hub_cache: Path, sana_folder: Path, tmp_path: Path) -> None:
    put_in_cache(hub_cache, "someone/sana", contents(sana_folder), ref="v1")
    arguments: list[Any] = ["--size", 32, "--tokens", 16, "--max-batch", 1, "--steps", 1]
    done = invoke("import", "hf:someone/sana", "--revision", "v1", "-o", tmp_path / "out", *arguments)
    assert done.exit_code == 0, done.output
    assert Bundle.open(tmp_path / "out").manifest.provenance["source"] == f"hf:someone/sana@{COMMIT}"


def test_no_path_is_not_the_current_folder(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(linear)
    with pytest.raises(BundleError, match="the path is empty, expected a folder"):
        locate("")


def test_a_mistyped_path_is_a_path(tmp_path: Path) -> None:
    done = invoke("inspect", "runs/avatars")
    assert done.exit_code == 6 and "runs/avatars does not exist" in done.output and "hf:runs/avatars" in done.output
