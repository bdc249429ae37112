"""Compute the limits of FP16 and INT8 on a transformer for any graph, with rounding emulated in PyTorch.

    python benchmarks/fidelity/precision_limits.py scm-demo/avatars --json benchmarks/results/precision_limits.json

Only the linear layers over patches are touched: their weights, what they read, or both are rounded, all else is
float32. INT8 has a scale for each output channel of a weight and one for each tensor that is read, at each step its
own, from the largest values of other pictures; channels are equalized first by the square roots of both sides' largest
(SmoothQuant's exponent 1/2), and the first and last layer stay. What this loses no graph of such layers can keep.
"""

import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scm_sdk import ConsistencyModel, Sampler
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec

CALIBRATION_SEEDS = range(100_000, 100_128)
QMAX = 127
Layers = dict[str, nn.Linear]
Largest = dict[tuple[str, int], Tensor]


class Steps:
    """Counts the calls of a network, so that a layer knows in which step it runs."""

    def __init__(self, network: nn.Module, num_inference_steps: int) -> None:
        self.calls, self.steps = -1, num_inference_steps
        network.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    @property
    def now(self) -> int:
        """From 0."""
        return self.calls % self.steps


def patch_layers(network: nn.Module, *, ends: bool) -> Layers:
    """Return the linear layers that read patches, with or without the first and the last."""
    conditioning = ("embed", "modulation", "label", "time")
    found = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    layers = {n: m for n, m in found.items() if not n.startswith(conditioning)}
    return {n: m for n, m in layers.items() if ends or n not in ("patch_in", "patch_out")}


def make_images(model: ConsistencyModel, spec: SamplerSpec, seeds: range) -> np.ndarray:
    """Return the pictures of these seeds, labels in turn."""
    sampler = Sampler(model, spec).eval()
    labels = torch.arange(len(seeds)) % max(spec.num_classes, 1)
    images = []
    for start in range(0, len(seeds), 32):
        noise = [torch.from_numpy(z) for z in draw_noise(spec, seeds[start : start + 32])]
        given = [labels[start : start + 32]] if spec.num_classes else []
        with torch.inference_mode():
            images.append(sampler(*noise, *given).numpy())
    return np.concatenate(images)


@contextmanager
def layers_compute(layers: Layers, compute: Callable[[str, nn.Linear, Tensor], Tensor]) -> Iterator[None]:
    """Let each layer compute so."""
    for name, layer in layers.items():
        layer.forward = lambda x, name=name, layer=layer: compute(name, layer, x)  # type: ignore[method-assign, misc]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def half(weights: bool, inputs: bool) -> Callable[[str, nn.Linear, Tensor], Tensor]:
    """Round to float16."""

    def compute(_: str, layer: nn.Linear, x: Tensor) -> Tensor:
        weight = layer.weight.half().float() if weights else layer.weight
        return F.linear(x.half().float() if inputs else x, weight, layer.bias)

    return compute


def int8(
    weights: bool, inputs: bool, largest: Largest, steps: Steps, only: int | None = None
) -> Callable[[str, nn.Linear, Tensor], Tensor]:
    """Round to int8, in every step or in one alone."""
    over_steps: dict[str, Tensor] = {}
    for (name, _), channels in largest.items():
        over_steps[name] = torch.maximum(over_steps.get(name, channels), channels)

    def compute(name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        if only not in (None, steps.now):
            return F.linear(x, layer.weight, layer.bias)
        factor = (over_steps[name] / layer.weight.abs().amax(0).clamp_min(1e-6)).sqrt().clamp_min(1e-3)
        weight, x = layer.weight * factor, x / factor
        if weights:
            scale = weight.abs().amax(1, keepdim=True) / QMAX
            weight = (weight / scale).round() * scale
        if inputs:
            step = (largest[name, steps.now] / factor).max() / QMAX
            x = (x / step).round().clamp(-QMAX, QMAX) * step
        return F.linear(x, weight, layer.bias)

    return compute


def largest_read(model: ConsistencyModel, spec: SamplerSpec, layers: Layers, steps: Steps) -> Largest:
    """Return the largest |x| of each channel that each layer reads in each step, over the calibration's pictures."""
    found: Largest = defaultdict(lambda: torch.zeros(()))

    def compute(name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        found[name, steps.now] = torch.maximum(found[name, steps.now], x.abs().flatten(0, -2).amax(0))
        return F.linear(x, layer.weight, layer.bias)

    with layers_compute(layers, compute):
        make_images(model, spec, CALIBRATION_SEEDS)
    return dict(found)


def psnr(images: np.ndarray, exact: np.ndarray, peak: float) -> dict[str, float]:
    """Return the PSNR of all pictures and of the median one, dB."""
    squares = ((images - exact) ** 2).reshape(len(images), -1).mean(1)
    by_picture = [10 * np.log10(peak**2 / max(float(square), 1e-20)) for square in squares]
    return {"all_db": float(10 * np.log10(peak**2 / squares.mean())), "median_db": statistics.median(by_picture)}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--num-images", type=click.IntRange(1), default=512, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the result.")
def main(checkpoint: Path, num_images: int, out: Path | None) -> None:
    """Round the layers of CHECKPOINT, a transformer, and look at its pictures."""
    results: list[dict[str, Any]] = []
    for count in (1, 2):
        model = ConsistencyModel.from_pretrained(checkpoint).eval()
        spec = model.spec(count)
        steps = Steps(model.network, count)
        low, high = spec.value_range
        every, inner = (patch_layers(model.network, ends=ends) for ends in (True, False))
        exact = make_images(model, spec, range(num_images))
        largest = largest_read(model, spec, inner, steps)
        ways = {
            "fp16, weights": (every, half(True, False)),
            "fp16, what is read": (every, half(False, True)),
            "fp16, both": (every, half(True, True)),
            "int8, weights": (inner, int8(True, False, largest, steps)),
            "int8, what is read": (inner, int8(False, True, largest, steps)),
            "int8, both": (inner, int8(True, True, largest, steps)),
        }
        if count > 1:
            ways |= {f"int8, both, step {k} alone": (inner, int8(True, True, largest, steps, k)) for k in range(count)}
        for name, (layers, compute) in ways.items():
            with layers_compute(layers, compute):
                row = psnr(make_images(model, spec, range(num_images)), exact, high - low)
            results.append({"steps": count, "rounded": name, **row})
            print(f"{count} steps  {name:<28}{row['all_db']:6.1f} dB, median {row['median_db']:5.1f}", flush=True)
    if out:
        record = {"command": shlex.join(["python", *sys.argv]), "machine": describe_machine(), "results": results}
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
