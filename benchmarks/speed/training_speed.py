r"""Measure training samples per second: each implementation of a step and a plain transcription, in turn.

    python benchmarks/speed/training_speed.py benchmarks/teachers/avatars --threads 1 \
        --json benchmarks/results/training-speed.json

One iteration of each way per round, first another one each round: loss, gradient, clipping, optimizer and average. The
plain transcription is Algorithm 1 of arXiv 2410.11081 as a reader would write it: the tangent in a pass of its own, the
student's own output in another, the optimizer of the library; the ratios say what this package's way costs or saves. A
compiled way must give the loss of the eager one, with the whole tangent. Waiting for data is reported separately, as
the share of an iteration.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.train.batches import Feed
from scm_sdk.train.build import Run, build
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.data.images import load_data
from scm_sdk.train.objectives.base import Batch
from scm_sdk.train.parallel.distributed import Scale, joined
from scm_sdk.train.parallel.sharding import clip_gradients
from scm_sdk.train.prepare import resolve

PLAIN = "sCD, plain transcription"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"objective": "scd"},
    "sCD, jvp2": {"objective": "scd", "tangent_mode": "jvp2"},
    "sCD, jvp": {"objective": "scd", "tangent_mode": "jvp"},
    "sCD, fd": {"objective": "scd", "tangent_mode": "fd"},
    "sCD, jvp2, compiled": {"objective": "scd", "tangent_mode": "jvp2", "compile": True},
    "sCD, jvp2, bf16": {"objective": "scd", "tangent_mode": "jvp2", "precision": "bf16"},
    "sCD, jvp2, compiled, bf16": {"objective": "scd", "tangent_mode": "jvp2", "compile": True, "precision": "bf16"},
    "teacher": {"objective": "diffusion"},
    "teacher, compiled": {"objective": "diffusion", "compile": True},
}
USUAL = tuple(name for name in WAYS if "bf16" not in name)  # which a CPU without its instructions only emulates
TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2}
"""Largest difference of two ways' first losses, relative."""


def plain_step(run: Run, teacher: torch.nn.Module) -> Callable[[Batch, int], torch.Tensor]:
    """Return Algorithm 1 with two passes of the student, as one writes it from the paper."""
    student, sigma_data, c = run.state.network, run.config.sigma_data, run.config.tangent.c
    logvar = run.state.modules["logvar"]

    def loss(batch: Batch, iteration: int) -> torch.Tensor:
        t, labels = batch.t, batch.class_labels
        column = t.view(-1, 1, 1, 1)
        cos, sin = torch.cos(column), torch.sin(column)
        x_t = cos * batch.x_0 + sin * batch.z
        with torch.no_grad():
            dxdt = sigma_data * teacher(x_t / sigma_data, t, labels)
            inputs = (x_t / sigma_data, t)
            tangents = (cos * sin * dxdt / sigma_data, (cos * sin).flatten())
            F, dF = torch.func.jvp(lambda x, t: student(x, t, labels), inputs, tangents)[:2]
            r = min(1.0, iteration / run.config.tangent.warmup_iterations)
            g = -(cos**2) * (sigma_data * F - dxdt) - r * (cos * sin * x_t + sigma_data * dF)
            g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + c)
        residual = student(x_t / sigma_data, t, labels) - F - g
        w = logvar(t)
        weighted: torch.Tensor = torch.exp(w) * residual.square().mean((1, 2, 3)) - w
        return weighted.mean()

    return loss


def step_of(run: Run, feed: Feed, loss: Callable[[Batch, int], torch.Tensor]) -> Callable[[], tuple[float, float]]:
    """Return one iteration: its loss, and the seconds it waited for data."""

    def step() -> tuple[float, float]:
        iteration = run.state.iteration
        began = time.perf_counter()
        batch = feed(iteration)
        waited = time.perf_counter() - began
        run.optimizer.zero_grad(set_to_none=True)
        found = loss(batch, iteration)
        found.backward()  # type: ignore[no-untyped-call]
        clip_gradients(run.parameters, run.config.optimizer.grad_clip)
        run.move()
        run.state.iteration += 1
        return float(found.detach()), waited

    return step


@click.command()
@click.argument("teacher", type=click.Path(path_type=Path, exists=True))
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True)
@click.option("--way", "names", type=click.Choice(list(WAYS)), multiple=True, default=USUAL, help="May be repeated.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's own choice when absent.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the raw samples.")
def main(
    teacher: Path, batch_size: int, rounds: int, names: tuple[str, ...], threads: int | None, out: Path | None
) -> None:
    """Time training steps that distill TEACHER, a folder of the shipped data's labels."""
    if threads:
        torch.set_num_threads(threads)
    source = DataConfig(source="avatars", label="hairColor", rows=(0, 10_000))
    data = load_data(source)
    followed = ConsistencyModel.from_pretrained(teacher).eval().requires_grad_(False)
    steps: dict[str, Callable[[], tuple[float, float]]] = {}
    with ExitStack() as stack:
        world = stack.enter_context(joined(Scale()))
        for name in dict.fromkeys((PLAIN, *names)):
            way = WAYS[name]
            start = {"teacher" if way["objective"] == "scd" else "init_from": str(teacher)}
            common = {"data": source, "batch_size": batch_size, "tangent_warmup": 100, "optimizer": "adam"}
            config = TrainConfig.from_settings({**common, **start, **way})
            folder = Path(stack.enter_context(TemporaryDirectory()))
            run = build(resolve(config, data), folder, Scale(), world)
            run.state.iteration = run.config.tangent.warmup_iterations  # before, the loss of equal networks is 0
            feed = stack.enter_context(Feed(run.config, data))
            ours = run.loss
            loss = plain_step(run, followed.network) if name == PLAIN else lambda b, i, ours=ours: ours(b, i)[0]
            steps[name] = step_of(run, feed, loss)
        times, waits = _measure(steps, rounds)
    results = []
    print(f"{'':<28}{'ms':>10}{'samples/s':>12}{'speed-up':>10}{'waiting':>9}")
    for name, samples in times.items():
        speedup = statistics.median(a / b for a, b in zip(times[PLAIN], samples, strict=True))
        median = statistics.median(samples)
        waiting = statistics.median(waits[name]) / median
        print(f"{name:<28}{median * 1e3:>10.1f}{batch_size / median:>12.1f}{speedup:>10.2f}{waiting:>9.1%}")
        results.append({"way": name, "speedup": speedup, "waiting": waiting, "seconds": [round(s, 5) for s in samples]})
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "versions": {name: metadata.version(name) for name in ("scm-sdk", "torch")},
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "results": results,
        }
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


def _measure(
    steps: dict[str, Callable[[], tuple[float, float]]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seconds of each step and of its waiting; two rounds to warm up, whose first losses are compared."""
    first: dict[str, float] = {}
    for name, step in steps.items():
        first[name] = step()[0]
        step()
        kind = name.partition(",")[0]
        like = next(other for other in first if other.partition(",")[0] == kind)
        allowed = TOLERANCE["bf16" if "bf16" in name else "fp32"]
        if not abs(first[name] - first[like]) <= allowed * abs(first[like]):
            raise click.ClickException(
                f"{name}: first loss {first[name]:.5f}, expected that of {like}, {first[like]:.5f}"
            )
    times: dict[str, list[float]] = {name: [] for name in steps}
    waits: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            began = time.perf_counter()
            waits[name].append(steps[name]()[1])
            times[name].append(time.perf_counter() - began)
    return times, waits


if __name__ == "__main__":
    main()
