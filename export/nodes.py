"""Nodes that are put into a graph where others were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


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
    """Put a node of one float32 output, ``<name>.out``, before another one, and return that output."""
    import onnx_ir as ir

    out = ir.Value(name=f"{name}.out", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.insert_before(reader, ir.node(op_type, inputs, attributes, outputs=[out], name=name))
    return out
