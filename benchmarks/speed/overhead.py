"""Measure the overhead of ``Generator`` over a bare session: one image, one thread, each in turn.

    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/speed/overhead.py BUNDLE --json overhead.json

Two views. "in turn" takes the real session: differences of the processor time of neighboring calls, which hold what
the session and Python do to each other's caches, and, on a busy machine, what other programs do. "alone" puts a
stand-in that returns at once in the session's place: what is left is the package's own work. Times are processor time
of the one thread that does everything, microseconds, so that a busy machine does not stretch them.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import thread_time

import click
import numpy as np

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.inference.output import convert
from scm_sdk.noise import draw_noise


class Still:
    """A session that returns at once."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def run(self, names: object, feeds: object) -> list[np.ndarray]:
        """Return the same images each time."""
        return [self.images]


def cpu_us(call: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    began = thread_time()
    call()
    return (thread_time() - began) * 1e6


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(5), default=60, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the result.")
def main(bundle: Path, rounds: int, out: Path | None) -> None:
    """Take apart one call of BUNDLE's generator."""
    with Generator.from_pretrained(bundle, backend="onnxruntime", precision="fp32", num_threads=1) as gen:
        backend: object = gen.opened().backend
        session, spec = backend._session, gen.opened().spec  # type: ignore[attr-defined]
        noise, label = draw_noise(spec, [1]), 0 if spec.num_classes else None
        feeds = {f"noise_{i}": array for i, array in enumerate(noise)}
        feeds |= {"class_labels": np.zeros(1, np.int64)} if spec.num_classes else {}
        raw = gen(1, label, seed=1, output_type="raw").images
        ways: dict[str, Callable[[], object]] = {
            "session.run": lambda: session.run([spec.output_name], feeds),
            "gen, noise given, raw": lambda: gen(1, label, noise=noise, output_type="raw"),
            "gen, seed, pil": lambda: gen(1, label, seed=1),
        }
        in_turn: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, call in ways.items():
                in_turn[name].append(cpu_us(call))
        backend._session = Still(raw)  # type: ignore[attr-defined]
        ways["noise"] = lambda: draw_noise(spec, [1])
        ways["uint8"] = lambda: convert(raw, spec.value_range, "uint8")
        ways["pil"] = lambda: convert(raw, spec.value_range, "pil")
        alone = {name: min(cpu_us(call) for _ in range(rounds * 5)) for name, call in ways.items()}
    base = in_turn["session.run"]
    record = {
        "command": f"python benchmarks/speed/overhead.py {bundle} --rounds {rounds}",
        "machine": describe_machine(),
        "note": "processor time of one thread, microseconds; one image, the default number of steps",
        "session_run_us": statistics.median(base),
        "in_turn_over_session_run_us": {
            name: statistics.median(a - b for a, b in zip(times, base, strict=True)) for name, times in in_turn.items()
        },
        "alone_us": alone,
    }
    print(json.dumps(record, indent=2))
    if out:
        atomic_write_bytes(out, json.dumps(record, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
