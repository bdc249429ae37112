"""Weight-only INT8 and INT4: weights in blocks of 32 with a scale each, computed in float32 by ONNX Runtime.

ONNX Runtime's own quantizer makes the codes of each weight, and its operator ``com.microsoft::MatMulNBits``
multiplies by them. It has no convolution: a pointwise one (1x1), which holds half the weights of SANA's transformer,
becomes a product over channels. Other convolutions, all activations, and the layers of the conditioning, which do not
depend on the noise, stay in float32, so nothing is calibrated.

A weight is stored once for any number of steps.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from scm_sdk._util.lazy import install_command, require
from scm_sdk.errors import BackendUnavailable, ConfigError, ExportError

from ..graph.ops import put_before, stored
from .half import PRECISION_KEY
from .int8 import QuantizePlan, choose_layers

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

BITS = {"int8-weights": 8, "int4": 4}
"""Bits of a weight in each weight-only precision."""
BLOCK = 32
"""Weights that share a scale, along the summed axis."""
DOMAIN = "com.microsoft"
"""Domain of ``MatMulNBits``."""


def quantize_weights(model: ir.Model, plan: QuantizePlan, precision: str) -> ir.Model:
    """Return a float32 graph with quantized weights.

    Args:
        model: The float32 sampler graph; it is not changed.
        plan: The plan of excluded layers.
        precision: A key of ``BITS``.

    Raises:
        ConfigError: If the plan does not match the graph, or no layer can be quantized.
        ExportError: If a weight is not finite.
        BackendUnavailable: If onnxruntime is not installed or has no such quantizer.
    """
    chosen = set(choose_layers(model, plan).quantized)
    copy = model.clone()
    work = _Quantizer(copy, BITS[precision])
    done = sum(work.quantize(node) for node in list(copy.graph) if node.name in chosen)
    if not done:
        raise ConfigError(
            f"the plan leaves no layer for {precision}, expected at least one product or pointwise convolution with a "
            "stored weight. Exclude fewer layers."
        )
    work.drop_unused()
    logger.debug("%s: %d of %d layers", precision, done, len(chosen))
    copy.opset_imports[DOMAIN] = 1
    copy.metadata_props[PRECISION_KEY] = precision
    return copy


class _Quantizer:
    """Replaces layers of a graph; each weight is quantized once."""

    def __init__(self, model: ir.Model, bits: int) -> None:
        require("onnxruntime", extra="onnxruntime", purpose="quantizing weights")
        try:
            from onnxruntime.quantization import matmul_nbits_quantizer as library
        except ImportError as exc:
            raise BackendUnavailable(
                f"this onnxruntime has no quantizer of weights ({exc}), expected 1.23 or later with onnx_ir. Install: "
                f"{install_command('onnxruntime', '--upgrade')}"
            ) from exc
        config = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
        self._library: Any = library.DefaultWeightOnlyQuantizer(config)
        self._graph, self._bits = model.graph, bits
        self._weights: dict[ir.Value, tuple[list[ir.Value], int, int]] = {}

    def quantize(self, node: ir.Node) -> bool:
        """Replace one layer; return whether it is of a kind that can be."""
        weight = node.inputs[1]
        assert weight is not None and weight.shape is not None, "choose_layers takes layers with a weight"
        if (node.op_type == "MatMul" and len(weight.shape) == 2) or _is_plain_gemm(node):
            self._replace(node, node.inputs[0])
            return True
        if not _is_pointwise(node):
            return False
        before, name = node.inputs[0], node.name or ""
        assert before is not None
        last = put_before(
            self._graph, node, f"{name}/channels_last", "Transpose", [before], {"perm": [0, 2, 3, 1]},
            shape=_permuted(before.shape, (0, 2, 3, 1)),
        )  # fmt: skip
        self._replace(node, last)
        return True

    def drop_unused(self) -> None:
        """Remove the weights that were replaced."""
        for value in self._weights:
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[value.name or ""]

    def _replace(self, node: ir.Node, data: ir.Value | None) -> None:
        """Insert the product; of a convolution also its bias and the return to channels first."""
        import onnx_ir as ir

        old, weight, name = node.outputs[0], node.inputs[1], node.name or ""
        assert weight is not None
        convolution = node.op_type == "Conv"
        parts, K, N = self._codes(weight, transposed=convolution or bool(node.attributes.get_int("transB", 0)))
        biased = len(node.inputs) > 2 and node.inputs[2] is not None
        shape = _permuted(old.shape, (0, 2, 3, 1)) if convolution else old.shape
        product = ir.Value(name=f"{name}/product.out", shape=shape, type=old.type)
        attributes = {"K": K, "N": N, "bits": self._bits, "block_size": BLOCK}
        made = [ir.node("MatMulNBits", [data, *parts], attributes, domain=DOMAIN, outputs=[product], name=name)]
        out = product
        if biased:
            out = ir.Value(name=f"{name}/bias.out", shape=shape, type=old.type)
            made.append(ir.node("Add", [product, node.inputs[2]], outputs=[out], name=f"{name}/bias"))
        if convolution:
            first, perm = ir.Value(shape=old.shape, type=old.type), {"perm": [0, 3, 1, 2]}
            made.append(ir.node("Transpose", [out], perm, outputs=[first], name=f"{name}/channels_first"))
            out = first
        self._graph.insert_before(node, made)
        old.name, out.name = f"{old.name}.replaced", old.name
        ir.convenience.replace_all_uses_with(old, out)
        for i, output in enumerate(self._graph.outputs):
            if output is old:
                self._graph.outputs[i] = out
        self._graph.remove(node, safe=True)

    def _codes(self, value: ir.Value, *, transposed: bool) -> tuple[list[ir.Value], int, int]:
        """Return codes, scales and zero points of a weight, and its lengths K, which is summed over, and N."""
        if value not in self._weights:
            assert value.const_value is not None
            array = np.asarray(value.const_value.numpy(), np.float32)
            if not np.isfinite(array).all():
                raise ExportError(f"weight {value.name!r} is not finite, expected numbers. Load the checkpoint again.")
            matrix = array.reshape(array.shape[:2])  # that of a pointwise convolution has two more axes of one
            matrix = matrix.T if transposed else matrix
            found = self._library.qbits_block_quant(np.ascontiguousarray(matrix))
            suffixes = (f"codes{self._bits}", "scales", "zero_points")
            parts = [
                stored(self._graph, f"{value.name}.{suffix}", part)
                for suffix, part in zip(suffixes, found, strict=True)
            ]
            K, N = map(len, (matrix, matrix.T))
            self._weights[value] = (parts, K, N)
        return self._weights[value]


def _is_plain_gemm(node: ir.Node) -> bool:
    """Return whether a node is a product and a sum without factors, of an input that is not transposed."""
    attributes = node.attributes
    factors = (attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0))
    return node.op_type == "Gemm" and factors == (1.0, 1.0) and not attributes.get_int("transA", 0)


def _is_pointwise(node: ir.Node) -> bool:
    """Return whether a node is a convolution of single pixels that mixes all channels."""
    if node.op_type != "Conv":
        return False
    weight, get = node.inputs[1], node.attributes.get_ints
    assert weight is not None and weight.shape is not None
    sizes = list(weight.shape)
    return (
        len(sizes) == 4
        and sizes[2:] == [1, 1]
        and node.attributes.get_int("group", 1) == 1
        and set(get("strides") or [1]) == {1}
        and not any(get("pads") or [0])
    )


def _permuted(shape: ir.Shape | None, axes: tuple[int, ...]) -> ir.Shape | None:
    import onnx_ir as ir

    return None if shape is None else ir.Shape([shape[axis] for axis in axes])
