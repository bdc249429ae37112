"""Rewrite the pixel norm as a vector norm: shorter, safe at zero, and independent of the batch size.

torch's exporter writes ``x * rsqrt(mean(x^2) + eps)`` as Pow, ReduceMean, Sqrt, Reciprocal and Mul, and drops a small
``eps``: a position whose channels are all zero becomes NaN. ONNX Runtime's ReduceMean sums in another order if the
batch is 1, so that the last bits of an image depend on its batch. Instead:

    x * (sqrt(C) / max(||x||, sqrt(C eps)))

ReduceL2 sums each position separately. Reduced precisions keep it in float32 (``half.NORMS``).
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from .ops import put_before, scalar_of, stored

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

EPS = 1e-8
"""eps of ``scm_sdk.model.networks.layers.pixel_norm``."""
_LARGEST_EPS = 1e-7
"""Largest ``eps`` for which ``max`` and addition agree in float32 for values that are not close to zero."""


def lengths_for_pixel_norms(model: ir.Model) -> ir.Model:
    """Rewrite every pixel norm over any channel axis.

    Requires: nodes and values have their names, values their shapes.
    Ensures: no ReduceMean of squares over one axis feeds a reciprocal root, unless its eps is large or it has other
        uses.
    """
    rewritten = sum(_rewrite(model.graph, node) for node in list(model.graph) if node.op_type == "Mul")
    logger.debug("pixel norms: rewrote %d as vector norms", rewritten)
    return model


def _rewrite(graph: ir.Graph, mul: ir.Node) -> bool:
    """Rewrite the pixel norm that ends in a Mul; return whether there was one."""
    import numpy as np
    import onnx_ir as ir

    found = _match(mul)
    if found is None:
        return False
    x, mean, axis, eps = found
    channels = x.shape[axis] if x.shape is not None and axis < x.shape.rank() else None
    if not isinstance(channels, int) or mean.outputs[0].shape is None or x.dtype != ir.DataType.FLOAT:
        logger.debug("pixel norms: kept %s: its channels are not fixed or its type is not float32", mul.name)
        return False
    name = (mean.name or "").replace("ReduceMean", "ReduceL2")
    scale, least = (
        stored(graph, f"pixel_norm_{channels}.{what}", np.array(number, np.float32))
        for what, number in (("scale", math.sqrt(channels)), ("least", math.sqrt(channels * eps)))
    )

    def make(op_type: str, suffix: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        shape = ir.Shape(mean.outputs[0].shape or ())
        return put_before(graph, mul, f"{name}{suffix}", op_type, inputs, attributes, shape=shape)

    length = make("ReduceL2", "", [x, mean.inputs[1]], keepdims=1)
    guarded = make("Max", ".guard", [length, least])
    inverse = make("Div", ".inverse", [scale, guarded])
    before = next(i for i, value in enumerate(mul.inputs) if value is not x)
    chain = [value.producer() for value in _back(mul.inputs[before])]
    mul.replace_input_with(before, inverse)
    for node in chain:
        if node is not None:
            graph.remove(node, safe=True)
    return True


def _match(mul: ir.Node) -> tuple[ir.Value, ir.Node, int, float] | None:
    """Return the normalized value, its ReduceMean with the axis, and its eps, or None if this is not a pixel norm."""
    for x, value in (mul.inputs, mul.inputs[::-1]):
        if x is None or value is None or x is value:
            continue
        values = _back(value)
        nodes = [each.producer() for each in values]
        if any(
            node is None or len(each.uses()) != 1 or each.is_graph_output()
            for node, each in zip(nodes, values, strict=True)
        ):
            continue
        ops = [node.op_type for node in nodes if node is not None]
        if ops not in (["Reciprocal", "Sqrt", "ReduceMean", "Pow"], ["Reciprocal", "Sqrt", "Add", "ReduceMean", "Pow"]):
            continue
        mean, power = nodes[-2], nodes[-1]
        assert mean is not None and power is not None
        eps = EPS if len(ops) == 4 else scalar_of(nodes[2].inputs[1] if nodes[2] else None)
        axes = mean.inputs[1].const_value if len(mean.inputs) > 1 and mean.inputs[1] is not None else None
        kept = mean.attributes.get_int("keepdims", 1) == 1
        along = axes.numpy().tolist() if axes is not None and kept else []
        squares = power.inputs[0] is x and scalar_of(power.inputs[1]) == 2.0
        if squares and len(along) == 1 and eps is not None and 0 < eps <= _LARGEST_EPS:
            return x, mean, int(along[0]), eps
    return None


def _back(value: ir.Value | None) -> list[ir.Value]:
    """Return up to five values back along first inputs, ending with that of a Pow."""
    chain: list[ir.Value] = []
    while value is not None and len(chain) < 5:
        chain.append(value)
        node = value.producer()
        if node is None or node.op_type == "Pow" or not node.inputs:
            break
        value = node.inputs[0]
    return chain
