"""Build, validate and time engines on this GPU, compared with PyTorch and ONNX Runtime on the same GPU.

    python benchmarks/speed/gpu.py --json gpu.json                  # the shipped model
    python benchmarks/speed/gpu.py runs/mine --json gpu.json        # a checkpoint of yours

One JSON file, written again after each stage: for each engine its build time, peak memory, size, census and difference
from PyTorch, and for each batch the raw, interleaved samples. A flavor that fails is on record with its reason, the
others continue; the command then exits 1. Compare ratios across machines, never milliseconds.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from scm_sdk._util.events import EventLines, Silent
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.gpu import current_gpu
from scm_sdk._util.lazy import is_installed
from scm_sdk._util.machine import describe_machine
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.engine_record import Flavor
from scm_sdk.engines.targets import Target, resolve_target
from scm_sdk.errors import BackendError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.build_all import build_all
from scm_sdk.export.engines.add import EngineVariant, add_engines
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.latency import Latency, measure
from scm_sdk.inference.parity.compare import Parity
from scm_sdk.spec import Precision

FLAVORS: tuple[Flavor, ...] = ("tensorrt", "tensorrt_rtx")


class Report:
    """What was measured so far, on disk after each stage."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.record: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]), "machine": describe_machine(), "gpu": None, "skipped": [],
            "failures": [], "engines": [], "parity": [], "latency": [],
        }  # fmt: skip

    def save(self) -> None:
        """Write it."""
        if self.out:
            atomic_write_bytes(self.out, json.dumps(self.record, indent=2, default=str).encode() + b"\n")

    def fail(self, stage: str, error: Exception) -> None:
        """Keep what failed and why."""
        print(f"{stage} failed: {type(error).__name__}: {error}")
        self.record["failures"].append({"stage": stage, "error": f"{type(error).__name__}: {error}"})
        self.save()

    def skip(self, reason: str) -> None:
        """Keep why something was not tried."""
        print(f"skip: {reason}")
        self.record["skipped"].append(reason)
        self.save()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Keep a failure with its reason instead of ending; whatever happens, save."""
        print(f"{name} ...")
        try:
            yield
        except Exception as exc:  # what foreign libraries raise on a GPU is not known beforehand
            self.fail(name, exc)
        self.save()


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--steps", type=int, default=2, show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8, 32), show_default=True)
@click.option("--rounds", type=click.IntRange(10), default=200, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for everything that was measured.")
def main(checkpoint: Path | None, steps: int, batches: tuple[int, ...], rounds: int, out: Path | None) -> None:
    """Build, prove and time the engines of CHECKPOINT, the shipped model when absent."""
    gpu = current_gpu()
    report = Report(out)
    installed = [flavor for flavor in FLAVORS if is_installed(flavor)]
    if gpu is None or not installed:
        lacking = "no GPU" if gpu is None else "neither tensorrt nor tensorrt_rtx"
        sys.exit(f"this machine has {lacking}, expected a GPU and one of the two. See: scm-export doctor")
    report.record["gpu"] = vars(gpu)
    target = resolve_target(gpu.compute_capability)
    flavors = []
    for flavor in FLAVORS:
        if flavor not in installed:
            report.skip(f"{flavor} is not installed")
        elif reason := target.unbuildable(flavor):
            report.skip(f"{flavor}: {reason}")
        else:
            flavors.append(flavor)
    fp32: list[Precision] = ["fp32"]
    precisions: list[Precision] = ["fp16", "int8"]
    precisions += ["bf16"] * ("bf16" in target.precisions)  # pyright: ignore[reportAssignmentType]
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        source = checkpoint or Path(str(files("scm_sdk.assets") / "avatars"))
        with report.stage("graphs"):
            build_all(
                source, bundle, precisions=precisions, steps=[steps], max_batch=max(batches), events=EventLines(print)
            )
        for flavor in flavors:
            for precision in [*fp32, *precisions]:  # each alone: one that fails costs no other
                if reason := target.lacks(precision, flavor):
                    report.skip(reason)
                else:
                    _prove(report, bundle, target, flavor, precision)  # pyright: ignore[reportArgumentType]
        with report.stage("latency"):
            for batch, latency in _time(report, bundle, flavors, [*fp32, *precisions], batches, rounds):
                report.record["latency"].append(latency.to_dict())
                report.save()
                for timing in latency:
                    print(f"batch {batch:>3}  {timing.name:<20} median {timing.median_ms:8.3f} ms  "
                          f"{timing.images_per_s:8.0f} images/s  {timing.speedup:5.2f}x of PyTorch")  # fmt: skip
    if report.record["failures"]:
        sys.exit(f"{len(report.record['failures'])} stages failed; the rest is in {out}")


def _prove(report: Report, bundle: Path, target: Target, flavor: Flavor, precision: Precision) -> None:
    """Build a flavor's engines of one precision and compare them with PyTorch."""
    made: list[EngineVariant] = []

    class Keep(Silent):
        def result(self, result: object, /) -> None:
            if isinstance(result, EngineVariant):
                _show(result)
                made.append(result)
                report.record["engines"].append(result.to_dict())
            elif isinstance(result, Parity):
                report.record["parity"].append(result.to_dict())

    with report.stage(f"{flavor} {precision} engines"):
        add_engines(bundle, [target], flavor=flavor, precisions=[precision], events=Keep())
    if made:
        with report.stage(f"{flavor} {precision} parity"):
            for parity in validate_bundle(bundle, backends=[flavor], precisions=[precision], events=Keep()):
                parity.raise_if_failed()


def _show(engine: EngineVariant) -> None:
    record = engine.record
    print(f"{engine.path}: {record.engine_bytes / 1e6:.1f} MB, built in {sum(record.seconds.values()):.1f} s")


def _time(
    report: Report,
    bundle: Path,
    flavors: Sequence[Flavor],
    precisions: Sequence[Precision],
    batches: Sequence[int],
    rounds: int,
) -> Iterator[tuple[int, Latency]]:
    """Time everything that opens here; PyTorch on the GPU comes first, ratios refer to it."""
    wanted: list[dict[str, Any]] = [
        {"backend": "torch", "device": "cuda"}, {"backend": "onnxruntime", "device": "cuda", "precision": "fp32"},
    ]  # fmt: skip
    built = {(artifact.format, artifact.precision) for artifact in Bundle.open(bundle, verify="none").artifacts()}
    wanted += [{"backend": f, "precision": p} for f in flavors for p in precisions if (f, p) in built]
    opened: dict[str, Generator] = {}
    with ExitStack() as stack:
        for options in wanted:
            name = ":".join(filter(None, (options["backend"], options.get("precision"))))
            try:
                opened[name] = stack.enter_context(Generator.from_pretrained(bundle, verify="none", **options))
            except BackendError as exc:
                if options["backend"] in flavors:
                    report.fail(f"opening {name}", exc)
                else:  # only something to compare with
                    report.skip(f"{name}: {exc}")
        for batch in batches if opened else ():
            yield batch, measure(opened, batch=batch, rounds=rounds)


if __name__ == "__main__":
    main()
