"""Replace the label branch of a network by a table with one row per class.

At a fixed time this branch has as many results as there are classes. For few classes they are computed once and stored:
a step then reads one row instead of a chain of small matrix products, which dominates the time of a small batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scm_sdk.errors import UnsupportedGraphError

from .partial_eval import BATCH_DIM, ROUNDING, Depends, evaluate, read_outside

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

logger = logging.getLogger(__name__)

LABEL_INPUT = "class_labels"
"""Name of the label input, (batch,)."""
MAX_CLASSES = 32
"""Maximum number of classes for a table. Validation cycles the labels over as many seeds, so it checks each row."""


@dataclass(frozen=True, kw_only=True)
class LabelBranch:
    """A label branch.

    Attributes:
        border: Values of the branch that the rest of the network reads, (batch, ...) each.
        num_classes: Number of rows of the table.
    """

    border: tuple[ir.Value, ...]
    num_classes: int

    def rows(self, graph: ir.Graph, times: Mapping[str, float]) -> list[np.ndarray]:
        """Return each border value for each class at the times of a step, (num_classes, ...).

        Raises:
            UnsupportedGraphError: If a row depends on the labels of other samples; it names the value.
        """
        import numpy as np

        def of(labels: np.ndarray) -> list[np.ndarray]:
            return evaluate(graph, list(self.border), batch=len(labels), times=times, given={LABEL_INPUT: labels})

        labels = np.arange(self.num_classes, dtype=np.int64)
        rows = of(labels)
        # In halves: whatever a network takes of all labels, such as their largest value, changes for one half at least.
        for half in filter(len, np.array_split(labels, 2)):
            for value, each, apart in zip(self.border, rows, of(half), strict=True):
                scale = float(np.abs(apart).max(initial=0.0)) or 1.0
                if (
                    each.shape != (self.num_classes, *apart.shape[1:])
                    or len(apart) != len(half)
                    or np.abs(each[half] - apart).max(initial=0.0) > ROUNDING * scale
                ):
                    raise UnsupportedGraphError(
                        f"{value.name!r} is another for the labels {half[0]} to {half[-1]} than for the same labels "
                        "among others. Expected the same: the network must not mix the labels of different samples."
                    )
        return rows


def label_branch(
    graph: ir.Graph, classes: Mapping[ir.Value, Depends], *, num_classes: int, num_steps: int
) -> LabelBranch | None:
    """Return the label branch of a network's graph if tables are worthwhile, or None.

    They are if there are few classes and the tables are not larger than the replaced weights.
    """
    label = next((value for value in graph.inputs if value.name == LABEL_INPUT), None)
    if label is None or not 0 < num_classes <= MAX_CLASSES:
        logger.debug("label table: none for %d classes, expected 1 to %d", num_classes, MAX_CLASSES)
        return None
    branch = {label}
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if any(value in branch for value in read) and all(v in branch or classes[v] != Depends.DATA for v in read):
            branch.update(node.outputs)
    border = tuple(read_outside((value for node in graph for value in node.outputs), branch))
    if not border or not all(_is_rows(value) for value in border):
        logger.debug("label table: none, what the labels' branch computes is not one row for each sample")
        return None
    size, freed = num_steps * num_classes * sum(_size(value) for value in border), _freed(graph, branch)
    if size > freed:
        logger.debug("label table: none, its %d numbers are more than the %d weights it would replace", size, freed)
        return None
    logger.debug("label table: %d numbers replace %d weights", size, freed)
    return LabelBranch(border=border, num_classes=num_classes)


def _is_rows(value: ir.Value) -> bool:
    dtype, shape = value.dtype, value.shape
    if dtype is None or not dtype.is_floating_point() or shape is None or len(shape) == 0:
        return False
    return shape[0] == BATCH_DIM and all(isinstance(d, int) for d in shape[1:])


def _freed(graph: ir.Graph, branch: Container[ir.Value]) -> int:
    """Return the number of weight elements that only the branch reads."""
    return sum(
        _size(weight)
        for weight in graph.initializers.values()
        if weight.uses() and all(node.outputs[0] in branch for node in weight.consumers())
    )


def _size(value: ir.Value) -> int:
    """Return the number of elements of a value, per sample if it has a batch axis."""
    return math.prod(d for d in value.shape or () if isinstance(d, int))
