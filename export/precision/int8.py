"""INT8 as a graph transform: symmetric QuantizeLinear and DequantizeLinear around selected operators.

The form that every TensorRT accepts, and the only one of TensorRT 11: the input of a layer is rounded to int8 with one
scale, its weights are stored as int8 with a scale per output channel, and biases are unchanged. The rest of the graph
keeps its precision, usually FP16. Zero points are zero: TensorRT refuses others, and int8 biases.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from scm_sdk._util.json_struct import JsonFile
from scm_sdk.errors import ConfigError, ExportError

from ..graph.ops import stored
from .calibration import Calibration
from .half import PRECISION_KEY, conditioning_nodes

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import DTypeLike

logger = logging.getLogger(__name__)

OUTPUT_AXIS = {"Conv": 0, "Gemm": 1, "MatMul": -1}
"""Quantizable operators, and the output channel axis of their weight (for Gemm without transB)."""
FREE = "does not depend on the noise: small, and its error would shift every pixel alike"
"""Reason why conditioning keeps its precision."""
_STEP = re.compile(r"step\d+/")
QMAX = 127


class Exclusion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers that are not quantized.

    Attributes:
        pattern: A shell pattern over node names, such as ``step*/conv_out/Conv``. One plan serves graphs of several
            numbers of steps: patterns of steps that a graph lacks, ``step1/...``, are ignored.
        reason: Reason.
    """

    pattern: str
    reason: str


class QuantizePlan(JsonFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers of a sampler graph that compute in int8; stored in a bundle as ``precision/int8.json``.

    Attributes:
        exclusions: Layers that keep the precision of the graph.
    """

    TITLE = "quantization plan"
    REMEDY = "Expected the JSON that scm-export quantize writes."
    ERROR = ConfigError

    exclusions: tuple[Exclusion, ...] = ()

    def excluding(self, *exclusions: Exclusion) -> QuantizePlan:
        """Return this plan with more exclusions."""
        return msgspec.structs.replace(self, exclusions=self.exclusions + exclusions)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a graph with weights.

    Attributes:
        quantized: Names of the quantized layers, in the graph's order.
        left: Names of the others, each with the reason.
    """

    quantized: tuple[str, ...]
    left: dict[str, str]

    def share(self) -> str:
        """Return the share of quantized layers by kind, for example ``70 of 74 Conv``.

        Layers that do not depend on the noise are not counted, because no plan quantizes them.
        """
        names = [*self.quantized, *(name for name, reason in self.left.items() if reason != FREE)]
        kinds = Counter(map(_kind, names))
        quantized = Counter(map(_kind, self.quantized))
        return ", ".join(f"{quantized[kind]} of {count} {kind}" for kind, count in kinds.items()) or "nothing"


def default_quantize_plan(model: ir.Model) -> QuantizePlan:
    """Return the default plan: all layers except the first and the last of a step.

    The first reads the noise and the last writes the pixels; both are small, and their errors are visible.
    """
    names = [node.name or "" for node in _weighted(model) if node not in conditioning_nodes(model.graph)]
    in_step = [name for name in names if name.startswith("step0/")]
    if len(in_step) < 3:
        return QuantizePlan()
    first, last = ("step*/" + _STEP.sub("", name, count=1) for name in (in_step[0], in_step[-1]))
    return QuantizePlan(
        exclusions=(
            Exclusion(pattern=first, reason="the first layer reads the raw noise"),
            Exclusion(pattern=last, reason="the last layer writes the pixels"),
        )
    )


def choose_layers(model: ir.Model, plan: QuantizePlan) -> Layers:
    """Return the layers of a graph that a plan quantizes, and the reasons for the others.

    Raises:
        ConfigError: If a pattern of the plan matches no layer with weights.
    """
    free = conditioning_nodes(model.graph)
    quantized, left = [], {}
    layers = list(_weighted(model))
    steps = {step_of(node.name or "") for node in model.graph}
    for exclusion in plan.exclusions:
        of_another_graph = step_of(exclusion.pattern) not in steps | {""}
        if not of_another_graph and not any(fnmatchcase(node.name or "", exclusion.pattern) for node in layers):
            raise ConfigError(
                f"exclusion {exclusion.pattern!r} matches no layer with weights, expected a shell pattern over names "
                f"such as {layers[0].name if layers else 'none: the graph has no such layer'}."
            )
    for node in layers:
        name = node.name or ""
        reasons = [e.reason for e in plan.exclusions if fnmatchcase(name, e.pattern)]
        if node in free:
            left[name] = FREE
        elif reasons:
            left[name] = reasons[0]
        else:
            quantized.append(name)
    return Layers(quantized=tuple(quantized), left=left)


def quantize(model: ir.Model, calibration: Calibration, plan: QuantizePlan) -> ir.Model:
    """Return a graph with quantized layers.

    Args:
        model: The FP16, BF16 or float32 graph; it is not changed.
        calibration: Ranges for every quantized layer.
        plan: The plan.

    Returns:
        A new graph with the same node names. A weight is stored once as int8 for any number of steps.

    Raises:
        ConfigError: If the calibration lacks a layer, or the graph is quantized already.
        ExportError: If a weight is not finite.
    """
    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        raise ConfigError("the graph is quantized already, expected FP16 or float32. Start from onnx/fp16.")
    layers = choose_layers(model, plan)
    missing = [name for name in layers.quantized if name not in calibration.ranges]
    if missing:
        raise ConfigError(
            f"the calibration has no range for {missing[0]!r} ({len(missing)} missing), expected one for each "
            "quantized layer. Calibrate this graph again."
        )
    copy = model.clone()
    quantizer = _Quantizer(copy, calibration)
    chosen = set(layers.quantized)
    for node in list(copy.graph):
        if node.name in chosen:
            quantizer.quantize_node(node)
    quantizer.drop_unused()
    for name, reason in layers.left.items():
        logger.debug("int8: kept %s: %s", name, reason)
    logger.debug("int8: %s", layers.share())
    copy.metadata_props[PRECISION_KEY] = "int8"
    return copy


def quantize_array(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return ``round(array / scale)`` as int8, ties to even as QuantizeLinear rounds."""
    ratio = array.astype(np.float64) / scale.astype(np.float64)
    return np.clip(np.rint(ratio), -QMAX, QMAX).astype(np.int8)


def scale_for(largest: np.ndarray | float, dtype: DTypeLike) -> np.ndarray:
    """Return scales that map ±``largest`` to at most ±127, in the type of the graph; 1 for zero.

    In a type with few digits the scale is rounded up, so that nothing is clipped; rounding to nearest would clip the
    largest value by several steps for subnormal halves (below 6e-5). Codes are computed with the rounded scale.
    """
    exact = np.asarray(largest, np.float64) / QMAX
    scale = exact.astype(dtype)
    scale = np.where(scale.astype(np.float64) < exact, np.nextafter(scale, np.asarray(np.inf, dtype)), scale)
    usable: np.ndarray = np.where(scale > 0, scale, np.ones((), dtype))
    return usable


def step_of(name: str) -> str:
    """Return the prefix ``step1/`` of a name, or nothing."""
    found = _STEP.match(name)
    return found.group() if found else ""


class _Quantizer:
    """Inserts pairs of QuantizeLinear and DequantizeLinear into a graph."""

    def __init__(self, model: ir.Model, calibration: Calibration) -> None:
        self.graph = model.graph
        self.ranges = calibration.ranges
        self.activations: dict[tuple[ir.Value, float], ir.Value] = {}
        self.weights: dict[ir.Value, tuple[ir.Value, ir.Value, int]] = {}

    def quantize_node(self, node: ir.Node) -> None:
        """Quantize the input and the weights of a layer."""
        data, weight = node.inputs[0], node.inputs[1]
        assert data is not None and weight is not None, "choose_layers takes layers with both"
        node.replace_input_with(0, self._activation(node, data))
        node.replace_input_with(1, self._weight(node, weight))

    def drop_unused(self) -> None:
        """Remove the weights that were replaced by int8."""
        for value in self.weights:
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[value.name or ""]

    def _activation(self, node: ir.Node, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        largest = self.ranges[node.name or ""]
        key = (value, largest)
        if key not in self.activations:
            assert value.dtype is not None
            name = f"{node.name}/quantize"
            scale = stored(self.graph, f"{name}.scale", scale_for(largest, value.dtype.numpy()))
            zero = stored(self.graph, "int8_zero", np.zeros((), np.int8))
            codes = ir.Value(name=f"{name}.out", shape=value.shape, type=ir.TensorType(ir.DataType.INT8))
            back = ir.Value(name=f"{node.name}/dequantize.out", shape=value.shape, type=ir.TensorType(value.dtype))
            pair = [
                ir.Node("", "QuantizeLinear", [value, scale, zero], outputs=[codes], name=name),
                ir.Node("", "DequantizeLinear", [codes, scale, zero], outputs=[back], name=f"{node.name}/dequantize"),
            ]
            self.graph.insert_before(node, pair)
            self.activations[key] = back
        return self.activations[key]

    def _weight(self, node: ir.Node, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        if value not in self.weights:
            self.weights[value] = self._quantize_weight(node, value)
        codes, scale, axis = self.weights[value]
        out = ir.Value(name=f"{node.name}/weight_dequantize.out", shape=value.shape, type=value.type)
        name = f"{node.name}/weight_dequantize"
        attributes = [ir.AttrInt64("axis", axis)]
        self.graph.insert_before(
            node, ir.Node("", "DequantizeLinear", [codes, scale], attributes, outputs=[out], name=name)
        )
        return out

    def _quantize_weight(self, node: ir.Node, value: ir.Value) -> tuple[ir.Value, ir.Value, int]:
        assert value.const_value is not None and value.dtype is not None
        array = value.const_value.numpy().astype(np.float32)
        if not np.isfinite(array).all():
            raise ExportError(f"weight {value.name!r} is not finite, expected numbers. Load the checkpoint again.")
        transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        axis = 0 if transposed else OUTPUT_AXIS[node.op_type] % array.ndim
        others = tuple(i for i in range(array.ndim) if i != axis)
        scale = scale_for(np.abs(array).max(axis=others), value.dtype.numpy())
        shape = [-1 if i == axis else 1 for i in range(array.ndim)]
        codes = quantize_array(array, scale.astype(np.float32).reshape(shape))
        return stored(self.graph, f"{value.name}.int8", codes), stored(self.graph, f"{value.name}.scale", scale), axis


def _kind(name: str) -> str:
    """Return the operator in the name of a node: ``Conv`` of ``step0/conv_in/Conv_1``."""
    return name.rpartition("/")[2].partition("_")[0]


def _weighted(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the layers with a stored weight and a computed input."""
    for node in model.graph:
        if node.op_type in OUTPUT_AXIS and len(node.inputs) > 1:
            data, weight = node.inputs[0], node.inputs[1]
            if data is not None and weight is not None and weight.is_initializer() and not data.is_initializer():
                yield node
