"""A hub of our own and an empty cache for it: what the tests of hub ids share. No network outside this machine."""

import os
from pathlib import Path

import pytest

from helpers.hub_server import hub_server
from scm_sdk.spec import SamplerSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def point_at(monkeypatch, url):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and no way out: what would leave this machine ends at once."""
    from huggingface_hub import constants

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
def hub(monkeypatch, hub_cache):
    """A hub of our own."""
    with hub_server() as running:
        point_at(monkeypatch, running.url)
        yield running


@pytest.fixture
def offline(monkeypatch, hub_cache):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def linear(linear_bundle):
    return linear_bundle(SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4)))


def put_in_cache(cache, repo_id, files, *, ref="main"):
    """Store files as huggingface_hub does: blobs by hash, and a snapshot of links to them."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(COMMIT, encoding="utf-8")
    for number, (name, data) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot
