"""Numerically sensitive operators that are kept in float32, found by pattern.

* Guarded divisions, as in linear attention and in normalization to length 1: a bound such as 1e-15 is 0 in float16, and
  the bounded sum over all positions or channels overflows. The division, the bound, and the products and sums before
  them, up to the next operator with weights, stay in float32.
* Root mean squares: the squares overflow long before their root. The square, its mean, and the factor, one number per
  position, stay in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph.ops import scalar_of

if TYPE_CHECKING:
    import onnx_ir as ir

DELICATE = "@delicate"
"""Pattern of these nodes in a precision plan."""
ISLANDS_KEY = "scm_islands"
"""Metadata key of a graph for patterns that its network needs in every plan."""
_BOUNDS = frozenset({"Clip", "Max", "Add"})
_VANISHING = 6e-8
"""Smaller numbers are 0 in float16, whose smallest number is 2^-24."""
_SUMS = frozenset({"ReduceSum", "ReduceL2", "ReduceSumSquare"})
_PRODUCTS_AND_SUMS = frozenset({"MatMul", "Mul", "Div", *_SUMS, *_BOUNDS})
_COPIES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Pad", "Expand"})
_AFTER_MEAN = frozenset({"Add", "Sqrt", "Reciprocal", "Pow"})


def delicate_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the numerically sensitive nodes."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Div" and _is_guarded(node):
            found |= _sums_behind(node)
        elif node.op_type == "ReduceMean" and (square := _square_of(node)) is not None:
            found |= {square, node, *_factors_of(node)}
    return found


def _is_guarded(node: ir.Node) -> bool:
    """Return whether the divisor of a Div has a lower bound that is 0 in float16."""
    divisor = node.inputs[1]
    bound = None if divisor is None else divisor.producer()
    while bound is not None and bound.op_type in _COPIES and bound.inputs[0] is not None:
        bound = bound.inputs[0].producer()
    if bound is None or bound.op_type not in _BOUNDS:
        return False
    return any(0 < abs(number) < _VANISHING for value in bound.inputs if (number := scalar_of(value)) is not None)


def _sums_behind(division: ir.Node) -> set[ir.Node]:
    found, todo = {division}, [division]
    while todo:
        for value in todo.pop().inputs:
            node = None if value is None else value.producer()
            if node is None or node in found:
                continue
            weighted = any(v is not None and v.is_initializer() and scalar_of(v) is None for v in node.inputs)
            if node.op_type in _PRODUCTS_AND_SUMS and (node.op_type in _SUMS or not weighted):
                found.add(node)
                todo.append(node)
            elif node.op_type in _COPIES:
                todo.append(node)  # moves data in any type; its source may be a sum
    return found


def _square_of(mean: ir.Node) -> ir.Node | None:
    value = mean.inputs[0]
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Pow":
        return node if scalar_of(node.inputs[1]) == 2 else None
    return node if node.op_type == "Mul" and node.inputs[0] is node.inputs[1] else None


def _factors_of(mean: ir.Node) -> set[ir.Node]:
    """Return the nodes that compute the factor of a normalization from a mean of squares."""
    found: set[ir.Node] = set()
    todo = [mean]
    while todo:
        for value in todo.pop().outputs:
            readers = [node for node in value.consumers() if node.op_type in _AFTER_MEAN and node not in found]
            readers = [node for node in readers if all(v is value or scalar_of(v) is not None for v in node.inputs)]
            found.update(readers)
            todo.extend(readers)
    return found
