"""What else could explain a network's output: other labels, another time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def other_labels(labels: np.ndarray, num_classes: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield labels that a fault could have made of those that were asked for, (N,) int64, each with its description."""
    yield "in reverse order of the batch", labels[::-1].copy()
    yield "shifted by one place of the batch", np.roll(labels, 1)
    for shift in range(1, num_classes):
        yield f"shifted by {shift} classes", (labels + shift) % num_classes
    yield "mirrored (last class first)", num_classes - 1 - labels
    for one in range(num_classes):
        yield f"all {one}", np.full_like(labels, one)


def search_time(error: Callable[[float], float], times: Sequence[float]) -> tuple[float, float]:
    """Return the time that explains F best, and the error it leaves: known times first, then a grid, then finer."""
    known = [*times, *(float(np.float16(t)) for t in times)]
    best = min(((error(t), t) for t in [*known, *np.linspace(0.02, math.pi / 2, 40)]), key=lambda pair: pair[0])
    width = 0.04
    for _ in range(6):
        near = np.linspace(best[1] - width, best[1] + width, 9)
        best = min([best, *((error(float(t)), float(t)) for t in near)], key=lambda pair: pair[0])
        width /= 4
    return best[1], best[0]
