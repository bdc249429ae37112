"""Guided distillation: the student learns the guided teacher at a fixed or random scale.

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
"""Provenance key of the share of samples that were trained without their label."""


def guided_teacher(teacher: Callable[..., Tensor], config: TrainConfig, num_classes: int) -> Callable[..., Tensor]:
    """Return the teacher of a run, with or without guidance."""
    if not config.guided:
        return teacher
    return GuidedNetwork(teacher, num_classes=num_classes, scale=config.guidance[0])


def sample_guidance(config: TrainConfig, count: int, iteration: int, stream: int = 5) -> Tensor | None:
    """Draw the guidance scales of an iteration, (count,), float32, an input of the student; None without it."""
    if not config.takes_guidance:
        return None
    low, high = config.guidance
    return low + (high - low) * torch.rand(count, generator=seeded_generator(config.seed, iteration, stream))


def start_from(network: nn.Module, initial: nn.Module) -> None:
    """Load the weights of a network of the same shape, which may lack the guidance branch.

    The guidance branch keeps its initial weights, which contribute zero: the student starts as the teacher.
    """
    weights = initial.state_dict()
    if getattr(network, "guidance_linear", None) is not None and getattr(initial, "guidance_linear", None) is None:
        own = network.state_dict()
        weights.update({name: own[name] for name in own if name.startswith("guidance_linear.")})
    network.load_state_dict(weights)


def require_guidable(model: ConsistencyModel, folder: str | Path) -> None:
    """Refuse guidance for a model without label dropout, whose output without label is meaningless.

    Args:
        model: A diffusion model.
        folder: The folder it was loaded from; the folder of a run also records its settings.

    Raises:
        TrainError: If the model has no labels, or label dropout was not used or not recorded.
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
