"""Add a sampler graph that another tool quantized, if TensorRT can build it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk.errors import ShapeError, UnsupportedGraphError
from scm_sdk.spec import SamplerSpec

from ..graph.compose import SPEC_KEY
from ..graph.io import read_model
from .half import PRECISION_KEY

if TYPE_CHECKING:
    import onnx_ir as ir


_INTEGER_OPERATORS = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "QLinearAdd"}
)
"""Explicit integer operators of other tools. TensorRT requires Q/DQ pairs instead."""


def adopt_quantized(path: Path, spec: SamplerSpec) -> ir.Model:
    """Read a graph with QuantizeLinear and DequantizeLinear nodes, for example ModelOpt's, and check it.

    Args:
        path: The ONNX file.
        spec: The expected sampler.

    Returns:
        The graph with the metadata of a bundle's graphs.

    Raises:
        ExportError: If it cannot be read.
        ShapeError: If its inputs or outputs do not match the sampler.
        UnsupportedGraphError: If it is not quantized, or in a form that TensorRT refuses.
    """
    model = read_model(path)
    _check_interface(model, spec, path)
    _check_quantization(model, path)
    model.metadata_props[SPEC_KEY] = spec.to_json()
    model.metadata_props[PRECISION_KEY] = "int8"
    return model


def _check_interface(model: ir.Model, spec: SamplerSpec, path: Path) -> None:
    kinds = {"float32": "FLOAT", "int64": "INT64"}
    found, outputs = ({v.name: _kind(v) for v in values} for values in (model.graph.inputs, model.graph.outputs))
    wanted = {t.name: (kinds[t.dtype], "batch", *t.shape) for t in spec.inputs}
    images = {spec.output_name: ("FLOAT", "batch", *spec.image_shape)}
    if found != wanted or outputs != images:
        raise ShapeError(
            f"{path} has inputs {found} and outputs {outputs}, expected {wanted} and {images}. "
            "Quantize a graph of this bundle, and keep its inputs and outputs in float32 and its batch size free."
        )


def _kind(value: ir.Value) -> tuple[str | int | None, ...]:
    """Return dtype and shape, with the batch dimension renamed to ``batch``."""
    batch, *rest = value.shape or (None,)
    first = batch if isinstance(batch, int) else "batch"
    return (str(value.dtype), first, *(d if isinstance(d, int) else str(d) for d in rest))


def _check_quantization(model: ir.Model, path: Path) -> None:
    """Refuse graphs that TensorRT's parser refuses: integer operators, shifted zero points, int32 biases."""
    import onnx_ir as ir

    pairs = []
    for node in model.graph:
        if node.op_type in _INTEGER_OPERATORS:
            raise UnsupportedGraphError(
                f"{path}: node {node.name!r} is {node.op_type}, expected QuantizeLinear and DequantizeLinear around "
                "floating-point operators: TensorRT takes no other form. Quantize again in the QDQ format."
            )
        if node.op_type.startswith("Random"):
            raise UnsupportedGraphError(
                f"{path}: node {node.name!r} ({node.op_type}) draws random numbers, expected all noise as inputs. "
                "Quantize a graph of this bundle."
            )
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            pairs.append(node)
    if not pairs:
        raise UnsupportedGraphError(
            f"{path} has no QuantizeLinear or DequantizeLinear node, expected a graph that was quantized with them."
        )
    for node in pairs:
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        tensor = ir.convenience.get_const_tensor(zero) if zero is not None else None
        codes = node.inputs[0].dtype if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
        if codes == ir.DataType.INT32:
            raise UnsupportedGraphError(
                f"{path}: node {node.name!r} dequantizes an int32 bias, expected biases in floating point: TensorRT "
                "refuses it. Quantize again with extra_options={'QuantizeBias': False}."
            )
        if zero is not None and (tensor is None or tensor.numpy().any()):
            raise UnsupportedGraphError(
                f"{path}: node {node.name!r} has a zero point that is not zero, expected symmetric quantization: "
                "TensorRT takes no other. Quantize again with symmetric activations and weights."
            )
        made = {dtype for dtype in (codes, tensor.dtype if tensor is not None else None) if dtype is not None}
        if node.op_type == "QuantizeLinear" and zero is None:  # the default of the operator is uint8
            made.add(ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8))
        if odd := sorted(dtype.name.lower() for dtype in made - {ir.DataType.INT8}):
            raise UnsupportedGraphError(
                f"{path}: node {node.name!r} makes {odd[0]}, expected int8. Quantize again with signed 8-bit "
                "activations and weights."
            )
