"""How fast are the engines on this GPU? Builds, proves and times them against PyTorch and ONNX Runtime on the same GPU.

    python benchmarks/gpu.py --json gpu.json                  # the shipped model
    python benchmarks/gpu.py runs/mine --json gpu.json        # a checkpoint of yours

One JSON file: for each engine its build time, peak memory, size, census and difference from PyTorch, and for each
batch the raw, interleaved samples. Compare ratios across machines, never milliseconds.
"""

import json
import shlex
import sys
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from scm_sdk._lazy import is_installed
from scm_sdk.build_record import Flavour
from scm_sdk.errors import BackendError
from scm_sdk.evaluate.gate import validate_bundle
from scm_sdk.evaluate.latency import Latency, measure
from scm_sdk.export.chain import build_all
from scm_sdk.export.engines import EngineVariant, add_engines
from scm_sdk.files import atomic_write_bytes
from scm_sdk.generator import Generator
from scm_sdk.gpu import current_gpu
from scm_sdk.spec import Precision
from scm_sdk.targets import resolve_target

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--steps", type=int, default=2, show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8, 32), show_default=True)
@click.option("--rounds", type=click.IntRange(10), default=200, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for everything that was measured.")
def main(checkpoint: Path | None, steps: int, batches: tuple[int, ...], rounds: int, out: Path | None) -> None:
    """Build, prove and time the engines of CHECKPOINT, the shipped model when absent."""
    gpu = current_gpu()
    flavours = [flavour for flavour in FLAVOURS if is_installed(flavour)]
    if gpu is None or not flavours:
        lacking = "no GPU" if gpu is None else "neither tensorrt nor tensorrt_rtx"
        sys.exit(f"this machine has {lacking}, expected a GPU and one of the two. See: scm-export doctor")
    precisions: list[Precision] = ["fp16", "int8"]
    if float(gpu.compute_capability) >= 8:
        precisions.append("bf16")
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        shipped = Path(str(files("scm_sdk.assets") / "avatars"))
        build_all(checkpoint or shipped, bundle, precisions=precisions, steps=[steps],
                  max_batch=max(batches), on_stage=print)  # fmt: skip
        engines = []
        for flavour in flavours:
            engines += add_engines(bundle, [resolve_target(gpu.compute_capability)], flavour=flavour, on_engine=_show)
        parity = validate_bundle(bundle, backends=flavours)
        latencies = _time(bundle, flavours, ["fp32", *precisions], batches, rounds)
    for latency in latencies:
        for timing in latency:
            print(f"batch {latency.batch:>3}  {timing.name:<20} median {timing.median_ms:8.3f} ms  "
                  f"{timing.images_per_s:8.0f} images/s  {timing.speedup:5.2f}x of PyTorch")  # fmt: skip
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": latencies[0].machine,
            "gpu": vars(gpu),
            "engines": [engine.to_dict() for engine in engines],
            "parity": [each.to_dict() for each in parity],
            "latency": [latency.to_dict() for latency in latencies],
        }
        atomic_write_bytes(out, json.dumps(record, indent=2).encode() + b"\n")


def _show(engine: EngineVariant) -> None:
    record = engine.record
    print(f"{engine.path}: {record.engine_bytes / 1e6:.1f} MB, built in {sum(record.seconds.values()):.1f} s")


def _time(
    bundle: Path, flavours: list[Flavour], precisions: list[Precision], batches: tuple[int, ...], rounds: int
) -> list[Latency]:
    """Time everything that opens here; PyTorch on the GPU comes first, ratios refer to it."""
    wanted: list[dict[str, Any]] = [
        {"backend": "torch", "device": "cuda"}, {"backend": "onnxruntime", "device": "cuda", "precision": "fp32"},
    ]  # fmt: skip
    wanted += [{"backend": flavour, "precision": precision} for flavour in flavours for precision in precisions]
    opened: dict[str, Generator] = {}
    with ExitStack() as stack:
        for options in wanted:
            name = ":".join(filter(None, (options["backend"], options.get("precision"))))
            try:
                opened[name] = stack.enter_context(Generator.from_pretrained(bundle, verify="none", **options))
            except BackendError as exc:
                print(f"{name} is left out: {exc}")
        return [measure(opened, batch=batch, rounds=rounds) for batch in batches]


if __name__ == "__main__":
    main()
