"""Measure the path from random weights to an engine at the paper's sizes: time, bytes, peak memory.

    python benchmarks/engines/size.py cifar10 imagenet64_s --work runs/size --json benchmarks/results/size.json
    python benchmarks/engines/size.py imagenet512_xxl --work runs/size --json benchmarks/results/size.json

Each stage is a process of its own, whose peak memory the system reports: ``weights`` writes a checkpoint of random
weights, ``export`` makes the bundle with a 2-step sampler graph and PyTorch's own picture in it, ``fp16`` and
``engine`` (TensorRT-RTX for the A100, built without a GPU) add to it, ``run`` draws one picture with ONNX Runtime in
float32 and holds it to PyTorch's. A stage that is done is not done again: stop it at any time and run the same command.
Disk: about 16 bytes for each parameter.

``wide`` is not of the paper: as many parameters as its largest network in a seventh of the layers, on 8x8 maps. Memory
and bytes are those of 1.5 billion parameters; the exporter's time, which goes with the layers, is not.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
from stages import Stages, add_engine, add_fp16, run_stage

from scm_sdk._util.files import atomic_write_bytes

STEPS = (2,)
PROVENANCE = {"data": "none: random weights", "license": "Apache-2.0"}


def weights(preset: str, folder: Path) -> dict[str, Any]:
    """Write a checkpoint with random weights, none of them zero."""
    import torch

    from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
    from scm_sdk.model.networks.edm2 import EDM2Config
    from scm_sdk.model.networks.presets import PRESETS

    wide = EDM2Config(
        image_size=8, in_channels=4, channels=3456, channel_mult=(1,), num_blocks=1, attention_resolutions=()
    )
    torch.manual_seed(0)
    network = wide if preset == "wide" else PRESETS[preset]()
    output: Literal["pixels", "latents"] = "latents" if network.sample_shape[0] == 4 else "pixels"
    config = ModelConfig(network=network, output=output, provenance=PROVENANCE)
    model = ConsistencyModel(config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1).add_(0.3 if p.ndim == 0 else 0.0)
    model.save_pretrained(folder / "checkpoint")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def export(preset: str, folder: Path) -> dict[str, Any]:
    """Make the bundle: one float32 graph of 2 steps."""
    from scm_sdk.export.bundle_export import export_bundle

    report = export_bundle(
        folder / "checkpoint", folder / "bundle", steps=STEPS, max_batch=1, overwrite=True, events=Stages()
    )
    (graph,) = report.graphs
    return {
        "seconds_by_part": dict(graph.seconds),
        "num_nodes": graph.num_nodes,
        "graph_bytes": graph.bytes + graph.data_bytes,
    }


def fp16(preset: str, folder: Path) -> dict[str, Any]:
    """Add the FP16 graph."""
    return add_fp16(folder / "bundle")


def engine(preset: str, folder: Path) -> dict[str, Any]:
    """Add an engine for the A100."""
    return add_engine(folder / "bundle")


def run(preset: str, folder: Path) -> dict[str, Any]:
    """Draw the recorded picture again with ONNX Runtime, float32, and hold it to PyTorch's."""
    import numpy as np

    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.inference.generator import Generator

    golden = Bundle.open(folder / "bundle", verify="none").goldens()[STEPS[0]]
    with Generator.from_pretrained(folder / "bundle", backend="onnxruntime", precision="fp32", verify="none") as gen:
        start = time.perf_counter()
        labels = None if golden.class_labels is None else golden.class_labels.tolist()
        out = gen(len(golden.seeds), class_labels=labels, seed=golden.seeds.tolist(), output_type="raw")
    difference = float(np.abs(np.asarray(out.images) - golden.images).max())
    largest = float(np.abs(golden.images).max())
    if not difference <= 1e-3 * largest:
        sys.exit(f"ONNX Runtime differs from PyTorch by {difference:.1e} of {largest:.1e}")
    return {"seconds_of_call": time.perf_counter() - start, "max_abs_difference": difference, "largest": largest}


STAGES: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "weights": weights,
    "export": export,
    "fp16": fp16,
    "engine": engine,
    "run": run,
}


@click.command()
@click.argument("presets", nargs=-1, required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/size"), show_default=True, help="Folder.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File that keeps the table; it is added to.")
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True, help="Run this one here, for its parent.")
def main(presets: tuple[str, ...], work: Path, out: Path | None, stage: str | None) -> None:
    """Measure the way of each of PRESETS, one after the other."""
    if stage is not None:
        found = STAGES[stage](presets[0], work / presets[0])
        atomic_write_bytes(work / presets[0] / f"{stage}.partial.json", json.dumps(found).encode())
        return
    for preset in presets:
        folder = work / preset
        folder.mkdir(parents=True, exist_ok=True)
        for name in STAGES:
            if not (folder / f"{name}.json").exists():
                _measure(preset, name, work)
        if out is not None:
            _keep(preset, folder, out)
        print(_line(preset, _row(folder)), flush=True)


def _measure(preset: str, stage: str, work: Path) -> None:
    """Run one stage in a process and write what it took and what it printed."""
    folder = work / preset
    for left in folder.glob(".*.partial"):  # of a stage that was killed
        shutil.rmtree(left, ignore_errors=True)
    command = [__file__, preset, "--work", str(work), "--stage", stage]
    found = run_stage(command, folder / f"{stage}.partial.json")
    atomic_write_bytes(folder / f"{stage}.json", json.dumps(found).encode())
    print(f"{preset} {stage}: {found['seconds']:.0f} s, {found['peak_bytes'] / 2**30:.2f} GiB", flush=True)


def _row(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / f"{name}.json").read_bytes()) for name in STAGES}


def _keep(preset: str, folder: Path, out: Path) -> None:
    from scm_sdk._util.machine import describe_machine

    table = json.loads(out.read_bytes()) if out.exists() else {"sizes": {}}
    command = shlex.join(["python", "benchmarks/engines/size.py", preset])
    table["sizes"][preset] = {"command": command, "machine": describe_machine(), **_row(folder)}
    atomic_write_bytes(out, json.dumps(table, indent=1).encode() + b"\n")


def _line(preset: str, row: dict[str, Any]) -> str:
    peak = max(stage["peak_bytes"] for stage in row.values()) / 2**30
    return (
        f"{preset}: {row['weights']['parameters'] / 1e6:.1f}M parameters, export {row['export']['seconds']:.0f} s, "
        f"graph {row['export']['graph_bytes'] / 1e6:.0f} MB, fp16 {row['fp16']['seconds']:.0f} s, engine "
        f"{row['engine']['seconds']:.0f} s {row['engine']['engine_bytes'] / 1e6:.0f} MB, peak {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
