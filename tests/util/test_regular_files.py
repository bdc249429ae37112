"""Pipes, folders and devices in place of files end in an error that names them: nothing waits, nothing fills memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.small_runs import config
from scm_sdk.bundle.goldens import check_safetensors, read_goldens
from scm_sdk.bundle.layout import CONFIG_MAX_BYTES, CONFIG_NAME, WEIGHTS_NAME
from scm_sdk.errors import IntegrityError, ScmError
from scm_sdk.model.checkpoint import read_config, read_tensors
from scm_sdk.model.foreign.component import read_json
from scm_sdk.pickles.network import read_network
from scm_sdk.train.averages.posthoc import reconstruct
from scm_sdk.train.config import DataConfig
from scm_sdk.train.data.images import load_data
from scm_sdk.train.loop import train
from scm_sdk.train.record import read_run, recorded

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
KINDS = ("pipe", "folder", "device")
READERS: dict[str, Callable[[Path], object]] = {
    CONFIG_NAME: read_config,
    WEIGHTS_NAME: read_tensors,
    "model_index.json": read_json,
    "golden.safetensors": lambda path: read_goldens(path, ()),
    "graph.safetensors": check_safetensors,
    "network.pkl": read_network,
    "train.json": lambda path: read_run(path.parent),
    "images.npz": lambda path: load_data(DataConfig(source=str(path))),
    "images.npy": lambda path: load_data(DataConfig(source=str(path))),
    "shard.npz": lambda path: load_data(DataConfig(source=str(path.parent))),
    "shard.tar": lambda path: load_data(DataConfig(source=str(path.parent))),
}


def put(path: Path, kind: str) -> None:
    """Put a pipe, a folder or an endless device in place of a file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)

        # Who opens it is let go at once, so that a fault fails the test and does not hang it.
        def write_nothing() -> None:
            with suppress(OSError):  # the pipe may be gone, or another test another user, when it is opened at last
                open(path, "wb").close()

        threading.Thread(target=write_nothing, daemon=True).start()
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/full" if os.path.exists("/dev/full") else "/dev/zero")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_not_read(name: str, kind: str, tmp_path: Path) -> None:
    put(tmp_path / name, kind)
    with pytest.raises(ScmError, match=rf"{name}.* (?:(?i:plain file|no file)|is a folder)"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pictures_and_names(kind: str, tmp_path: Path) -> None:
    pictures, shards = tmp_path / "pictures", tmp_path / "shards"
    pictures.mkdir()
    put(pictures / "a.png", kind)
    with pytest.raises(ScmError, match=r"a\.png cannot be read.* plain file"):
        load_data(DataConfig(source=str(pictures)))
    shards.mkdir()
    np.savez(shards / "shard.npz", images=np.zeros((3, 8, 8, 1), np.uint8), kind=np.arange(3))
    put(shards / "class_names.txt", kind)
    with pytest.raises(ScmError, match=r"class_names\.txt cannot be read.* plain file"):
        load_data(DataConfig(source=str(shards), label="kind"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train.json", "state.safetensors", "log.jsonl"])
def test_training_into_a_folder_with_something_else_in_place_of_its_files(
    name: str, kind: str, npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    put(tmp_path / "run" / name, kind)
    with pytest.raises(ScmError, match=rf"{name} can.* plain file"):
        train(config(npz, num_iterations=1), tmp_path / "run")


def test_what_is_only_asked_for_its_record_is_none_without_one(tmp_path: Path) -> None:
    put(tmp_path / "train.json", "pipe")
    assert recorded(tmp_path) is None


def test_a_snapshot_that_is_a_pipe(npz: Path, tmp_path: Path) -> None:
    profiles = {"ema_profiles": (0.1,), "ema_snapshot_every": 1}
    train(config(npz, num_iterations=1, **profiles), tmp_path)
    (snapshot,) = (tmp_path / "ema").glob("*.safetensors")
    put(snapshot, "pipe")
    with pytest.raises(ScmError, match=rf"{snapshot.name} is no snapshot.* plain file"):
        reconstruct(tmp_path, 0.1)


def test_a_config_that_is_too_large(tmp_path: Path) -> None:
    with open(tmp_path / CONFIG_NAME, "wb") as stream:
        stream.truncate(CONFIG_MAX_BYTES + 1)
    with pytest.raises(ScmError, match=rf"{CONFIG_NAME} cannot be read: .*More than {CONFIG_MAX_BYTES} bytes"):
        read_config(tmp_path / CONFIG_NAME)


def test_goldens_of_a_type_that_numpy_lacks(tmp_path: Path) -> None:
    save_file({"1step/images": torch.zeros((1, 1, 2, 2), dtype=torch.float8_e4m3fn)}, tmp_path / "golden.safetensors")
    with pytest.raises(IntegrityError, match=r"golden\.safetensors cannot be read"):
        read_goldens(tmp_path / "golden.safetensors", ())
