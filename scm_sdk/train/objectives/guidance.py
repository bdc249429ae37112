"""Guided distillation: the student learns the guided teacher at a given or random scale.

Source: arXiv 2410.11081, sections 5.2 and G.2.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import TrainError
from ...model.consistency import ConsistencyModel
from ...model.guidance import GuidedNetwork
from ..config import TrainConfig
from ..record import recorded
from .base import seeded_generator

LABEL_DROPOUT = "label_dropout"
"""Key of a model's provenance: the share of samples that it was trained on without their label."""


def guided_teacher(teacher: Callable[..., Tensor], config: TrainConfig, num_classes: int) -> Callable[..., Tensor]:
    """Return the teacher as a run follows it: as it is, or with guidance."""
    if not config.guided:
        return teacher
    return GuidedNetwork(teacher, num_classes=num_classes, scale=config.guidance[0])


def sample_guidance(config: TrainConfig, count: int, iteration: int, stream: int = 5) -> Tensor | None:
    """Draw an iteration's guidance scales, (count,), float32, which the student is told; None where it takes none."""
    if not config.takes_guidance:
        return None
    low, high = config.guidance
    return low + (high - low) * torch.rand(count, generator=seeded_generator(config.seed, iteration, stream))


def start_from(network: nn.Module, initial: nn.Module) -> None:
    """Give a network the weights of another of its shape, which may lack the branch of the guidance scale.

    That branch keeps what it begins with, which adds nothing: the student starts as the teacher.
    """
    weights = initial.state_dict()
    if getattr(network, "guidance_linear", None) is not None and getattr(initial, "guidance_linear", None) is None:
        own = network.state_dict()
        weights.update({name: own[name] for name in own if name.startswith("guidance_linear.")})
    network.load_state_dict(weights)


def require_guidable(model: ConsistencyModel, folder: str | Path) -> None:
    """Refuse to guide a model that never saw a sample without its label: what it says of those would be noise.

    Args:
        model: A diffusion model.
        folder: Where it was loaded from; a run's folder also says how it was trained.

    Raises:
        TrainError: If it has no labels, or was not trained without them, or does not say.
    """
    if not model.config.num_classes:
        raise TrainError(f"the teacher {folder} has no labels, expected some: guidance points to a label.")
    share = model.config.provenance.get(LABEL_DROPOUT) or _share_in_run(Path(folder))
    try:
        known = float(share) > 0
    except ValueError:
        known = False
    if not known:
        raise TrainError(
            f"the teacher {folder} was trained with label_dropout {share or 'unknown'}, expected a share above 0: "
            "guidance compares it with itself without the label, which it has to have learned. Train it with "
            "--label-dropout 0.1; where you know that it was, add it to the provenance in its config.json."
        )


def _share_in_run(folder: Path) -> str:
    run = recorded(folder)
    return f"{run.label_dropout:g}" if run is not None and run.objective == "diffusion" else ""
