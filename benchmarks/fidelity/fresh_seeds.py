"""Verdicts of the parity gate on blocks of seeds that nothing was chosen on.

    python benchmarks/fidelity/fresh_seeds.py scm-demo/avatars --json benchmarks/results/fresh_seeds.json

Takes a copy of BUNDLE, adds FP16 and INT8 to it as the README does (``quantize --target-psnr 37``), and judges each
precision and number of steps on each block through ONNX Runtime, as ``validate --first-seed --no-record`` does. Exits 1
if a verdict is FAIL.
"""

import json
import shlex
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console
from rich.table import Table

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.build_all import MARGIN_DB
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.parity.compare import MIN_PSNR_DB, Parity


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--num-blocks", type=click.IntRange(1), default=10, show_default=True)
@click.option("--block", type=click.IntRange(1), default=512, show_default=True, help="Seeds of each block.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--first-seed", type=click.IntRange(0), default=100_000, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the table.")
def main(bundle: Path, num_blocks: int, block: int, batch: int, first_seed: int, out: Path | None) -> None:
    """Judge the FP16 and INT8 forms of BUNDLE on fresh seeds."""
    results: list[Parity] = []
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(bundle, Path(folder) / "bundle"))
        add_precision(copy, default_plan("fp16"), num_samples=0)
        add_int8(copy, QuantizeOptions(target_db=MIN_PSNR_DB["int8"] + MARGIN_DB))
        build_id, versions = (getattr(Bundle.open(copy).manifest, name) for name in ("build_id", "versions"))
        for first in range(first_seed, first_seed + num_blocks * block, block):
            results += validate_bundle(
                copy, backends=["onnxruntime"], precisions=["fp16", "int8"], first_seed=first, num_seeds=block,
                batches=[batch], record=False,
            )  # fmt: skip
    results.sort(key=lambda parity: (parity.candidate, parity.seeds))
    table = Table("graph", "seeds", "verdict", "95 % reach, dB", "of all", "gate", "mean, dB", "worst, dB", box=None)
    for parity in results:
        low, high = parity.overall.psnr_p05_interval_db
        table.add_row(
            parity.candidate, f"{parity.seeds[0]} to {parity.seeds[-1]}", "pass" if parity else "FAIL",
            f"{parity.overall.psnr_p05_db:.1f}", f"{low:.1f} to {high:.1f}", f"{parity.threshold:.0f}",
            f"{parity.overall.psnr_db:.1f}", f"{parity.overall.worst_psnr_db:.1f}",
        )  # fmt: skip
    Console(width=140).print(table)
    passed = sum(map(bool, results))
    print(f"{passed} of {len(results)} verdicts are pass")
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "build_id": build_id,
            "versions": versions,
            "results": [parity.to_dict() for parity in results],
        }
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")
    sys.exit(passed != len(results))


if __name__ == "__main__":
    main()
