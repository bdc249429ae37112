"""Compare objectives and stabilizers: teacher and students at equal processor time on two small data sets.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/study/ablation.py --work runs/ablation \
        --out benchmarks/results/ablation

For each run: the Fréchet and kernel distances of EfficientNet-Lite0's features to held-out pictures after 1, 2 and 4
steps. A run that is done is not done again: stop it at any time and run the same command. ``OUT.json`` and ``OUT.md``
are written after every run, ``OUT.png`` at the end.
"""

import json
import platform
import shlex
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ablation_runs as plan
import click
import numpy as np
import torch
from ablation_runs import AblationRun, Budget
from ablation_table import show, write_markdown, write_pictures

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.evaluate.quality.cached import cached
from scm_sdk.evaluate.quality.distances import feature_stats, frechet_distance, kernel_distance
from scm_sdk.evaluate.quality.features import content_key, extract_features
from scm_sdk.evaluate.quality.nets import effnet_lite0
from scm_sdk.evaluate.quality.sampling import sample_diffusion, sample_student
from scm_sdk.train.data.images import load_data
from scm_sdk.train.loop import LOG_FILE, Hooks, train

STEPS = (1, 2, 4)
RESULT = "result.json"
COSTS = "costs.json"
PROBED = 12
LIBRARIES = ("scm-sdk", "torch", "numpy")


class Ablation:
    """The work folder: its data, features, costs and finished runs."""

    def __init__(self, work: Path, budget: Budget, runs: list[AblationRun]) -> None:
        self.work, self.budget = work, budget
        self._students = list(dict.fromkeys(run.method for run in runs if run.method != plan.TEACHER))
        self._reference: dict[str, np.ndarray] = {}

    def finished(self, run: AblationRun) -> bool:
        """Whether a run has its result."""
        return (self.work / run.key / RESULT).exists()

    def result(self, run: AblationRun) -> dict[str, Any]:
        """Return a finished run's result."""
        found: dict[str, Any] = json.loads((self.work / run.key / RESULT).read_bytes())
        return found

    def do(self, run: AblationRun) -> None:
        """Train a run, or continue it, and write its figures."""
        folder = self.work / run.key
        is_teacher = run.method == plan.TEACHER
        iterations = self._iterations(run)
        config = plan.train_config(
            run, self.budget, iterations, self.work / run.teacher.key, plan.data_config(run.data, self.work)
        )
        start, before = time.process_time(), _spent(folder)
        # Adds to what earlier sittings spent, of which the last checkpoint knows.
        hooks = Hooks(
            log_every=10, checkpoint_every=max(100, iterations // 5), on_log=lambda _: _spend(folder, start, before)
        )
        train(config, folder, hooks)
        _spend(folder, start, before)
        trained = time.process_time()
        figures = {}
        if is_teacher:
            figures["35 calls"] = self._score(run, sample_diffusion(folder, self.budget.num_images).images)
        for steps in STEPS:  # a teacher's are where its students begin
            pictures = sample_student(folder, self.budget.num_images, num_inference_steps=steps, backend="torch")
            figures[str(steps)] = self._score(run, pictures.images)
        log = [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        norms = [line["grad_norm"] for line in log]
        result = {
            "data": run.data,
            "method": run.method,
            "size": run.size,
            "switch": run.switch,
            "seed": run.seed,
            "iterations": iterations,
            "cpu_seconds": round(_spent(folder), 1),
            "evaluation_cpu_seconds": round(time.process_time() - trained, 1),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "parameters": _parameters(folder),
            "gradient_norm": {"median": float(np.median(norms)), "largest": max(norms)},
            "skipped_steps": log[-1]["skipped"],
            "figures": figures,
            "config": json.loads(config.to_json()),
        }
        atomic_write_bytes(folder / RESULT, json.dumps(result, indent=1).encode())

    def floor(self, data: str) -> dict[str, Any]:
        """Return what real pictures of the training rows score."""
        images = load_data(plan.data_config(data, self.work)).images[: self.budget.num_images]
        key = content_key(images)
        path = self.work / f"floor-{key[:16]}.json"
        if not path.exists():
            atomic_write_bytes(path, json.dumps(self._score_of(data, images)).encode())
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found

    def _iterations(self, run: AblationRun) -> int:
        """Return how long a run is: what size S can do in its time, whatever the data and the seed."""
        seconds = (
            self.budget.teacher_seconds if run.method == plan.TEACHER else run.longer * self.budget.student_seconds
        )
        path = self.work / COSTS
        costs = json.loads(path.read_bytes()) if path.exists() else {}
        if run.method not in costs:
            costs.update(self._costs([plan.TEACHER] if run.method == plan.TEACHER else self._students, run.data))
            atomic_write_bytes(path, json.dumps(costs, indent=1).encode())
        return plan.iterations_for(seconds, **costs[run.method])

    def _costs(self, methods: list[str], data: str) -> dict[str, dict[str, float]]:
        """Measure an iteration of each method, in turn: what slows one round down slows all methods down."""
        rounds = [{method: self._probe(AblationRun(data=data, method=method)) for method in methods} for _ in range(3)]
        medians = {method: np.median([found[method] for found in rounds], axis=0).tolist() for method in methods}
        return {method: {"step": step, "block": block} for method, (step, block) in medians.items()}

    def _probe(self, run: AblationRun) -> tuple[float, float]:
        """Return the seconds of an iteration, and those of the block of trajectories before the first."""
        marks = [time.process_time()]
        hooks = Hooks(on_step=lambda _: marks.append(time.process_time()), log_every=10**6, checkpoint_every=10**6)
        config = plan.train_config(
            run, self.budget, PROBED, self.work / run.teacher.key, plan.data_config(run.data, self.work)
        )
        with TemporaryDirectory() as scratch:
            train(config, scratch, hooks)
        first, _, *others = np.diff(marks)
        step = float(np.median(others))
        return step, float(first - step) if run.method == "trajectory" else 0.0

    def _score(self, run: AblationRun, images: np.ndarray) -> dict[str, Any]:
        return self._score_of(run.data, images)

    def _score_of(self, data: str, images: np.ndarray) -> dict[str, Any]:
        real = self._real(data)
        features = _features(images)
        kid, interval = kernel_distance(features, real)
        fd = frechet_distance(feature_stats(features), feature_stats(real))
        return {"fd": fd, "kid": kid, "kid_interval": interval}

    def _real(self, data: str) -> np.ndarray:
        if data not in self._reference:
            images = plan.held_out(data, self.budget.num_reference, self.work)
            shape = (len(images), effnet_lite0().dim)
            self._reference[data] = np.asarray(
                cached(self.work, "features", content_key(images), shape, np.float32, lambda: _features(images))
            )
        return self._reference[data]

    def collect(self, runs: list[AblationRun], out: Path) -> dict[str, Any]:
        """Write everything that is finished as JSON and Markdown."""
        done = [run for run in runs if self.finished(run)]
        table = {
            "command": shlex.join(["python", "benchmarks/study/ablation.py", *sys.argv[1:]]),
            "machine": describe_machine(),
            "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}},
            "metric": effnet_lite0().metric(self.budget.num_images),
            "budget": vars(self.budget),
            "costs": json.loads((self.work / COSTS).read_bytes()),
            "floor": {data: self.floor(data) for data in dict.fromkeys(run.data for run in done)},
            "runs": [self.result(run) for run in done],
        }
        atomic_write_bytes(out.with_suffix(".json"), json.dumps(table, indent=1).encode() + b"\n")
        write_markdown(table, out.with_suffix(".md"))
        return table


def _features(images: np.ndarray) -> np.ndarray:
    return extract_features(images, batch_size=16)  # the fastest on one core


def _spent(folder: Path) -> float:
    path = folder / "cpu_seconds"
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


def _spend(folder: Path, start: float, before: float) -> None:
    atomic_write_bytes(folder / "cpu_seconds", f"{before + time.process_time() - start:.2f}".encode())


def _parameters(folder: Path) -> int:
    from scm_sdk.model.consistency import ConsistencyModel

    return sum(p.numel() for p in ConsistencyModel.from_pretrained(folder).parameters())


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Files OUT.json, OUT.md and OUT.png.")
@click.option("--data", "datasets", multiple=True, type=click.Choice(plan.DATASETS), default=plan.DATASETS)
@click.option("--seed", "seeds", multiple=True, type=int, default=(1, 2), show_default=True, help="Of the students.")
@click.option("--teacher-seconds", type=float, default=Budget.teacher_seconds, show_default=True)
@click.option("--student-seconds", type=float, default=Budget.student_seconds, show_default=True)
@click.option("--num-images", type=click.IntRange(16), default=Budget.num_images, show_default=True)
@click.option("--num-reference", type=click.IntRange(16), default=Budget.num_reference, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=Budget.batch_size, show_default=True)
@click.option("--only", multiple=True, metavar="METHOD", help="These methods and what they need; all by default.")
@click.option("--until", metavar="HH:MM", help="Begin no run after this time of the day, UTC.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(
    work: Path, out: Path, datasets: tuple[str, ...], seeds: tuple[int, ...], only: tuple[str, ...],
    until: str | None, threads: int, **budget: Any,
) -> None:  # fmt: skip
    """Do what is left of the ablation and print its table."""
    torch.set_num_threads(threads)
    runs = plan.all_runs(datasets, seeds)
    if only:
        asked = [run for run in runs if run.method in only]
        runs = [run for run in runs if run in asked or run in [other.teacher for other in asked]]
    ablation = Ablation(work, Budget(**budget), runs)
    work.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs):
        if ablation.finished(run):
            continue
        if until and datetime.now(timezone.utc).strftime("%H:%M") >= until:
            break
        print(f"{time.strftime('%H:%M:%S')}  {number + 1} of {len(runs)}: {run.key}", flush=True)
        ablation.do(run)
        ablation.collect(runs, out)
    show(ablation.collect(runs, out))
    write_pictures([run for run in runs if ablation.finished(run)], work, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
