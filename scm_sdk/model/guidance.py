"""Classifier-free guidance of a diffusion model.

    F = F_uncond + s (F_cond - F_uncond)

Source: Ho and Salimans, 2022, arXiv 2207.12598; in TrigFlow's terms arXiv 2410.11081, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError


class GuidedNetwork:
    """A diffusion network with guidance: evaluates the network twice, in one batch.

    Args:
        network: ``(x, t, class_labels) -> F``, trained with and without labels; label ``num_classes`` is "no label".
        num_classes: Number of class labels.
        scale: Default guidance scale s; 1 is the network without guidance.

    Raises:
        ConfigError: If there are no labels.
    """

    def __init__(self, network: Callable[..., Tensor], *, num_classes: int, scale: float = 1.0) -> None:
        if not num_classes:
            raise ConfigError("guidance needs class labels, and this model has none. Leave the guidance scale out.")
        self._network, self._no_label, self._scale = network, num_classes, scale

    def __call__(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """Return F, (B, ...), unitless.

        Args:
            x: Noisy samples divided by ``sigma_data``, (B, ...).
            t: Times, (B,), radians.
            class_labels: Labels, (B,), int64; ``num_classes`` and None are not guided.
            guidance_scale: Guidance scales, (B,), or None for the default.
        """
        if class_labels is None or (guidance_scale is None and self._scale == 1.0):
            return self._network(x, t, class_labels)
        none = torch.full_like(class_labels, self._no_label)
        both = self._network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([none, class_labels]))
        unconditional, conditional = both.chunk(2)
        if guidance_scale is None:
            return unconditional + self._scale * (conditional - unconditional)
        scale = guidance_scale.reshape(-1, *([1] * (x.ndim - 1)))
        return unconditional + scale * (conditional - unconditional)
