"""Measure every precision and engine of a checkpoint, built without a GPU: build time, size, error.

    python benchmarks/engines/engines.py scm_sdk/assets/avatars --target a100 --target l4 --json engines.json
    python benchmarks/engines/engines.py --random 55 --target a100 --json engines-55m.json

``--random N`` takes a U-Net of 32x32 pixels with about N million random weights: sizes and times are then real, the
accuracy is that of a network that was never trained. Engines are not run: that is ``benchmarks/speed/gpu.py``.
"""

import json
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click

from scm_sdk._util.events import EventLines
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine, peak_rss_mib
from scm_sdk.engines.targets import resolve_targets
from scm_sdk.export.build_all import build_all
from scm_sdk.export.engines.add import EngineVariant
from scm_sdk.export.precision.variants import Variant
from scm_sdk.spec import Precision


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--random", "millions", type=click.IntRange(1), help="Million random weights, instead of CHECKPOINT.")
@click.option("--target", "targets", multiple=True, default=("a100", "l4"), show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("fp16", "int8"), show_default=True)
@click.option("--steps", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--max-batch", type=int, default=32, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for everything that was measured.")
def main(
    checkpoint: Path | None, millions: int | None, targets: tuple[str, ...], precisions: tuple[Precision, ...],
    steps: tuple[int, ...], max_batch: int, out: Path | None,
) -> None:  # fmt: skip
    """Build everything of CHECKPOINT, or of a random network, and say what it took."""
    if (checkpoint is None) == (millions is None):
        sys.exit("expected CHECKPOINT or --random, one of the two")
    graphs: list[Variant] = []
    engines: list[EngineVariant] = []
    stages: list[dict[str, Any]] = []
    peak = 0.0

    def stage(text: str) -> None:
        nonlocal peak  # each engine's own measurement resets the process's peak
        peak = max(peak, peak_rss_mib() or 0)
        print(f"{perf_counter() - start:7.1f} s  {text}")
        stages.append({"seconds": perf_counter() - start, "stage": text})

    class Keep(EventLines):
        def result(self, made: object, /) -> None:
            if isinstance(made, EngineVariant):
                engines.append(made)
                stage(_line(made))
            elif isinstance(made, Variant):
                graphs.append(made)
                stage(made.path)

    with TemporaryDirectory() as folder:
        source = checkpoint or _random(Path(folder) / "random", millions or 1)
        start = perf_counter()
        build_all(
            source, Path(folder) / "bundle", precisions=precisions, steps=steps, max_batch=max_batch,
            targets=resolve_targets(targets), events=Keep(stage),
        )  # fmt: skip
        total = perf_counter() - start
        stage("done")
    for graph in graphs:
        print(f"{graph.path}: {'-' if graph.psnr_db is None else f'{graph.psnr_db:.1f} dB against fp32'}")
    print(f"{total:.0f} s in all, peak memory {peak:.0f} MiB")
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "seconds": total,
            "peak_rss_mib": peak or None,
            "stages": stages,
            "graphs": [graph.to_dict() for graph in graphs],
            "engines": [engine.to_dict() for engine in engines],
        }
        atomic_write_bytes(out, json.dumps(record, indent=2, default=str).encode() + b"\n")


def _line(engine: EngineVariant) -> str:
    record = engine.record
    return (
        f"{engine.path}: {record.engine_bytes / 1e6:.1f} MB, build {record.seconds['build']:.1f} s, "
        f"peak {record.peak_memory_bytes / 2**20:.0f} MiB"
    )


def _random(folder: Path, millions: int) -> Path:
    """Write a 32x32 U-Net in the shape of the paper's CIFAR-10 network, its width chosen by the number of weights."""
    import torch

    from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
    from scm_sdk.model.networks.unet import UNet, UNetConfig

    def config(channels: int) -> UNetConfig:
        return UNetConfig(
            image_size=32, in_channels=3, channels=channels, channel_mult=(2, 2, 2), num_blocks=4,
            attention_resolutions=(16,), head_channels=64, num_classes=10,
        )  # fmt: skip

    def size(channels: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in UNet(config(channels)).parameters())

    torch.manual_seed(0)
    channels = min(range(32, 513, 32), key=lambda c: abs(size(c) - millions * 1e6))
    network = UNet(config(channels))
    for parameter in network.parameters():  # a fresh network ends in zeros: nothing would be left to quantize
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    print(f"random U-Net with {size(channels) / 1e6:.1f} million weights, {channels} channels")
    ConsistencyModel(ModelConfig(network=config(channels)), network).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
