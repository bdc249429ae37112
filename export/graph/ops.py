"""Constants and nodes: add them to a graph, and read stored values back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def stored(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the initializer with a name, created from an array if missing; all steps share it."""
    import onnx_ir as ir

    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def scalar_of(value: ir.Value | None) -> float | None:
    """Return the value of a stored scalar, None for other values."""
    constant = None if value is None else value.const_value
    return None if constant is None or constant.size != 1 else float(constant.numpy().reshape(-1)[0])


def put_before(
    graph: ir.Graph,
    reader: ir.Node,
    name: str,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int] | Mapping[str, list[int]],
    *,
    shape: ir.Shape | None = None,
) -> ir.Value:
    """Insert a node with one float32 output, ``<name>.out``, before another node, and return the output."""
    import onnx_ir as ir

    out = ir.Value(name=f"{name}.out", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.insert_before(reader, ir.node(op_type, inputs, attributes, outputs=[out], name=name))
    return out
