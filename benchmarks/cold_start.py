"""How long from nothing to the first picture? Fresh processes, torch and ONNX Runtime in turn.

    python benchmarks/cold_start.py scm-demo/avatars --json benchmarks/results/cold_start.json

Measures the whole process from outside: start Python, import, open and hash the bundle, generate one
image. Ratios come from interleaved runs; compare ratios across machines, never milliseconds.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from scm_sdk.evaluate.machine import describe_machine
from scm_sdk.files import atomic_write_bytes

CODE = """
import sys
from scm_sdk import Generator
with Generator.from_pretrained(sys.argv[1], backend=sys.argv[2], verify=sys.argv[3]) as gen:
    gen(class_labels=0, seed=0)
"""


def start(bundle: Path, backend: str, verify: str) -> float:
    """Return the seconds that one process took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", CODE, str(bundle), backend, verify], check=True)
    return time.perf_counter() - began


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(3), default=7, show_default=True)
@click.option("--verify", default="digest", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the raw samples.")
def main(bundle: Path, rounds: int, verify: str, out: Path | None) -> None:
    """Time cold starts of BUNDLE."""
    samples: dict[str, list[float]] = {"torch": [], "onnxruntime": []}
    for backend in samples:
        start(bundle, backend, verify)  # fills the disk cache
    for _ in range(rounds):
        for backend, seconds in samples.items():
            seconds.append(start(bundle, backend, verify))
    ratio = statistics.median(t / o for t, o in zip(samples["torch"], samples["onnxruntime"], strict=True))
    for backend, seconds in samples.items():
        print(f"{backend:<12} median {statistics.median(seconds):.2f} s  ({min(seconds):.2f}..{max(seconds):.2f})")
    print(f"ONNX Runtime is {ratio:.1f}x faster to the first image")
    if out:
        record = {
            "command": f"python benchmarks/cold_start.py {bundle} --rounds {rounds} --verify {verify}",
            "machine": describe_machine(),
            "seconds": samples,
            "ratio": ratio,
        }
        atomic_write_bytes(out, json.dumps(record, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
