"""The ablation's runs: what is trained on what, for how long. ``ablation.py`` does them.

All networks are small transformers on 16x16 pictures. Every student of a data set starts from the same teacher's
weights and has the same processor time; how many iterations that is follows from what one of its iterations was
measured to cost. One learning rate and one way to let it fall serve all.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk.model.networks.transformer import TransformerConfig
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.data.images import load_data
from scm_sdk.train.objectives.trajectory import BLOCK_ITERATIONS

DATASETS = ("avatars", "fashion")
SIZES = {"S": 64, "XS": 32}
"""Name and width of a network; 0.18M and 0.05M parameters."""
TEACHER = "teacher"
METHODS: dict[str, dict[str, Any]] = {
    TEACHER: {"objective": "diffusion", "learning_rate": 1.5e-3, "decay_fraction": 0.5, "warmup_iterations": 100},
    "sCD": {"objective": "scd", "p_mean": -1.0},
    "sCT": {"objective": "sct", "p_mean": -1.0},
    "dsCM": {"objective": "scd", "p_mean": -1.0, "discrete_points": 1024},
    "VSD": {"objective": "vsd"},
    "sCD+VSD": {"objective": "scd", "p_mean": -1.0, "vsd_weight": 1.0},
    "discrete step": {"objective": "cd", "p_mean": 0.8, "discrete_step": 0.4},
    "trajectory": {"objective": "trajectory", "trajectory_steps": 10, "huber": 0.01},
}
"""What each method sets; the rest of the students is in ``STUDENT``."""
STUDENT: dict[str, Any] = {"learning_rate": 5e-4, "decay_fraction": 0.9, "warmup_iterations": 20}
WARMUP_SHARE = 0.25
"""Share of a run in which the tangent is faded in; the paper's 10,000 iterations are at most a tenth of its own."""
LOSS_SWITCHES: dict[str, dict[str, Any]] = {
    "no tangent normalization": {"normalize_tangent": False},
    "no adaptive weighting": {"adaptive_weighting": False},
    "no tangent warm-up": {"tangent_warmup": 0},
}
NETWORK_SWITCHES: dict[str, dict[str, Any]] = {
    "no double normalization": {"double_norm": False},
    "Fourier time, scale 16": {"time_fourier_scale": 16.0},
}
"""These need a teacher of their own."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much each run may take.

    Attributes:
        teacher_seconds: Processor time of a teacher of size S; one of size XS has as many iterations.
        student_seconds: Processor time of each student of size S; one of size XS has as many iterations.
        num_images: Pictures for each figure.
        num_reference: Held-out pictures.
        batch_size: Samples of one iteration.
    """

    teacher_seconds: float = 180.0
    student_seconds: float = 54.0
    num_images: int = 1_000
    num_reference: int = 5_000
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """One row's training.

    Attributes:
        data: Data set.
        method: Name in ``METHODS``.
        size: Name in ``SIZES``.
        seed: Of the student; teachers have 0.
        switch: Which stabilizer is off, or "".
        changes: What that changes in the training.
        network: What it changes in the network.
        longer: Factor on its processor time.
    """

    data: str
    method: str
    size: str = "S"
    seed: int = 0
    switch: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    longer: int = 1

    @property
    def key(self) -> str:
        """Name of the run's folder."""
        parts = [self.data, self.size, self.method, self.switch, str(self.seed)]
        return "-".join(part.replace(" ", "_").replace(",", "") for part in parts if part)

    @property
    def teacher(self) -> AblationRun:
        """The run that makes its teacher."""
        return replace(self, method=TEACHER, seed=0, changes={}, switch=self.switch if self.network else "", longer=1)


def all_runs(datasets: tuple[str, ...] = DATASETS, seeds: tuple[int, ...] = (1, 2)) -> list[AblationRun]:
    """Return the runs in the order in which they are worth having."""
    students = [method for method in METHODS if method != TEACHER]
    runs = [AblationRun(data=data, method=TEACHER) for data in datasets]
    for seed in seeds:
        runs += [AblationRun(data=data, method=method, seed=seed) for method in students for data in datasets]
    for data in datasets:
        student = AblationRun(data=data, method="sCD", seed=seeds[0])
        runs += [replace(student, switch=name, changes=changes) for name, changes in LOSS_SWITCHES.items()]
        plain, fourier = (replace(student, switch=name, network=off) for name, off in NETWORK_SWITCHES.items())
        smaller = replace(student, size="XS")
        runs += [plain.teacher, plain, smaller.teacher, smaller, replace(smaller, method="trajectory")]
        runs += [replace(student, method="sCD+VSD", switch="three times as long", longer=3)]
        runs += [fourier.teacher, fourier]
    return runs


def data_config(data: str, folder: Path) -> DataConfig:
    """Return what is trained on; Fashion-MNIST is halved to 16x16 in ``folder`` first."""
    if data == "avatars":
        return DataConfig(label="hairColor", rows=(0, 10_000))
    return DataConfig(source=str(_halved("fashion-mnist", folder)), label="class")


def held_out(data: str, count: int, folder: Path) -> Any:
    """Return pictures that no run was trained on, (N, 16, 16, C), uint8."""
    if data == "avatars":
        return load_data(DataConfig(rows=(10_000, 10_000 + count))).images
    source = str(_halved("fashion-mnist-t10k", folder))
    return load_data(DataConfig(source=source, rows=(0, count))).images


def _halved(source: str, folder: Path) -> Path:
    """Write a 32x32 source as 16x16, each pixel the mean of four, unless that is done."""
    path = folder / f"{source}-16.npz"
    if not path.exists():
        data = load_data(DataConfig(source=source, label="label"))
        images, labels = data.images[:], data.labels
        assert labels is not None
        means = images.reshape(len(images), 16, 2, 16, 2, 1).mean(axis=(2, 4))
        names = np.array(data.class_names)
        arrays: dict[str, Any] = {"images": np.rint(means).astype(np.uint8), "class": labels, "class_names": names}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, buffer.getvalue())
    return path


def train_config(
    run: AblationRun, budget: Budget, iterations: int, teacher: Path | None, data: DataConfig
) -> TrainConfig:
    """Return a run's config; iterations of a teacher or student as the caller found them."""
    classes, channels = (11, 3) if run.data == "avatars" else (10, 1)
    network = TransformerConfig(
        image_size=16,
        in_channels=channels,
        channels=SIZES[run.size],
        depth=4,
        num_classes=classes,
        time_max_period=10.0,
        **run.network,
    )
    options: dict[str, Any] = {**({} if run.method == TEACHER else STUDENT), **METHODS[run.method]}
    options["tangent_warmup"] = round(WARMUP_SHARE * iterations)
    options.update(run.changes)
    if options["objective"] == "sct":
        options["init_from"] = str(teacher)
    elif run.method != TEACHER:
        options["teacher"] = str(teacher)
    options.update(data=data, network=network, batch_size=budget.batch_size, num_iterations=iterations, seed=run.seed)
    return TrainConfig.from_settings(options)


def iterations_for(seconds: float, *, step: float, block: float) -> int:
    """Return the iterations that ``seconds`` pay for.

    Args:
        seconds: Processor time.
        step: What an iteration costs, seconds.
        block: What each begun block of ``BLOCK_ITERATIONS`` costs before its first one: trajectories are solved then.
    """
    whole = BLOCK_ITERATIONS * step + block
    blocks, left = divmod(seconds, whole)
    return max(2, int(blocks) * BLOCK_ITERATIONS + max(0, math.floor((left - block) / step)))
