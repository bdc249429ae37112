"""Numerically sensitive operators that are kept in float32, found by pattern.

* Guarded divisions, as of linear attention: a bound such as 1e-15 is 0 in float16, and what it bounds is a sum over all
  positions, which overflows. Float32 are the division, the bound, and the products and sums behind both, back to
  whatever carries a weight.
* Root mean squares: the squares overflow long before their root does. Float32 are the square, its mean, and what makes
  a factor of it, one number for each position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph.ops import scalar_of

if TYPE_CHECKING:
    import onnx_ir as ir

DELICATE = "@delicate"
"""Pattern of these nodes in a precision plan."""
ISLANDS_KEY = "scm_islands"
"""Key of a graph's metadata under which patterns lie that its network needs in every plan."""
_BOUNDS = frozenset({"Clip", "Max", "Add"})
_VANISHING = 6e-8
"""Below this a number is 0 in float16: its smallest is 2^-24."""
_PRODUCTS_AND_SUMS = frozenset({"MatMul", "Mul", "ReduceSum", "Div", *_BOUNDS})
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Pad", "Relu"})
_AFTER_MEAN = frozenset({"Add", "Sqrt", "Reciprocal", "Pow"})


def delicate_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return those nodes."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Div" and _is_guarded(node):
            found |= _sums_behind(node)
        elif node.op_type == "ReduceMean" and (square := _square_of(node)) is not None:
            found |= {square, node, *_factors_of(node)}
    return found


def _is_guarded(node: ir.Node) -> bool:
    """Return whether what a Div divides by has a lower bound that float16 does not know."""
    divisor = node.inputs[1]
    bound = None if divisor is None else divisor.producer()
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
            if node.op_type in _PRODUCTS_AND_SUMS and (node.op_type == "ReduceSum" or not weighted):
                found.add(node)
                todo.append(node)
            elif node.op_type in _MOVES and node.op_type != "Relu":
                todo.append(node)  # it takes the type of what it moves; what lies behind it may be a sum
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
    """Return the nodes that turn a mean of squares into the factor of a normalization."""
    found: set[ir.Node] = set()
    todo = [mean]
    while todo:
        for value in todo.pop().outputs:
            readers = [node for node in value.consumers() if node.op_type in _AFTER_MEAN and node not in found]
            readers = [node for node in readers if all(v is value or scalar_of(v) is not None for v in node.inputs)]
            found.update(readers)
            todo.extend(readers)
    return found
