r"""Compare ``Generator`` with other ways to run the same model on a CPU, in pairs of calls in one process.

    pip install --editable ".[cpu,bench]"
    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/speed/peers.py scm-demo/avatars --threads 1 \
        --json benchmarks/results/peers-avatars.json

All get the same noise and labels. Those of float32 must return the same images to within 1e-4 of ``sigma_data``. The
others are listed with their PSNR against them, since a default may be bfloat16:

* ``generator``     this package, what ``auto`` takes in float32 (``fp32`` or ``fp32-cpu``) once
  ``gen.benchmark(batch=...)`` measured here; the whole call
* ``onnxruntime``   this package with that backend
* ``eager``, ``channels_last``, ``compile``   PyTorch on ``scm_sdk.model.Sampler``
* ``ort_loop``      the network alone as an ONNX file and the steps in Python, as optimum runs diffusion models
* ``diffusers``     diffusers' ``SCMScheduler`` around the PyTorch network
* ``openvino``      OpenVINO on the bundle's own sampler graph, fixed to the batch, in float32
* ``openvino_default``   the same without a hint: OpenVINO chooses the precision by the CPU
* ``generator_bf16``   this package, the fastest with ``precision="bf16"``
* ``eager_bf16``, ``compile_bf16``   PyTorch under autocast

One measured call of each per round, in random order, short ones after unmeasured ones, as ``scm_sdk.measure`` does;
ratios come from the same rounds. With ``--threads 1`` they are of processor time, which other programs on the machine
hardly stretch; otherwise of wall time. The share of the peak is the model's multiplications and additions over the
time, against what a float32 matrix product reaches here. A file holds results of one class of CPU: one of another class
is not overwritten.
"""

import json
import math
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
from peer_ways import PEERS, REDUCED, Inputs, Peer, generator, model_of, open_peers
from result_files import check_class

from scm_sdk import Generator, Sampler
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk._util.processor import usable_cores
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import BackendUnavailable
from scm_sdk.inference.latency import SHORT_MS, UNMEASURED
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec

TOLERANCE = 1e-4
OURS = {"generator": ("fp32", "fp32-cpu"), "generator_bf16": ("bf16",)}
"""What this package is timed as, each the fastest of these precisions."""
LIBRARIES = ("scm-sdk", "torch", "onnxruntime", "diffusers", "openvino", "numpy")


def fastest_generator(
    bundle: Path, steps: int, batch: int, threads: int | None, precisions: tuple[str, ...] = ("fp32", "fp32-cpu")
) -> Generator:
    """Open what ``auto`` takes in these precisions after all that passed ``validate`` was measured at this batch."""
    options: dict[str, Any] = {"num_threads": threads, "num_inference_steps": steps}
    made = {a.precision for a in Bundle.open(bundle, verify="none").artifacts(format="onnx")} | {"bf16"}
    times: dict[str, float] = {}
    for precision in precisions:
        if precision in made:
            with Generator.from_pretrained(bundle, precision=precision, **options) as gen:
                if all(row.backend == "torch" for row in gen.plan().accepted):
                    raise click.ClickException(f"no {precision} graph passed. First: scm-export validate {bundle}")
                times[precision] = min(each.median_ms for each in gen.benchmark(batch=batch))
    return Generator.from_pretrained(bundle, precision=min(times, key=times.__getitem__), **options)


def peak_gflops(clock: Callable[[], float]) -> float:
    """Return the best of ten float32 matrix products of 1024 x 1024, in 10^9 operations a second."""
    import torch

    a, b = torch.rand(2, 1024, 1024).unbind()
    times = []
    for _ in range(10):
        began = clock()
        a @ b
        times.append(clock() - began)
    return 2 * 1024**3 / min(times) / 1e9


def gflop(gen: Generator, spec: SamplerSpec) -> float:
    """Return the matrix products and convolutions of one image, 10^9 operations."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [torch.zeros((1, *t.shape), dtype=torch.int64 if t.dtype == "int64" else None) for t in spec.inputs]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        Sampler(model_of(gen), spec)(*inputs)
    return float(counter.get_total_flops()) / 1e9


def compare(
    peers: dict[str, Peer], inputs: Inputs, rounds: int, clock: Callable[[], float], value_range: tuple[float, float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time each peer once a round, ms, and return the PSNR of those that may compute in less than float32, dB."""
    want, psnr = peers["generator"](inputs), {}
    for name, peer in list(peers.items()):
        difference = peer(inputs) - want
        off = float(np.abs(difference).max())
        if name in REDUCED:
            span = value_range[1] - value_range[0]
            psnr[name] = 10 * math.log10(span**2 / max(float(np.square(difference, dtype=np.float64).mean()), 1e-20))
        elif not off <= TOLERANCE:
            raise click.ClickException(f"{name} differs by {off:.1e}, expected at most {TOLERANCE:.0e}")
    times: dict[str, list[float]] = {name: [] for name in peers}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(peers), len(peers)):
            for _ in range(UNMEASURED if not times[name] or times[name][-1] < SHORT_MS else 0):
                peers[name](inputs)
            began = clock()
            peers[name](inputs)
            times[name].append((clock() - began) * 1e3)
    return times, psnr


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=[1, 8, 32], show_default=True)
@click.option("--steps", "all_steps", type=click.IntRange(1), multiple=True, default=[1, 2], show_default=True)
@click.option("--peer", "names", type=click.Choice(PEERS), multiple=True, default=PEERS, help="May be repeated.")
@click.option("--rounds", type=click.IntRange(3), default=30, show_default=True, help="At batch 1; fewer at larger.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each; the libraries' own choice without.")
@click.option("--work", type=click.Path(path_type=Path), default="runs/peers", help="Folder for the network's ONNX.")
@click.option("--note", default="", help="Put into the JSON: what a reader must know of the machine.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the raw samples.")
def main(
    bundle: Path,
    batches: tuple[int, ...],
    all_steps: tuple[int, ...],
    names: tuple[str, ...],
    rounds: int,
    threads: int | None,
    work: Path,
    note: str,
    out: Path | None,
) -> None:
    """Time the ways to run BUNDLE's model."""
    import torch

    check_class(out)
    if threads:
        torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    results = []
    peak = peak_gflops(clock)
    print(
        f"matrix product {peak:.1f} GFLOP/s;  {'steps batch':<12}{'peer':<17}{'median ms':>10}{'ratio':>8}{'peak':>7}"
    )
    chosen = {}
    with Generator.from_pretrained(bundle, backend="onnxruntime", precision="fp32", num_threads=threads) as gen:
        for steps in all_steps:
            spec = gen.opened(steps).spec
            if not spec.num_classes:
                raise click.ClickException(f"{bundle} has no labels, expected a model with some: each way is fed them.")
            per_image = gflop(gen, spec)
            opened = dict(open_peers(gen, spec, names, work, threads))
            absent = {name: reason for name, reason in opened.items() if isinstance(reason, str)}
            peers = {name: peer for name, peer in opened.items() if not isinstance(peer, str)}
            for batch in batches:
                inputs = (draw_noise(spec, range(batch)), np.arange(batch, dtype=np.int64) % spec.num_classes)
                with ExitStack() as stack:
                    ways: dict[str, Peer] = {}
                    for name, precisions in OURS.items():
                        if name in ("generator", *names):
                            try:
                                own = fastest_generator(bundle, steps, batch, threads, precisions)
                            except BackendUnavailable as exc:  # no bf16 on this CPU
                                absent[name] = str(exc)
                                continue
                            row = stack.enter_context(own).opened().row
                            chosen[f"{name}, {steps} steps, batch {batch}"] = f"{row.backend} {row.precision}"
                            ways[name] = generator(own, spec)
                    rounds_here = max(3, rounds // round(batch**0.6))
                    times, psnr = compare({**ways, **peers}, inputs, rounds_here, clock, spec.value_range)
                for name, samples in times.items():
                    # How many times as long as the generator's in the same round.
                    ratio = statistics.median(a / b for a, b in zip(samples, times["generator"], strict=True))
                    share = per_image * batch / (statistics.median(samples) / 1e3) / peak
                    line = f"{steps} {batch:<10}{name:<17}{statistics.median(samples):>10.2f}{ratio:>8.2f}{share:>7.0%}"
                    print(f"{'':<33}{line}{f'{psnr[name]:>9.1f} dB' if name in psnr else ''}", flush=True)
                    results.append(
                        {"steps": steps, "batch": batch, "peer": name, "time_over_generator": ratio}
                        | {"share_of_peak": share, "psnr_db": psnr.get(name)}
                        | {"samples_ms": [round(x, 4) for x in samples]}
                    )
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine() | {"allowed_cpus": usable_cores()},
        "note": note,
        "clock": "processor time of the process" if threads == 1 else "wall",
        "threads": threads,
        "versions": {name: _version(name) for name in LIBRARIES},
        "matmul_peak_gflops": peak,
        "absent": absent,
        "generator_runs": chosen,
        "results": results,
    }
    if out:
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
