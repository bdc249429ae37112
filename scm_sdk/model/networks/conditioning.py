"""Conditioning of networks: time, label and guidance scale as one embedding.

Two of the paper's three changes are here. The network sees the time ``t`` itself (identity), not a logarithm of a noise
level; and ``t`` is embedded by slow sinusoids (positional), not by fast Fourier features.

Shape letters: B batch, C channels, H height, W width, E embedding.
Source: arXiv 2410.11081, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ShapeError
from .layers import zero_

Embed = TypeVar("Embed", bound=Callable[..., Tensor])


def float32_island(method: Embed) -> Embed:
    """Run a method in float32 under mixed precision, so that the time and its embedding are not rounded.

    bfloat16 would round t = 1.5645 (sigma 80) to 1.5625 (sigma 60).
    """

    @wraps(method)
    def outside(self: nn.Module, t_B: Tensor, *args: Any) -> Tensor:
        device = t_B.device.type
        if not torch.is_autocast_enabled(device):
            return method(self, t_B, *args)
        with torch.autocast(device, enabled=False):
            return method(self, t_B, *args)

    return cast(Embed, outside)


class PositionalEmbedding(nn.Module):
    """Sinusoids of the raw time: ``[cos(t f), sin(t f)]`` with ``f_i = max_period^(-i / (E/2 - 1))``.

    Args:
        channels: Size E of the embedding; even, at least 4.
        max_period: Ratio between the fastest frequency, 1, and the slowest.
        fourier_scale: Standard deviation of normally distributed frequencies, cycles per radian, which replace these; 0
            for none. For ablations: a scale of 16, common in diffusion models, makes consistency training unstable
            because the derivative of the embedding is as large; 0.02 is similar to the sinusoids. The frequencies are
            quantiles of the normal distribution, not random, so checkpoints do not store them.
    """

    frequencies: Tensor

    def __init__(self, channels: int, max_period: float = 10_000.0, fourier_scale: float = 0.0) -> None:
        super().__init__()
        self.channels, self.max_period, self.fourier_scale = channels, max_period, fourier_scale
        self.register_buffer("frequencies", torch.empty(channels // 2), persistent=False)
        if not self.frequencies.is_meta:  # arange on the meta device imports torch's compiler, which takes seconds
            self.make_frequencies()

    def make_frequencies(self) -> None:
        """Compute the frequencies, which checkpoints do not store."""
        half = self.channels // 2
        if self.fourier_scale:
            share = 0.5 + (torch.arange(half, dtype=torch.float64) + 0.5) / (2 * half)
            self.frequencies = (2 * math.pi * self.fourier_scale * torch.special.ndtri(share)).float()
            return
        exponent = torch.arange(half, dtype=torch.float64) / (half - 1)
        self.frequencies = torch.exp(-math.log(self.max_period) * exponent).float()

    def forward(self, t_B: Tensor) -> Tensor:
        """Embed times (B,), radians, as (B, E) in the dtype of ``t_B``, at least float32."""
        angle_BE = t_B[:, None] * self.frequencies.to(t_B.dtype)
        return torch.cat([angle_BE.cos(), angle_BE.sin()], dim=1)


class TimeNetwork(nn.Module):
    """Call signature of the built-in networks."""

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, C, H, W), unitless.

        Args:
            x: Noisy samples divided by ``sigma_data``, (B, C, H, W).
            t: Times, (B,) or (1,), radians.
            class_labels: Labels, (B,), int64 in [0, num_classes); ``num_classes`` or None for no label.
            guidance_scale: Guidance scales, (B,), float32; None is 1, without guidance.

        Raises:
            ShapeError: If labels or guidance are given to a network without them.
        """
        raise NotImplementedError


class Conditioned(TimeNetwork):
    """Base class of the networks: embeds the time, the label and the guidance scale.

    The guidance scale s is embedded like the time, by sinusoids and one linear layer that is initialized to zero: a
    student with the weights of its teacher computes the same as the teacher (arXiv 2410.11081, section 5.2).

    Args:
        time_channels: Size of the sinusoidal embeddings.
        emb_channels: Size E of the output of ``embed``.
        max_period: Longest period of the sinusoids.
        fourier_scale: Scale of Fourier features, which replace the sinusoids; 0 for none.
        num_classes: Number of class labels; 0 for none.
        guidance: Whether the guidance scale is an input.
    """

    def __init__(
        self,
        *,
        time_channels: int,
        emb_channels: int,
        max_period: float,
        fourier_scale: float,
        num_classes: int,
        guidance: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.guidance = num_classes, guidance
        self.time_embedding = PositionalEmbedding(time_channels, max_period, fourier_scale)
        self.time_linear0 = nn.Linear(time_channels, emb_channels)
        self.time_linear1 = nn.Linear(emb_channels, emb_channels)
        # One row more than there are labels: the last is "no label".
        self.label_embedding = nn.Embedding(num_classes + 1, emb_channels) if num_classes else None
        self.guidance_linear = zero_(nn.Linear(time_channels, emb_channels)) if guidance else None

    @float32_island
    def embed(self, t_B: Tensor, class_labels_B: Tensor | None, guidance_scale_B: Tensor | None) -> Tensor:
        """Embed times, labels and guidance scales as (B, E); float32 whatever the dtype of the trunk.

        Raises:
            ShapeError: If labels or guidance are given to a network without them.
        """
        labels_B, scale_B = complete_conditioning(
            t_B, class_labels_B, guidance_scale_B, num_classes=self.num_classes, guidance=self.guidance
        )
        emb = self.time_linear1(functional.silu(self.time_linear0(self.time_embedding(t_B))))
        if self.label_embedding is not None:
            emb = emb + self.label_embedding(labels_B)
        if self.guidance_linear is not None:
            emb = emb + self.guidance_linear(self.time_embedding(scale_B))
        return functional.silu(emb)


def complete_conditioning(
    t_B: Tensor, class_labels_B: Tensor | None, guidance_scale_B: Tensor | None, *, num_classes: int, guidance: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return labels and guidance scales, (B,) each, with the defaults "no label" and 1; None for a missing input.

    Raises:
        ShapeError: If labels or guidance are given to a network that would ignore them.
    """
    if class_labels_B is not None and not num_classes:
        raise ShapeError("class_labels were given, expected None: this network has num_classes = 0.")
    if guidance_scale_B is not None and not guidance:
        raise ShapeError("guidance_scale was given, expected None: this network has guidance = False.")
    if class_labels_B is None and num_classes:
        class_labels_B = torch.full_like(t_B, num_classes, dtype=torch.long)
    if guidance_scale_B is None and guidance:
        guidance_scale_B = torch.ones_like(t_B)
    return class_labels_B, guidance_scale_B
