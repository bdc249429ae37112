"""A run's state on disk: as a file or as shares, whole or not at all, and never somebody else's."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from scm_sdk.errors import IntegrityError, TrainError
from scm_sdk.model.presets import tiny
from scm_sdk.train.build import Run, build
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.distributed import Scale, World
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.prepare import resolve
from scm_sdk.train.sharded_state import load_run, save_run


def config(npz, **changes) -> TrainConfig:
    base = {"data": DataConfig(source=str(npz), label="kind"), "network": tiny(num_classes=3), "batch_size": 4}
    return TrainConfig(**{"objective": "diffusion", **base, "num_iterations": 4, "warmup_iterations": 0, **changes})


def fresh(npz, out, seed=0, **changes) -> Run:
    """A run whose optimizer has taken a step and whose weights are random."""
    run = build(resolve(config(npz, seed=seed, **changes)), out, Scale(), World())
    draw = torch.Generator().manual_seed(seed)
    for parameter in run.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    run.move()
    return run


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let the system refuse files of more bytes, as a full disk does in the midst of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_same_state(a: Run, b: Run) -> None:
    here, there = a.state.tensors(), b.state.tensors()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert a.state.counters() == b.state.counters()


@pytest.mark.parametrize("first, then", [(True, True), (True, False), (False, True)])
def test_either_form_follows_the_other(npz, tmp_path, first, then):
    old, new = fresh(npz, tmp_path), fresh(npz, tmp_path, seed=1)
    old.state.iteration, new.state.iteration, new.state.seconds = 2, 3, 1.5
    save_run(tmp_path, old.state, World(), sharded=first)
    save_run(tmp_path, new.state, World(), sharded=then)
    assert len([*tmp_path.glob("state*")]) == 1
    found = fresh(npz, tmp_path, seed=2)
    load_run(tmp_path, found.state, World())
    assert_same_state(found, new)
    assert found.state.iteration == 3 and found.state.seconds == 1.5


@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(npz, tmp_path, sharded):
    old, new = fresh(npz, tmp_path), fresh(npz, tmp_path, seed=1)
    old.state.iteration, new.state.iteration = 2, 4
    save_run(tmp_path, old.state, World(), sharded=sharded)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with small_disk(50_000), pytest.raises(TrainError, match=r"state.* cannot be written: .*File too large"):
        save_run(tmp_path, new.state, World(), sharded=sharded)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    found = fresh(npz, tmp_path, seed=2)
    load_run(tmp_path, found.state, World())
    assert_same_state(found, old)


def test_a_run_stopped_by_a_full_disk_goes_on_where_it_was_saved(npz, tmp_path):
    train(config(npz), tmp_path / "whole")
    with pytest.raises(TrainError, match="cannot be written"), small_disk(1 << 40):

        def on_step(done: int) -> None:
            if done == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

        train(config(npz), tmp_path / "run", Hooks(on_step=on_step, checkpoint_every=2))
    done: list[int] = []
    train(config(npz), tmp_path / "run", Hooks(on_step=done.append))
    assert done == [3, 4]
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_damaged_and_foreign_shares_are_named(npz, tmp_path):
    run = fresh(npz, tmp_path)
    save_run(tmp_path, run.state, World(), sharded=True)
    other = fresh(npz, tmp_path, anchor_weight=0.0, network=tiny(num_classes=3, image_size=8), dropout=0.0)
    other.state.modules = {**other.state.modules, "extra": torch.nn.Linear(2, 2)}
    with pytest.raises(IntegrityError, match=r"state-00000000 cannot be resumed from: .*extra"):
        load_run(tmp_path, other.state, World())
    (share,) = (tmp_path / "state-00000000").glob("*.safetensors")
    share.write_bytes(share.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="state-00000000 cannot be resumed from"):
        load_run(tmp_path, run.state, World())


def test_a_folder_without_its_last_file_is_not_looked_at(npz, tmp_path):
    run = fresh(npz, tmp_path)
    run.state.iteration = 2
    save_run(tmp_path, run.state, World(), sharded=True)
    (tmp_path / "state-00000003").mkdir()  # as a power cut may leave it
    found = fresh(npz, tmp_path, seed=2)
    load_run(tmp_path, found.state, World())
    assert_same_state(found, run)
