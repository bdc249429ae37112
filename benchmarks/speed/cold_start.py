"""Measure time to the first image and peak memory of new processes, each backend in turn.

    python benchmarks/speed/cold_start.py scm-demo/avatars --json benchmarks/results/cold_start.json
    python benchmarks/speed/cold_start.py scm-demo/avatars --images 10000     # is the memory flat?

Measures whole processes from outside: start Python, import, open and hash the bundle, generate one image. Processor
time is given in addition to wall time, since other programs on the machine affect it less. Ratios are from
interleaved runs; compare ratios across machines, not milliseconds. ``--python`` measures another Python, for example
of an environment with only ``scm-sdk[onnxruntime]``.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine

IMAGE = """
import sys
from scm_sdk import Generator
with Generator.from_pretrained(sys.argv[1], backend=sys.argv[2], verify=sys.argv[3]) as gen:
    gen(class_labels=0, seed=0)
"""
CODES = {
    "python": "pass",
    "import scm_sdk": "import scm_sdk",
    "import numpy": "import numpy",
    "import onnxruntime": "import onnxruntime",
    "from scm_sdk import Generator": "from scm_sdk import Generator",
    "onnxruntime": IMAGE,
    "torch": IMAGE,
}
MANY = """
import sys
from scm_sdk import Generator

def resident_mib():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096 / 2**20

total = int(sys.argv[2])
with Generator.from_pretrained(sys.argv[1], backend="onnxruntime", precision="fp32") as gen:
    gen.warmup(32)
    for done in range(0, total, 32):
        gen(32, seed=done, output_type="uint8")
        if done // 32 % max(1, total // 32 // 20) == 0:
            print(done + 32, round(resident_mib(), 2), flush=True)
"""


def start(python: str, code: str, *arguments: str) -> dict[str, float]:
    """Run one process; return its wall and processor time, seconds, and its peak memory, MiB."""
    began = time.perf_counter()
    process = subprocess.Popen([python, "-c", code, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{shlex.join([python, '-c', code])} ended with {process.returncode}")
    wall = time.perf_counter() - began
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 2**10}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(3), default=7, show_default=True)
@click.option("--verify", default="digest", show_default=True)
@click.option("--python", default=sys.executable, help="Which Python; this one without.")
@click.option("--only", type=click.Choice(list(CODES)), multiple=True, help="May be repeated; all without.")
@click.option("--images", type=click.IntRange(32), help="Watch the memory over so many images instead.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the raw samples.")
def main(
    bundle: Path, rounds: int, verify: str, python: str, only: tuple[str, ...], images: int | None, out: Path | None
) -> None:
    """Time cold starts of BUNDLE, or watch its memory."""
    record: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "machine": describe_machine()}
    if images:
        done = subprocess.run(
            [python, "-c", MANY, str(bundle), str(images)], check=True, stdout=subprocess.PIPE, encoding="utf-8"
        )
        record["images_and_resident_mib"] = [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
        print(done.stdout, end="")
    else:
        record["seconds"] = time_starts(python, bundle, verify, rounds, only or tuple(CODES))
    if out:
        atomic_write_bytes(out, json.dumps(record, indent=2).encode() + b"\n")


def time_starts(
    python: str, bundle: Path, verify: str, rounds: int, names: tuple[str, ...]
) -> dict[str, list[dict[str, float]]]:
    """Start each way once a round and print the medians."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name, starts in samples.items():
            took = start(python, CODES[name], str(bundle), name, verify)
            if i:  # the first round fills the disk cache
                starts.append(took)
    print(f"{'':<32}{'cpu s':>8}{'least':>8}{'wall s':>8}{'peak MiB':>10}")
    for name, starts in samples.items():
        cpu, wall, peak = ([each[key] for each in starts] for key in ("cpu_s", "wall_s", "peak_mib"))
        median = statistics.median
        print(f"{name:<32}{median(cpu):>8.3f}{min(cpu):>8.3f}{median(wall):>8.2f}{median(peak):>10.1f}")
    return samples


if __name__ == "__main__":
    main()
