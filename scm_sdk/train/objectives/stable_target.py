"""Exact regression targets for data sets that fit in memory.

``x_0`` of a batch is one draw from the posterior of its noisy sample; the losses are minimized by the posterior mean.
For a finite data set this mean is a softmax over all images and can replace the draw: the minimum is the same, without
the variance of the draw, which dominates the residual at large ``t``.

Source: Xu, Tong and Jaakkola, "Stable Target Field", arXiv 2302.00670, with the whole data set as
the reference batch.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ...errors import TrainError
from ..data.images import ImageData
from .base import Batch

MAX_ELEMENTS = 1 << 28
"""Largest data set, in float32 elements: 1 GiB."""


class StableTarget:
    """Replaces ``(x_0, z)`` of a batch by their posterior means; ``x_t`` is unchanged.

    Args:
        data: All images of the run.
        sigma_data: Standard deviation of the data, data units.
        device: Device of the batches; None is the CPU.

    Raises:
        TrainError: If the data set exceeds ``MAX_ELEMENTS``.
    """

    def __init__(self, data: ImageData, *, sigma_data: float, device: torch.device | None = None) -> None:
        if data.images.size > MAX_ELEMENTS:
            raise TrainError(
                f"stable targets compare every batch with the whole data set, here {data.images.size} elements, "
                f"expected at most {MAX_ELEMENTS}. Train without --stable-targets."
            )
        self._images = torch.from_numpy(data.normalized(np.arange(len(data)))).flatten(1).to(device)
        self._square_norms = self._images.square().sum(dim=1)
        self._labels = None if data.labels is None or not data.num_classes else torch.from_numpy(data.labels).to(device)
        self._no_label = data.num_classes
        self._sigma_data = sigma_data

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with ``x_0 = E[x_0 | x_t, label]`` and the ``z`` that gives the same ``x_t``."""
        x_0, z, t = batch.x_0.flatten(1), batch.z.flatten(1), batch.t[:, None]
        cos, sin = torch.cos(t), torch.sin(t)
        x_t = cos * x_0 + sin * z
        # -||x_t - cos x_j||^2 / (2 sigma^2 sin^2), without the terms that do not depend on j.
        logits = (x_t @ self._images.T) * cos - 0.5 * cos.square() * self._square_norms
        logits = logits / (self._sigma_data * sin).square()
        if self._labels is not None and batch.class_labels is not None:
            label = batch.class_labels[:, None]
            logits = logits.masked_fill((label != self._no_label) & (label != self._labels), float("-inf"))
        mean = torch.softmax(logits, dim=1) @ self._images
        noise = (x_t - cos * mean) / sin
        return replace(batch, x_0=mean.view_as(batch.x_0), z=noise.view_as(batch.z))
