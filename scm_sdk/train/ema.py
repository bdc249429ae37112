"""The moving average of the weights that sampling uses."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move every parameter of ``average`` towards ``module``: ``a <- decay a + (1 - decay) w``."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1.0 - decay)
