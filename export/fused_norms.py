"""Write the pixel norm as CPU libraries know it, so that each becomes one kernel: RMS of OpenVINO, and ONNX Runtime's.

``pixel_norms`` writes x (sqrt(C) / max(||x||, sqrt(C eps))), which suits engines and low precisions. Both CPU libraries
look for x / sqrt(mean(x^2) + eps) * scale over the last axis. The two differ by less than float32 shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .constants import scalar_of, stored

if TYPE_CHECKING:
    import onnx_ir as ir


def norms_that_fuse(model: ir.Model) -> int:
    """Rewrite the pixel norms over a last axis, in place; return how many there were.

    Requires: values have their shapes.
    """
    found = [(node, match) for node in model.graph if (match := _match(node)) is not None]
    for node, (x, eps, channels) in found:
        _rewrite(model.graph, node, x, eps, channels)
    return len(found)


def _match(mul: ir.Node) -> tuple[ir.Value, float, int] | None:
    """Return what a Mul normalizes, its eps and its channels, or None if it ends no pixel norm over a last axis."""
    if mul.op_type != "Mul":
        return None
    for x, inverse in (mul.inputs, mul.inputs[::-1]):
        chain = [inverse]
        for op_type, place in (("Div", 1), ("Max", 0), ("ReduceL2", 0)):
            node = None if chain[-1] is None else chain[-1].producer()
            if node is None or node.op_type != op_type:
                break
            chain.append(node.inputs[place])
        else:
            guard, length = (chain[i].producer() for i in (1, 2))  # type: ignore[union-attr]
            least = None if guard is None else scalar_of(guard.inputs[1])
            axis = None if length is None else scalar_of(length.inputs[1])
            shape = None if x is None else x.shape
            if x is not None and chain[-1] is x and shape is not None and least and axis is not None:
                channels = shape[-1]
                if int(axis) in (-1, len(shape) - 1) and isinstance(channels, int):
                    return x, least**2 / channels, channels
    return None


def _rewrite(graph: ir.Graph, mul: ir.Node, x: ir.Value, eps: float, channels: int) -> None:
    import onnx_ir as ir

    old = next(value for value in mul.inputs if value is not x)

    def make(op_type: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        name = f"{mul.name}/rms.{op_type}"
        out = ir.Value(name=f"{name}.out", type=x.type)
        attrs = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        graph.insert_before(mul, ir.Node("", op_type, inputs, attrs, outputs=[out], name=name))
        return out

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
