"""Discrete variance-preserving schedules: noise level of each index of a DDPM-like model.

Such a model was trained on ``al_i x_0 + sg_i eps`` for i = 0 .. N-1. Between two steps the index is interpolated
linearly in ln(sg / al), so that its time input is continuous in TrigFlow's time and equals the index at each step. It
is clamped at both ends.
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
"""Replaces al = 0, the last value of schedules with zero terminal SNR."""


class VpSchedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Noise levels of a discrete variance-preserving model, as diffusers' schedulers name them.

    Attributes:
        num_train_timesteps: N.
        beta_start: First noise variance of one step.
        beta_end: The last.
        beta_schedule: Interpolation: ``linear``, ``scaled_linear`` in the square root, or ``squaredcos_cap_v2``, the
            cosine schedule, which ignores both ends.
        trained_betas: All betas, instead of the three fields above; or ().
        rescale_betas_zero_snr: Whether the betas were rescaled to zero terminal SNR.
        last_alpha_bar: Replacement of the last alpha_bar of 0: 2^-24 for schedulers that divide by it.
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

        The products are computed in float32, as in training.
        """
        alpha_bar = torch.cumprod(1 - self._betas(), dim=0)
        if self.rescale_betas_zero_snr:  # shift the last root to 0, keep the first
            root = alpha_bar.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            squared = root**2
            # Computed through betas, as in training, for identical bits.
            betas = 1 - torch.cat([squared[:1], squared[1:] / squared[:-1]])
            alpha_bar = torch.cumprod(1 - betas, dim=0)
            if 0 < self.last_alpha_bar < alpha_bar[-2]:  # otherwise the levels would not fall strictly
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
    """``al -> index``: continuous and piecewise smooth, with kinks at the steps.

    Args:
        schedule: Steps of the model.
    """

    def __init__(self, schedule: VpSchedule) -> None:
        levels = _log_ratio(schedule.alphas())
        if not (levels.diff() > 0).all():
            raise ConfigError("the schedule's noise levels do not rise strictly, expected that. Check its betas.")
        # Not buffers of a module, because float() and half() would round them. Rows, because ONNX shape inference
        # mistakes a constant vector for a shape.
        self._levels, self._gaps = levels[None, :-1].clone(), levels.diff()[None]

    def __call__(self, alpha: Tensor) -> Tensor:
        """Return indices in [0, N - 1], (B,), float64, of ``alpha``, (B,), float64."""
        levels, gaps = self._levels.to(alpha.device), self._gaps.to(alpha.device)
        # Each step counts 1 below the level, 0 above it, and its share if it contains the level.
        return ((_log_ratio(alpha)[:, None] - levels) / gaps).clamp(0, 1).sum(dim=1)


def continuous_timestep(alpha: Tensor) -> Tensor:
    """Return ln(sigma) / 4 with sigma = sg / al, (B,), of ``alpha``, (B,), float64: a time without steps."""
    return _log_ratio(alpha) / 4


def _log_ratio(alpha: Tensor) -> Tensor:
    """Return ln(sg / al) of al, with sg^2 = 1 - al^2."""
    square = ((1 - alpha) * (1 + alpha)).clamp_min(_TINY**2)
    return square.log() / 2 - alpha.clamp_min(_TINY).log()
