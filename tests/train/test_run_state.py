"""A run's state on disk: as a file or as shares, whole or not at all, and never another run's."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.small_runs import config, fresh
from scm_sdk.errors import IntegrityError, TrainError
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.build import Run
from scm_sdk.train.config import TrainConfig
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.parallel.distributed import World
from scm_sdk.train.parallel.sharded_state import load_run, save_run
from scm_sdk.train.parallel.state import STATE_FILE, sealed


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let the system refuse files of more bytes, as a full disk does in the midst of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupted(run: TrainConfig, out: Path, log_every: int = 50) -> None:
    """Start a run and end it with Ctrl-C after two iterations."""

    def on_step(done: int) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(run, out, Hooks(on_step=on_step, log_every=log_every))


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


def test_one_bit_anywhere_in_a_state_is_found(npz, tmp_path):
    run = fresh(npz, tmp_path)
    save_run(tmp_path, run.state, World(), sharded=False)
    path, draw = tmp_path / STATE_FILE, np.random.default_rng(0)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for place in [*draw.integers(0, header + 8, 20), *draw.integers(header + 8, len(whole), 20)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"state\.safetensors cannot be resumed from"):
            load_run(tmp_path, fresh(npz, tmp_path, seed=2).state, World())
    path.write_bytes(whole)
    load_run(tmp_path, run.state, World())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration": -1}, "iteration"),
        ({"iteration": "2"}, "iteration"),
        ({"iteration": 10**30}, "cannot be resumed from"),
        ({"iteration": 7}, "done 7 iterations, expected at most 4"),
        ({"seconds": None}, "seconds"),
        ({"skipped": 3}, "3 of 2 iterations were skipped"),
        ({"more": 1}, "more"),
        ({"optimizer.0.exp_avg": None}, "moments of optimizer are not exp_avg, exp_avg_sq, step"),
        ({"optimizer.": None}, "no moments of optimizer after 2 iterations"),
        ({"optimizer.9999.step": torch.zeros(())}, "cannot be resumed from"),
        ({"network.conv_in.weight": lambda t: t.to(torch.int32)}, r"network.conv_in.weight is .*torch.int32"),
        ({"network.conv_in.weight": lambda t: t * float("nan")}, "network.conv_in.weight holds a NaN"),
        ({"optimizer.0.exp_avg_sq": lambda t: t + float("inf")}, "optimizer.0.exp_avg_sq holds a NaN or an infinity"),
        ({"optimizer.0.exp_avg": lambda t: t[:1]}, "optimizer.0.exp_avg is"),
        ({"optimizer.0.step": lambda t: -t}, "optimizer.0.step is -2.0, expected 1 or more"),
        ({"network.conv_in.weight": None}, "conv_in.weight"),
    ],
)
def test_a_state_that_is_whole_but_no_state_of_the_run_is_refused(npz, tmp_path, changes, message):
    """A forged one: its checksum is right."""
    interrupted(config(npz), tmp_path / "run")
    path = tmp_path / "run" / STATE_FILE
    with safe_open(path, framework="pt") as archive:
        counters = json.loads(archive.metadata()["counters"].partition(" ")[2])
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    for name, change in changes.items():
        if "." not in name:
            counters[name] = change
        elif change is None:
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
        else:
            tensors[name] = change(tensors[name]).contiguous() if callable(change) else change
    text = json.dumps(counters)
    save_file(tensors, path, metadata=sealed(tensors, text))
    with pytest.raises(IntegrityError, match=message):
        train(config(npz), tmp_path / "run")


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\n",
        b"\0" * 40,
        b'{"iteration": 3, "los',
        b"{}\n",
        b"[1]\n",
        b"\xff\n",
        b"[" * 9999 + b"\n",
        b'{"a":' * 9999 + b"\n",
        b"x" * 300_000,
    ],
)
def test_a_log_with_a_broken_line_stops_no_run(npz, tmp_path, rest):
    train(config(npz), tmp_path / "whole", Hooks(log_every=1))
    interrupted(config(npz), tmp_path / "run", log_every=1)
    path = tmp_path / "run" / "log.jsonl"
    path.write_bytes(path.read_bytes() + rest)
    train(config(npz), tmp_path / "run", Hooks(log_every=1))
    assert lines(path) == lines(tmp_path / "whole" / "log.jsonl") and len(lines(path)) == 4


def test_a_line_of_the_log_is_the_same_after_an_interruption_in_its_midst(npz, tmp_path):
    train(config(npz), tmp_path / "whole", Hooks(log_every=3))
    interrupted(config(npz), tmp_path / "run", log_every=3)
    train(config(npz), tmp_path / "run", Hooks(log_every=3))
    assert lines(tmp_path / "run" / "log.jsonl") == lines(tmp_path / "whole" / "log.jsonl")


def lines(path):
    """The log without its seconds."""
    return [{**json.loads(line), "seconds": 0} for line in path.read_text("utf-8").splitlines()]


def test_a_finished_run_gets_its_model_back(npz, tmp_path):
    """What a run of an earlier version that died at its end lacks."""
    train(config(npz), tmp_path)
    model = tmp_path / "diffusion_pytorch_model.safetensors"
    whole, state = model.read_bytes(), (tmp_path / STATE_FILE).read_bytes()
    for damage in (lambda: model.unlink(), lambda: model.write_bytes(whole[:-4] + b"1234")):
        damage()
        train(config(npz), tmp_path)
        assert model.read_bytes() == whole and (tmp_path / STATE_FILE).read_bytes() == state
    before = model.stat().st_mtime_ns
    train(config(npz), tmp_path)
    assert model.stat().st_mtime_ns == before


def test_what_a_killed_run_left_half_written_is_removed(npz, tmp_path):
    (tmp_path / "samples").mkdir()
    left = [tmp_path / ".state.safetensors.0123abcd.partial", tmp_path / "samples" / ".000003.png.0123abcd.partial"]
    for path in left:
        path.touch()
    (tmp_path / ".state-00000002.0123abcd.partial").mkdir()
    (tmp_path / ".mine.partial").touch()
    train(config(npz), tmp_path)
    assert [path.name for path in tmp_path.rglob("*.partial")] == [".mine.partial"]


def test_damaged_and_foreign_shares_are_named(npz, tmp_path):
    run = fresh(npz, tmp_path)
    save_run(tmp_path, run.state, World(), sharded=True)
    other = fresh(npz, tmp_path, anchor_weight=0.0, network=tiny(num_classes=3, image_size=8), dropout=0.0)
    other.state.modules = {**other.state.modules, "extra": torch.nn.Linear(2, 2)}
    with pytest.raises(IntegrityError, match=r"state-00000000 cannot be resumed from: .*extra"):
        load_run(tmp_path, other.state, World())
    (share,) = (tmp_path / "state-00000000").glob("*.safetensors")
    whole = share.read_bytes()
    share.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"state-00000000 cannot be resumed from: .*sha256"):
        load_run(tmp_path, run.state, World())
    share.write_bytes(whole[:-100])
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
