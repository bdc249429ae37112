"""The batch of an iteration: a pure function of the run's seed, the data and the iteration.

The random numbers are always drawn for the global batch; a process keeps its rows. Batches therefore do not depend on
the number of processes and of gradient accumulation parts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import TrainConfig
from .data.images import ImageData
from .objectives.base import Batch, mixed_seed, sample_times
from .objectives.guidance import sample_guidance

Drawn = TypeVar("Drawn")


def draw_batch(config: TrainConfig, data: ImageData, iteration: int, rows: slice | None = None) -> Batch:
    """Return the batch of an iteration.

    Args:
        config: The run.
        data: Its images.
        iteration: Iteration, from 0.
        rows: Rows of the global batch; None for all. Only their images are read.
    """
    count, size = len(data), config.batch_size
    positions = np.arange(iteration * size, (iteration + 1) * size)
    chosen = np.empty(size, np.int64)
    for epoch in np.unique(positions // count):
        here = positions // count == epoch
        chosen[here] = _epoch_order(config.seed, int(epoch), count)[positions[here] % count]
    kept = slice(None) if rows is None else rows
    generator = torch.Generator().manual_seed((config.seed << 31) + iteration)
    labels: Tensor | None = None
    if data.labels is not None and data.num_classes:
        labels = torch.from_numpy(data.labels[chosen])
        dropped = torch.rand(size, generator=generator) < config.label_dropout
        labels = torch.where(dropped, data.num_classes, labels)[kept]
    x_0 = torch.from_numpy(data.normalized(chosen[kept]))
    z = torch.randn((size, *x_0.shape[1:]), generator=generator)[kept] * config.sigma_data
    guidance = sample_guidance(config, size, iteration)
    return Batch(
        x_0=x_0,
        z=z,
        t=sample_times(size, config.noise, generator, sigma_data=config.sigma_data)[kept],
        class_labels=labels,
        guidance_scale=None if guidance is None else guidance[kept],
        rows=rows,
    )


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(count)


def take(drawn: Drawn, rows: slice | Tensor, device: torch.device) -> Drawn:
    """Return some rows of a dataclass of tensors whose first axis is the batch, on a device."""

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows].to(device)
        return tuple(taken(one) for one in value) if isinstance(value, tuple) else value

    found = {field.name: taken(getattr(drawn, field.name)) for field in fields(drawn)}  # type: ignore[arg-type]
    return replace(drawn, **found)  # type: ignore[type-var]


def drawn_for(batch: Batch, config: TrainConfig, draw: Callable[[torch.Size], Drawn]) -> Drawn:
    """Draw further random numbers for the global batch of an iteration and keep the rows of ``batch``."""
    if batch.rows is None:
        return take(draw(batch.x_0.shape), slice(None), batch.x_0.device)
    whole = torch.Size((config.batch_size, *batch.x_0.shape[1:]))
    return take(draw(whole), batch.rows, batch.x_0.device)


def split(batch: Batch, parts: int, device: torch.device) -> list[Batch]:
    """Split a batch into equal parts on a device; each part records its rows of the global batch."""
    if parts == 1:
        return [take(batch, slice(None), device)]
    size = len(batch.x_0) // parts
    first = batch.rows.start if batch.rows is not None else 0
    return [
        replace(take(batch, slice(at, at + size), device), rows=slice(first + at, first + at + size))
        for at in range(0, parts * size, size)
    ]


def seed_dropout(config: TrainConfig, iteration: int, part: int) -> None:
    """Seed the dropout of one part of an iteration's batch, counted over all processes."""
    torch.manual_seed(mixed_seed(config.seed, iteration, 4, part) if part else (config.seed << 31) + iteration)


class Feed(AbstractContextManager["Feed"]):
    """Provides the batches of a run; images on disk are read one iteration ahead.

    Args:
        config: The run.
        data: Its images.
        rows: Rows of each global batch; None for all.
    """

    def __init__(self, config: TrainConfig, data: ImageData, rows: slice | None = None) -> None:
        self._draw: Callable[[int], Batch] = lambda iteration: draw_batch(config, data, iteration, rows)
        self._last = config.num_iterations
        self._reader = None if isinstance(data.images, np.ndarray) else ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[int, Future[Batch]] = {}

    def __call__(self, iteration: int) -> Batch:
        """Return an iteration's batch.

        Raises:
            TrainError: If its images cannot be read.
        """
        if self._reader is None:
            return self._draw(iteration)
        now = self._ahead.pop(iteration, None) or self._reader.submit(self._draw, iteration)
        if iteration + 1 < self._last:
            self._ahead = {iteration + 1: self._reader.submit(self._draw, iteration + 1)}
        return now.result()

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
