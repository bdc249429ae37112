"""Measure how much faster a student is than its teacher: 35 calls of the diffusion model, 1 and 2 of the sampler.

    python benchmarks/speed/teacher_ratio.py benchmarks/teachers/avatars scm-demo/avatars --json teacher_ratio.json

The teacher runs in PyTorch with the second-order solver; the student in PyTorch too, in ONNX Runtime and OpenVINO.
"""

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
import torch

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk.inference.backends import Backend
from scm_sdk.inference.latency import measure
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.noise import draw_noise
from scm_sdk.train.data.samples import sample_teacher


@click.command()
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--solver-steps", type=int, default=18, show_default=True, help="2 n - 1 calls.")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=20, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the raw samples.")
def main(
    teacher: Path, bundle: Path, solver_steps: int, batches: tuple[int, ...], rounds: int, out: Path | None
) -> None:
    """Time TEACHER and BUNDLE in turn."""
    model = ConsistencyModel.from_pretrained(teacher).eval()
    calls = f"teacher, {2 * solver_steps - 1} calls, torch"
    results = []
    for batch in batches:
        noise = torch.from_numpy(draw_noise(model.spec(1), range(batch))[0])
        labels = torch.arange(batch) % model.config.num_classes if model.config.num_classes else None

        def solve(noise: torch.Tensor = noise, labels: torch.Tensor | None = labels) -> object:
            return sample_teacher(model, noise, labels, num_steps=solver_steps)

        candidates: dict[str, Generator | Backend | Callable[[], object]] = {calls: solve}
        with ExitStack() as stack:
            for backend in ("torch", "onnxruntime", "openvino"):
                for steps in (1, 2):
                    candidates[f"sCM, {steps} step{'s' * (steps > 1)}, {backend}"] = stack.enter_context(
                        Generator.from_pretrained(bundle, backend=backend, precision="fp32", num_inference_steps=steps)
                    )
            results.append(measure(candidates, batch=batch, rounds=rounds))
        for timing in results[-1]:
            low, high = timing.speedup_interval
            found = f"{timing.median_ms:8.1f} ms  {timing.speedup:5.1f}x ({low:.1f}..{high:.1f})"
            print(f"batch {batch:>2}  {timing.name:<28} {found}")
    if out:
        record = {"command": shlex.join(["python", *sys.argv]), "latency": [latency.to_dict() for latency in results]}
        atomic_write_bytes(out, json.dumps(record, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
