"""Types and shapes of all values, with the batch as the only symbol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scm_sdk.errors import UnsupportedGraphError

from .names import source_line
from .partial import BATCH_DIM

if TYPE_CHECKING:
    import onnx_ir as ir

SMALL_TENSOR = 1024
"""Bytes. Shapes and axes are not larger."""


def name_batch(model: ir.Model) -> ir.Model:
    """Call the symbolic dimension of the inputs ``batch``.

    Ensures: every other dimension of an input is a number. Shapes in between are left to
    ``infer_shapes``.

    Raises:
        UnsupportedGraphError: If there is no symbolic dimension, or more than one.
    """
    import onnx_ir as ir

    inputs = [(value, list(value.shape or ())) for value in model.graph.inputs]
    symbols = {str(d) for _, dims in inputs for d in dims if not isinstance(d, int)}
    if len(symbols) != 1:
        raise UnsupportedGraphError(
            f"the network's inputs have {len(symbols)} symbolic dimensions {sorted(symbols)}, expected one, "
            "the batch. A network that fixes the batch size cannot be exported."
        )
    for value, dims in inputs:
        value.shape = ir.Shape(d if isinstance(d, int) else BATCH_DIM for d in dims)
    return model


def infer_shapes(model: ir.Model) -> ir.Model:
    """Find the type and shape of every value, the batch its only symbol.

    ONNX's own inference runs for two batch sizes and the results are compared. That finds more than
    one run with a symbol, which loses it at a Reshape.

    Requires: ``name_batch``.
    Ensures: each dimension is a number, ``"batch"`` or, for example, ``"4*batch"``.

    Raises:
        UnsupportedGraphError: If a shape cannot be inferred, or is not proportional to the batch.
    """
    import onnx_ir as ir

    few, many = (_inferred(model.graph, batch) for batch in (3, 5))
    for node in model.graph:
        for value in node.outputs:
            dims: list[int | str] = []
            at_3, at_5 = few.get(value.name or ""), many.get(value.name or "")
            if at_3 is None or at_5 is None or len(at_3[1]) != len(at_5[1]):
                raise _not_inferred(node, value)
            for size_3, size_5 in zip(at_3[1], at_5[1], strict=True):
                if size_3 == size_5 and size_3 is not None:
                    dims.append(size_3)
                elif size_3 and size_5 and size_3 * 5 == size_5 * 3:
                    dims.append(BATCH_DIM if size_3 == 3 else f"{size_3 // 3}*{BATCH_DIM}")
                else:
                    raise _not_inferred(node, value)
            value.type = ir.TensorType(ir.DataType(at_3[0]))
            value.shape = ir.Shape(dims)
    return model


def _inferred(graph: ir.Graph, batch: int) -> dict[str, tuple[int, list[int | None]]]:
    """Return type and shape of what ONNX's inference finds for one batch size, by name."""
    import onnx
    import onnx_ir as ir

    def declare(value: ir.Value) -> onnx.ValueInfoProto:
        assert value.dtype is not None, "inputs, outputs and weights have a type"
        dims = None if value.shape is None else [batch if d == BATCH_DIM else int(str(d)) for d in value.shape]
        return onnx.helper.make_tensor_value_info(value.name or "", int(value.dtype), dims)

    inputs, initializers = [declare(value) for value in graph.inputs], []
    for value in graph.initializers.values():
        # Inference reads small tensors (shapes, axes); of weights it needs the shape alone.
        if value.const_value is not None and value.const_value.nbytes <= SMALL_TENSOR:
            initializers.append(onnx.numpy_helper.from_array(value.const_value.numpy(), value.name))
        else:
            inputs.append(declare(value))
    outputs = [onnx.helper.make_tensor_value_info(v.name or "", int(v.dtype or 1), None) for v in graph.outputs]
    nodes = [ir.to_proto(node) for node in graph]
    skeleton = onnx.helper.make_graph(nodes, "skeleton", inputs, outputs, initializers)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    proto = onnx.helper.make_model(skeleton, opset_imports=opsets)
    try:
        found = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as exc:
        raise UnsupportedGraphError(
            f"shape inference failed: {str(exc).strip()}. Expected a graph whose shapes fit each other; "
            "this is a bug of the exporter or of scm-sdk, please report it."
        ) from exc
    return {
        v.name: (
            v.type.tensor_type.elem_type,
            [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim],
        )
        for v in (*found.value_info, *found.output)
        if v.type.tensor_type.HasField("shape")
    }


def _not_inferred(node: ir.Node, value: ir.Value) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"the shape of {value.name!r} ({node.op_type}) could not be inferred, expected sizes that are fixed "
        "or proportional to the batch. Avoid operators whose output size depends on "
        f"values.{source_line(node)}"
    )
