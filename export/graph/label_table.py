"""Replace the branch of a network that depends on the label alone by a table with one row for each class.

At a fixed time that branch has as many outcomes as there are classes. For few of them they are computed once and
stored: a step then reads one row where it had a chain of small matrix products, which is what a small batch waits for.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scm_sdk.errors import UnsupportedGraphError

from .partial_eval import BATCH_DIM, ROUNDING, Depends, evaluate, read_outside

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

LABEL_INPUT = "class_labels"
"""Name of the labels' input, (batch,)."""
MAX_CLASSES = 32
"""More classes keep their branch. Validation looks at as many seeds with labels in turn, so it sees each row."""


@dataclass(frozen=True, kw_only=True)
class LabelBranch:
    """What can become a table.

    Attributes:
        border: Values of the branch that the rest of the network reads, (batch, ...) each.
        num_classes: Rows.
    """

    border: tuple[ir.Value, ...]
    num_classes: int

    def rows(self, graph: ir.Graph, t: float) -> list[np.ndarray]:
        """Return each border value for each class at a time, (num_classes, ...).

        Raises:
            UnsupportedGraphError: If a sample's row depends on the labels of others; it names the value.
        """
        import numpy as np

        def of(labels: np.ndarray) -> list[np.ndarray]:
            return evaluate(graph, list(self.border), batch=len(labels), t=t, given={LABEL_INPUT: labels})

        rows = of(np.arange(self.num_classes, dtype=np.int64))
        for value, each, alone in zip(self.border, rows, of(np.zeros(1, dtype=np.int64)), strict=True):
            scale = float(np.abs(alone).max(initial=0.0)) or 1.0
            if each.shape != (self.num_classes, *alone.shape[1:]) or np.abs(each[:1] - alone).max() > ROUNDING * scale:
                raise UnsupportedGraphError(
                    f"{value.name!r} is another for label 0 alone than among others. Expected the same: the network "
                    "must not mix the labels of different samples."
                )
        return rows


def label_branch(
    graph: ir.Graph, classes: Mapping[ir.Value, Depends], *, num_classes: int, num_steps: int
) -> LabelBranch | None:
    """Return the branch of a network's graph that is worth a table for each step, or None.

    It is where there are few classes and the tables take no more room than the weights that they replace.
    """
    label = next((value for value in graph.inputs if value.name == LABEL_INPUT), None)
    if label is None or not 0 < num_classes <= MAX_CLASSES:
        return None
    branch = {label}
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if any(value in branch for value in read) and all(v in branch or classes[v] != Depends.DATA for v in read):
            branch.update(node.outputs)
    border = tuple(read_outside((value for node in graph for value in node.outputs), branch))
    if not border or not all(_is_rows(value) for value in border):
        return None
    size = num_steps * num_classes * sum(_size(value) for value in border)
    return LabelBranch(border=border, num_classes=num_classes) if size <= _freed(graph, branch) else None


def _is_rows(value: ir.Value) -> bool:
    dtype, shape = value.dtype, value.shape
    if dtype is None or not dtype.is_floating_point() or shape is None or len(shape) == 0:
        return False
    return shape[0] == BATCH_DIM and all(isinstance(d, int) for d in shape[1:])


def _freed(graph: ir.Graph, branch: Container[ir.Value]) -> int:
    """Return how many numbers of weights only the branch reads."""
    return sum(
        _size(weight)
        for weight in graph.initializers.values()
        if weight.uses() and all(node.outputs[0] in branch for node in weight.consumers())
    )


def _size(value: ir.Value) -> int:
    """Return how many numbers a value holds, for each sample where it has an axis of them."""
    return math.prod(d for d in value.shape or () if isinstance(d, int))
