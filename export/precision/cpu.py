"""The float32 sampler with operators that are fast on CPUs: fused pixel norms and Winograd convolutions."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from scm_sdk.errors import UnsupportedGraphError

from ..graph.cleanup import drop_unused
from ..graph.ops import put_before, scalar_of, stored
from .half import PRECISION_KEY
from .winograd import products_for_convolutions

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)


def norms_that_fuse(model: ir.Model) -> int:
    """Rewrite the pixel norms over a last axis in place; return their number.

    Requires: values have their shapes.
    """
    found = [(node, match) for node in model.graph if (match := _match(node)) is not None]
    for node, (x, eps, channels) in found:
        _rewrite(model.graph, node, x, eps, channels)
    logger.debug("norms: rewrote %d pixel norms over the last axis", len(found))
    return len(found)


def _match(mul: ir.Node) -> tuple[ir.Value, float, int] | None:
    """Return the normalized value of a Mul, its eps and channels, or None if it is no pixel norm over a last axis."""
    for x, inverse in (mul.inputs, mul.inputs[::-1]) if mul.op_type == "Mul" else ():
        divide = _made_by(inverse, "Div")
        guard = divide and _made_by(divide.inputs[1], "Max")
        length = guard and _made_by(guard.inputs[0], "ReduceL2")
        if x is None or x.shape is None or not divide or not guard or not length or length.inputs[0] is not x:
            continue
        scale, least, axis = (scalar_of(v) for v in (divide.inputs[0], guard.inputs[1], length.inputs[1]))
        channels = x.shape[-1]
        if not isinstance(channels, int) or axis not in (-1, len(x.shape) - 1) or scale is None or not least:
            continue
        if math.isclose(scale, math.sqrt(channels), rel_tol=1e-6):
            return x, least**2 / channels, channels
    return None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _rewrite(graph: ir.Graph, mul: ir.Node, x: ir.Value, eps: float, channels: int) -> None:
    old = next(value for value in mul.inputs if value is not x)

    def make(op_type: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        return put_before(graph, mul, f"{mul.name}/rms.{op_type}", op_type, inputs, attributes)

    def constant(name: str, array: np.ndarray) -> ir.Value:
        return stored(graph, f"rms.{name}", array)

    squares = make("Pow", [x, constant("two", np.array(2, np.float32))])
    mean = make("ReduceMean", [squares, constant("axis", np.array([-1]))], keepdims=1)
    guarded = make("Add", [mean, constant(f"eps_{eps:.2e}", np.array(eps, np.float32))])
    normalized = make("Div", [x, make("Sqrt", [guarded])])
    ones = constant(f"ones_{channels}", np.ones(channels, np.float32))
    mul.replace_input_with(0, normalized)
    mul.replace_input_with(1, ones)
    while old is not None and (node := old.producer()) is not None and not old.uses():
        before = node.inputs[1 if node.op_type == "Div" else 0]
        graph.remove(node, safe=True)
        old = before if before is not x else None


def cpu_form(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the ``fp32-cpu`` form of a sampler graph, and a line per kind of rewrite.

    Args:
        model: A float32 graph from ``compose_sampler`` or ``read_model``; it is not changed.

    Raises:
        UnsupportedGraphError: If there is nothing to rewrite.
    """
    copy = model.clone()
    convolutions, of = products_for_convolutions(copy)
    norms = norms_that_fuse(copy)
    if not convolutions and not norms:
        raise UnsupportedGraphError(
            f"none of the {of} convolutions gains as Winograd's products and no norm is over a last axis, expected one "
            "or the other: 3x3 convolutions of 256 channels over 16x16, 128 over 32x32 or 192 over 64x64, or a "
            "transformer. Run the fp32 graph."
        )
    drop_unused(copy)  # factors of the rewritten norms
    copy.metadata_props[PRECISION_KEY] = "fp32-cpu"
    notes = []
    if convolutions:
        notes.append(f"{convolutions} of {of} convolutions as Winograd's products")
    if norms:
        notes.append(f"{norms} norms as one kernel each")
    return copy, tuple(notes)
