"""Measure many threads on one Generator: images per second, and the latency of each caller.

    python benchmarks/speed/callers.py scm-demo/avatars --json benchmarks/results/callers.json

Each caller requests one image after the other, by its seed. ``calls`` is ``gen(...)`` from every thread, each with
one core; ``batcher`` is ``gen.batcher()`` of the same generator, which combines waiting requests into batches, one per
core; ``wide`` is the batcher of a generator whose calls take all cores, so that one batch runs at a time. They are
measured in turn for each number of callers, several times; the first requests of a round are not counted.
"""

import itertools
import json
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine

Ask = Callable[[int], object]
SETTLE = 0.25
"""Share of a round that is not counted."""


def ask_for(seconds: float, callers: int, ask: Ask, seeds: "itertools.count[int]") -> tuple[list[float], float]:
    """Let so many threads ask for so long; return each counted request's time and the images a second."""
    began = time.perf_counter()
    counted_from, until = began + SETTLE * seconds, began + seconds
    finished: list[tuple[float, float]] = []

    def caller() -> None:
        while (start := time.perf_counter()) < until:
            ask(next(seeds))
            finished.append((start, time.perf_counter()))

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = [(start, end) for start, end in finished if counted_from <= end <= until]
    return [end - start for start, end in counted], len(counted) / (until - counted_from)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--callers", type=click.IntRange(1), multiple=True, default=(1, 2, 4, 8, 16, 32, 64), show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=4.0, show_default=True, help="Of a round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the result.")
def main(bundle: Path, callers: tuple[int, ...], seconds: float, rounds: int, backend: str, out: Path | None) -> None:
    """Let threads share one generator of BUNDLE."""
    results = []
    seeds = itertools.count()
    print(f"{'callers':>7}  {'way':<8}{'images/s':>9}{'p50 ms':>9}{'p95 ms':>9}{'longest':>9}{'requests':>10}")
    with ExitStack() as stack:
        gen = stack.enter_context(Generator.from_pretrained(bundle, backend=backend, num_threads=1))
        wide = stack.enter_context(Generator.from_pretrained(bundle, backend=backend))
        batcher, wide_batcher = (stack.enter_context(g.batcher(max_queue_size=max(callers))) for g in (gen, wide))
        label = 0 if gen.opened().spec.num_classes else None
        ways: dict[str, Ask] = {
            "calls": lambda seed: gen(1, label, seed=seed, output_type="uint8"),
            "batcher": lambda seed: batcher(seed=seed, class_labels=label, output_type="uint8"),
            "wide": lambda seed: wide_batcher(seed=seed, class_labels=label, output_type="uint8"),
        }
        gen.warmup(1)
        wide.warmup(1)
        for count in callers:
            waits: dict[str, list[float]] = {name: [] for name in ways}
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, ask in ways.items():
                    took, rate = ask_for(seconds, count, ask, seeds)
                    waits[name] += took
                    rates[name].append(rate)
            for name, took in waits.items():
                middle, late = (float(x) for x in np.percentile(took, [50, 95]) * 1e3)
                rate = float(np.median(rates[name]))
                row = {"callers": count, "way": name, "images_per_second": rates[name], "requests": len(took)}
                results.append(row | {"p50_ms": middle, "p95_ms": late, "longest_ms": max(took) * 1e3})
                print(
                    f"{count:>7}  {name:<8}{rate:>9.1f}{middle:>9.1f}{late:>9.1f}{max(took) * 1e3:>9.1f}"
                    f"{len(took):>10}",
                    flush=True,
                )
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "backend": backend,
            "results": results,
        }
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
