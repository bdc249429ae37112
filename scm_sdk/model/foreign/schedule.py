"""Variance-preserving schedules of discrete steps: which index of a DDPM-like model is which noise level.

Such a model was trained on ``al_i x_0 + sg_i eps`` for i = 0 .. N-1. Between two of its steps the index is interpolated
linearly in ln(sg / al), so that the time it is given changes continuously with TrigFlow's; at a step itself it is that
step's index. Beyond both ends it stays there.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import msgspec
import torch
from torch import Tensor

from ...errors import ConfigError

_TINY = 1e-8
"""Stands in for al = 0, which schedules of zero terminal signal end with."""


class VpSchedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Noise levels of a discrete variance-preserving model, as diffusers' schedulers name them.

    Attributes:
        num_train_timesteps: N.
        beta_start: First noise variance of one step.
        beta_end: The last.
        beta_schedule: Between them: ``linear`` in it, ``scaled_linear`` in its square root, or
            ``squaredcos_cap_v2``, the cosine schedule, which has ends of its own.
        trained_betas: All of them instead, or ().
        rescale_betas_zero_snr: Whether they were rescaled so that the last step is noise alone.
        last_alpha_bar: What takes the place of the last step's 0 then: 2^-24 with the schedulers that divide by it.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] = ()
    rescale_betas_zero_snr: bool = False
    last_alpha_bar: float = 0.0

    def __post_init__(self) -> None:
        betas = self.trained_betas or (self.beta_start, self.beta_end)
        if not all(0 < beta < 1 for beta in betas) or (not self.trained_betas and betas[0] > betas[1]):
            raise ConfigError(f"betas are {betas[0]} .. {betas[-1]}, expected numbers in (0, 1) that rise.")
        if not 0 <= self.last_alpha_bar < 1:
            raise ConfigError(f"last_alpha_bar is {self.last_alpha_bar}, expected a number in [0, 1).")
        if not 2 <= self.num_train_timesteps <= 100_000:
            raise ConfigError(f"num_train_timesteps is {self.num_train_timesteps}, expected 2..100000.")
        if self.trained_betas and len(self.trained_betas) != self.num_train_timesteps:
            raise ConfigError(
                f"trained_betas holds {len(self.trained_betas)} numbers, expected num_train_timesteps = "
                f"{self.num_train_timesteps}."
            )

    def alphas(self) -> Tensor:
        """Return al_i = sqrt(alpha_bar_i), (N,), float64, falling.

        The products are taken in float32, as training did: these are the levels that the model knows.
        """
        alpha_bar = torch.cumprod(1 - self._betas(), dim=0)
        if self.rescale_betas_zero_snr:  # shift the last root to 0, keep the first
            root = alpha_bar.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            squared = root**2
            # By way of betas, as in training: the last bits are theirs.
            betas = 1 - torch.cat([squared[:1], squared[1:] / squared[:-1]])
            alpha_bar = torch.cumprod(1 - betas, dim=0)
            if 0 < self.last_alpha_bar < alpha_bar[-2]:  # else the levels would not fall
                alpha_bar[-1] = self.last_alpha_bar
        return alpha_bar.double().sqrt()

    def _betas(self) -> Tensor:
        count = self.num_train_timesteps
        if self.trained_betas:
            return torch.tensor(self.trained_betas)
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, count)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        level = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(level)])


class VpIndex:
    """``al -> index``: continuous, smooth in forward-mode derivatives but at the steps, where it has a bend.

    Args:
        schedule: The model's steps.
    """

    def __init__(self, schedule: VpSchedule) -> None:
        levels = _log_ratio(schedule.alphas())
        if not (levels.diff() > 0).all():
            raise ConfigError("the schedule's noise levels do not rise strictly, expected that. Check its betas.")
        # No buffers of a module: float() and half() would round them. Rows, because ONNX's shape inference takes a
        # vector of constants for a shape and stumbles over it.
        self._levels, self._gaps = levels[None, :-1].clone(), levels.diff()[None]

    def __call__(self, alpha: Tensor) -> Tensor:
        """Return indices in [0, N - 1], (B,), float64, of ``alpha``, (B,), float64."""
        levels, gaps = self._levels.to(alpha.device), self._gaps.to(alpha.device)
        # Each step counts 1 where it lies below, 0 where above, and its share where the level is inside.
        return ((_log_ratio(alpha)[:, None] - levels) / gaps).clamp(0, 1).sum(dim=1)


def continuous_timestep(alpha: Tensor) -> Tensor:
    """Return ln(sigma) / 4 with sigma = sg / al, (B,), of ``alpha``, (B,), float64: a time without steps."""
    return _log_ratio(alpha) / 4


def _log_ratio(alpha: Tensor) -> Tensor:
    """Return ln(sg / al) of al, with sg^2 = 1 - al^2."""
    square = ((1 - alpha) * (1 + alpha)).clamp_min(_TINY**2)
    return square.log() / 2 - alpha.clamp_min(_TINY).log()
