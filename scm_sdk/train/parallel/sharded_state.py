"""The sharded state of a run: each process writes its shard, any number of processes can read them.

``torch.distributed.checkpoint`` splits the work; its Hugging Face storage writes safetensors instead of pickles. A
checkpoint is a folder ``state-ITERATION`` that appears when it is complete; the previous one is then deleted.
``counters.json`` in it has the sha256 of each shard, which the processes compute and check together. On several
machines the run's folder must be on a shared disk.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open

from ..._util.files import atomic_write_bytes, open_regular, read_regular, sha256_file
from ..._util.publish import atomic_folder
from ...errors import TrainError
from .distributed import World
from .state import STATE_FILE, UNREADABLE, Counters, RunState, load_state, not_resumable, read_counters, save_state

COUNTERS_FILE = "counters.json"
_MAX_COUNTERS_BYTES = 1 << 27
FOLDER = re.compile(r"state-(\d{8,})")


class _Shares(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The numbers of a state, and the sha256 of the files with its tensors."""

    counters: Counters
    sha256: dict[str, str]


def save_run(out: Path, state: RunState, world: World, *, sharded: bool) -> None:
    """Write the state of a run, as a file or as shards; the previous state stays until the new one is complete.

    Raises:
        TrainError: If it cannot be written on any process; the previous state stays.
    """
    if not sharded:
        world.run_on_main(lambda: _write_file(out, state))
        return
    target = out / f"state-{state.iteration:08d}"
    with ExitStack() as stack:

        def begin() -> str:
            folder = stack.enter_context(atomic_folder(target, overwrite=True, marker=COUNTERS_FILE, error=TrainError))
            return str(folder)

        folder = world.run_on_main(begin)
        _write_shares(folder, target, state, world)
        sums = world.gather(world.run_on_all(lambda: _sums(Path(folder), world)))
        shares = _Shares(counters=state.counters(), sha256={name: each[name] for each in sums for name in each})
        text = msgspec.json.encode(shares)
        world.run_on_main(lambda: atomic_write_bytes(Path(folder) / COUNTERS_FILE, text, error=TrainError))
        world.run_on_main(stack.close)
    world.run_on_main(lambda: _remove_all_but(out, target))


def load_run(out: Path, state: RunState, world: World) -> None:
    """Load the newest state, in either form and from any number of processes.

    Raises:
        IntegrityError: If it is damaged or belongs to another network.
    """
    newest = world.run_on_main(lambda: _newest(out))
    if newest is not None and newest.name != STATE_FILE:
        _read_shares(newest, state, world)
    else:
        world.run_on_all(lambda: load_state(out, state))


def _write_file(out: Path, state: RunState) -> None:
    save_state(out, state)
    _remove_all_but(out, out / STATE_FILE)


def _write_shares(folder: str, target: Path, state: RunState, world: World) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(folder, save_distributed=True)
    try:
        with _one_may_be_alone():
            save(dict(state.tensors()), storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as exc:  # the same on every process
        raise TrainError(
            f"{target} cannot be written: {_reasons(exc)}. The checkpoint before it is still there. "
            "Free some space or choose another disk, then run the same command again."
        ) from exc


def _sums(folder: Path, world: World) -> dict[str, str]:
    """Return the sha256 of the shards that this process checks, by name."""
    paths = sorted(folder.glob("*.safetensors"))
    return {path.name: sha256_file(path) for path in paths[world.rank :: world.size]}


def _read_shares(folder: Path, state: RunState, world: World) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))

    def begin() -> tuple[Counters, dict[str, Any]]:
        try:
            shares = msgspec.json.decode(read_regular(folder / COUNTERS_FILE, most=_MAX_COUNTERS_BYTES), type=_Shares)
            if {path.name for path in folder.glob("*.safetensors")} != shares.sha256.keys():
                raise ValueError(f"its shares are not the {len(shares.sha256)} of {COUNTERS_FILE}")
            for name, found in _sums(folder, world).items():
                if found != shares.sha256[name]:
                    raise ValueError(f"{name} does not have the sha256 of {COUNTERS_FILE}")
            stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
            shapes = {name: torch.Size(about.size) for name, about in stored.items()}
            return shares.counters, dict(state.empty_like(shapes))
        except UNREADABLE as exc:
            raise not_resumable(folder, exc) from exc

    def end() -> None:
        try:
            state.load(tensors, counters)
        except UNREADABLE as exc:
            raise not_resumable(folder, exc) from exc

    counters, tensors = world.run_on_all(begin)
    try:
        with _one_may_be_alone():
            load(tensors, storage_reader=reader, no_dist=world.size == 1)
    except CheckpointException as exc:  # the same on every process
        raise not_resumable(folder, _reasons(exc)) from exc
    world.run_on_all(end)


@contextmanager
def _one_may_be_alone() -> Iterator[None]:
    """Suppress torch's warning about a single process, which is allowed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reasons(exc: Any) -> str:
    """Return the errors of the processes, each text once."""
    return "; ".join(dict.fromkeys(str(error) or type(error).__name__ for error, _ in exc.failures.values()))


def _newest(out: Path) -> Path | None:
    """Return the state with the most iterations. An unreadable file is returned too, so that its damage is reported."""
    found = [(int(path.name.partition("-")[2]), path) for path in _folders(out)]
    file = out / STATE_FILE
    if file.exists():
        try:
            with open_regular(file), safe_open(file, framework="pt") as archive:
                found.append((read_counters(archive.metadata()).iteration, file))
        except UNREADABLE:
            return file
    return max(found)[1] if found else None


def _folders(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run."""
    return [path for path in out.glob("state-*") if FOLDER.fullmatch(path.name) and (path / COUNTERS_FILE).is_file()]


def _remove_all_but(out: Path, kept: Path) -> None:
    """Delete other states. An undeletable one is ignored, because the newest state is used anyway."""
    for path in _folders(out):
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
    if kept.name != STATE_FILE:
        with suppress(OSError):
            (out / STATE_FILE).unlink(missing_ok=True)
