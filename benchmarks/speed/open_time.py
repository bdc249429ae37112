"""Measure what opening a large bundle costs over reading its files once, each part in turn in one process.

    python benchmarks/engines/size.py imagenet512_s --work runs/size     # 1.18 GB of weights
    python benchmarks/speed/open_time.py runs/size/imagenet512_s/bundle --json benchmarks/results/open_time.json

* ``read``        each file once into a buffer of 1 MiB
* ``hash``        the sha256 of each file
* ``session``     the library alone, on unchecked files
* ``in turn``     hash, then session: what opening did before weights were hashed while they are loaded
* ``open``        ``Generator.from_pretrained`` until it is ready
* ``remembered``  the same with ``verify="remembered"``, when the digests are known

Each is measured with the files in the page cache and, by ``cold``, after they were dropped from it. Ratios are those of
the same round. Wall time is what a user waits for, so leave the machine alone. Processor time is given for the process
and for the calling thread: the latter is the minimum of the wall time where another core hashes.
"""

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click
from result_files import check_class

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes, sha256_file
from scm_sdk._util.machine import describe_machine
from scm_sdk._util.processor import usable_cores
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.inference.backends import open_backend

_BUFFER_BYTES = 1 << 20


def read(files: list[Path]) -> None:
    """Read files once."""
    buffer = bytearray(_BUFFER_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "thread_cpu": time.thread_time}


def clock(call: Callable[[], object]) -> tuple[float, ...]:
    """Return the time of a call by each of the clocks, seconds."""
    began = [now() for now in CLOCKS.values()]
    call()
    return tuple(now() - start for now, start in zip(CLOCKS.values(), began, strict=True))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=7, show_default=True)
@click.option("--note", default="", help="Put into the JSON: what a reader must know of the machine.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the raw samples.")
def main(bundle: Path, backend: str, steps: int, rounds: int, note: str, out: Path | None) -> None:
    """Time the opening of BUNDLE."""
    check_class(out)
    made = Bundle.open(bundle, verify="none")
    (artifact,) = made.artifacts(format="onnx", precision="fp32", num_inference_steps=steps)
    graph, spec = made.file(artifact.path), made.spec(steps)
    files = [path for path in sorted(graph.parent.iterdir()) if path.name.startswith(graph.name)]
    os.sync()  # only what is written can be dropped

    def session() -> None:
        open_backend(backend, graph, spec).close()

    def in_turn() -> None:
        Bundle.open(bundle, verify="none").check_unchanged(artifact.path)
        session()

    def open_by(verify: Literal["digest", "remembered"]) -> None:
        Generator.from_pretrained(
            bundle, backend=backend, precision="fp32", num_inference_steps=steps, verify=verify
        ).close()

    ways: dict[str, Callable[[], object]] = {
        "read": lambda: read(files),
        "hash": lambda: [sha256_file(path) for path in files],
        "session": session,
        "in turn": in_turn,
        "open": lambda: open_by("digest"),
        "remembered": lambda: open_by("remembered"),
    }
    open_by("remembered")  # imports the library, and remembers the digests
    times: dict[str, list[tuple[float, ...]]] = {f"{how}{name}": [] for how in ("", "cold ") for name in ways}
    for i in range(rounds):
        for name in [*list(times)[i % len(times) :], *list(times)[: i % len(times)]]:
            if name.startswith("cold "):
                drop(files)
            else:
                read(files)
            times[name].append(clock(ways[name.removeprefix("cold ")]))
    total = sum(path.stat().st_size for path in files)
    print(f"{total / 1e9:.2f} GB in {len(files)} files, {backend}, {steps} steps")
    print(f"{'':<18}{'wall s':>9}{'min':>8}{'cpu s':>8}{'thread':>8}{'over read':>11}{'over session':>14}")
    for name, samples in times.items():
        cold = "cold " if name.startswith("cold ") else ""
        over = [
            statistics.median(a[0] / b[0] for a, b in zip(samples, times[cold + base], strict=True))
            for base in ("read", "session")
        ]
        wall, cpu, thread = (list(each) for each in zip(*samples, strict=True))
        print(
            f"{name:<18}{statistics.median(wall):>9.3f}{min(wall):>8.3f}{statistics.median(cpu):>8.3f}"
            f"{statistics.median(thread):>8.3f}{over[0]:>11.2f}{over[1]:>14.2f}"
        )
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine() | {"allowed_cpus": usable_cores()},
        "note": note,
        "bytes": total,
        "seconds": {
            name: [{key: round(x, 4) for key, x in zip(CLOCKS, each, strict=True)} for each in samples]
            for name, samples in times.items()
        },
    }
    if out:
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
