"""The paper's runs as named configs: ``scm-export train --recipe cifar10-teacher --dry-run`` prints one.

Values are those of the paper's tables 4 and 5; values that the tables do not state are marked. Folders are defaults: a
student expects its teacher in the output folder of the teacher's recipe.

Source: arXiv 2410.11081, appendix G; learning-rate ramp and averages as in EDM2, arXiv 2312.02696.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import ConfigError
from ..model.networks.presets import PRESETS
from .config import DataConfig, TrainConfig

FINE = 16
"""Largest resolution with dropout in the paper's students."""
_SIZES = ("s", "m", "l", "xl", "xxl")


class _Column(msgspec.Struct, frozen=True, kw_only=True):
    """One column of the tables: teacher iterations in thousands, learning rates, dropouts, averages."""

    thousands: tuple[int, ...]
    learning_rate: tuple[float, ...]
    sigma_rel: tuple[float, ...]
    teacher_dropout: tuple[float, ...]
    sct_dropout: tuple[float, ...]
    scd_dropout: tuple[float, ...]


_IMAGENET64 = _Column(
    thousands=(1048, 1486, 761, 540),
    learning_rate=(1e-2, 9e-3, 8e-3, 7e-3),
    sigma_rel=(0.075, 0.06, 0.04, 0.04),
    teacher_dropout=(0.0, 0.1, 0.1, 0.1),
    sct_dropout=(0.45,) * 4,
    scd_dropout=(0.0,) * 4,
)
_IMAGENET512 = _Column(
    thousands=(1048, 1048, 696, 598, 376),
    learning_rate=(1e-2, 9e-3, 8e-3, 7e-3, 6.5e-3),
    sigma_rel=(0.025, 0.03, 0.015, 0.02, 0.015),
    teacher_dropout=(0.0, 0.1, 0.1, 0.1, 0.1),
    sct_dropout=(0.25, 0.35, 0.35, 0.35, 0.35),
    scd_dropout=(0.0, 0.1, 0.1, 0.1, 0.1),
)


def _cifar10(kind: str) -> dict[str, Any]:
    common = {"batch_size": 512, "epsilon": 1e-8, "grad_clip": 0.0, "decay_fraction": 0.0, "ema_halflife": 500_000}
    if kind == "teacher":
        # Table 4 states no warm-up: EDM's, 10 million images.
        teacher = {"optimizer": "adam", "learning_rate": 1e-3, "betas": (0.9, 0.999), "warmup_iterations": 19_531}
        return {**common, **teacher, "dropout": 0.13, "p_mean": -1.2, "p_std": 1.2, "num_iterations": 400_000}
    student = {"optimizer": "radam", "learning_rate": 1e-4, "betas": (0.9, 0.99), "warmup_iterations": 0}
    # The number of iterations is not in the tables; 400k gives the paper's FIDs in a reproduction.
    student |= {"p_mean": -1.0, "p_std": 1.4, "num_iterations": 400_000}
    return {**common, **student, "dropout": 0.2 if kind == "sct" else 0.0}


def _edm2(table: _Column, size: int, kind: str, *, latents: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "batch_size": 2048, "optimizer": "adam", "betas": (0.9, 0.99), "epsilon": 1e-11, "grad_clip": 0.0,
        "schedule": "inverse_sqrt", "decay_reference": 70_000 if latents else 35_000,
        "warmup_iterations": 4_883,  # 10 million images
        "precision": "fp16", "ema_profiles": (0.05, 0.1),
        "label_dropout": 0.1 if latents and kind == "teacher" else 0.0,
    }  # fmt: skip
    if kind == "teacher":
        settings |= {
            "num_iterations": table.thousands[size] * 1000, "learning_rate": table.learning_rate[size],
            "dropout": table.teacher_dropout[size], "ema_sigma_rel": table.sigma_rel[size],
            "p_mean": -0.4 if latents else -0.8, "p_std": 1.0 if latents else 1.6,
        }  # fmt: skip
    else:
        sct = kind == "sct"
        settings |= {
            "num_iterations": 400_000 if not latents else 100_000 if sct else 200_000,
            "learning_rate": table.learning_rate[size] / 100,
            "dropout": (table.sct_dropout if sct else table.scd_dropout)[size], "ema_sigma_rel": 0.05,
            "p_mean": -0.8 if latents else -1.0, "p_std": 1.6,
            "guidance": (1.0, 2.0) if latents and not sct else (1.0, 1.0),
        }  # fmt: skip
    if kind == "scd-vsd":  # appendix C, from the sCD student; its fake score is trained at the student's times
        settings |= {"vsd_weight": 1.0, "num_iterations": 20_000}
    # Sufficient to reconstruct any width from 0.03 to 0.25 without terabytes of snapshots.
    settings["ema_snapshot_every"] = settings["num_iterations"] // 32
    return settings


def _names() -> dict[str, tuple[str, str]]:
    """Return the preset and the kind of each recipe."""
    named = {f"cifar10-{kind}": ("cifar10", kind) for kind in ("teacher", "sct", "scd")}
    for size in _SIZES:
        for family, kinds in (
            ("imagenet64", ("teacher", "sct", "scd")),
            ("imagenet512", ("teacher", "sct", "scd", "scd-vsd")),
        ):
            if (preset := f"{family}_{size}") in PRESETS:
                named |= {f"{family}-{size}-{kind}": (preset, kind) for kind in kinds}
    return named


RECIPES = _names()


def recipe(name: str) -> TrainConfig:
    """Return the config of a recipe with its network and default folders.

    Raises:
        ConfigError: If the recipe does not exist.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"recipe is {name!r}, expected one of cifar10-{{teacher,sct,scd}}, "
            "imagenet64-{s,m,l,xl}-{teacher,sct,scd} and imagenet512-{s,m,l,xl,xxl}-{teacher,sct,scd,scd-vsd}."
        )
    preset, kind = RECIPES[name]
    family, _, size = preset.partition("_")
    latents = family == "imagenet512"
    if family == "cifar10":
        settings, data = _cifar10(kind), DataConfig(source="data/cifar10")
    else:
        table = _IMAGENET512 if latents else _IMAGENET64
        settings = _edm2(table, _SIZES.index(size), kind, latents=latents)
        data = DataConfig(source=f"data/{family}", label="folder")
    network = PRESETS[preset]()
    low, high = settings.get("guidance", (1.0, 1.0))
    changes: dict[str, Any] = {"dropout": settings["dropout"], "guidance": low < high}
    if family != "cifar10" and kind != "teacher":
        changes["dropout_resolution"] = FINE
    if kind != "teacher":
        before = name.removesuffix(kind)
        settings["init_from" if kind == "sct" else "teacher"] = f"runs/{before}teacher"
        if kind == "scd-vsd":
            settings["init_from"] = f"runs/{before}scd"
    objective = {"teacher": "diffusion", "scd-vsd": "scd"}.get(kind, kind)
    network = msgspec.structs.replace(network, **changes)
    return TrainConfig.from_settings({"objective": objective, "data": data, "network": network, **settings})
