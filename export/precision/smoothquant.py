"""SmoothQuant-style channel equalization before INT8 quantization.

An activation is rounded to int8 with one scale for all channels, so a few large channels reduce the accuracy of all
others. Dividing each channel by a factor and multiplying the weights by the same factor does not change the network,
and moves the range to the weights, which have a scale per output channel:

    W x = (W s) (x / s),    s_c = (max|x_c|)^a / (max|W_c|)^(1 - a)

The exponent ``a`` minimizes the expected rounding error of both sides, jointly for all layers that read one value
(queries, keys and values: rounded once) or one weight (the steps of a sampler). Source: Xiao et al., 2023,
"SmoothQuant", arXiv 2211.10438, Eq. 4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scm_sdk._util.events import SILENT, Events
from scm_sdk.inference.conditioning import Examples
from scm_sdk.spec import SamplerSpec

from ..graph.ops import stored
from .calibration import Runner, calibration_seeds
from .int8 import OUTPUT_AXIS, QMAX

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

EQUALIZED_SUFFIX, FACTOR_SUFFIX = ".equalized", ".factor"
"""Name suffixes of an equalized weight and of its factors."""
EQUALIZE_NODE = "/equalize"
"""Name suffix of the node that multiplies by the factors."""
EXPONENTS = tuple(i / 8 for i in range(9))
_MAX_RATIO = 64.0
"""Largest factor relative to the geometric mean, so that a channel that is nearly always zero is not amplified."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Statistics of the input of a layer by channel, (C,) float64 each.

    Attributes:
        largest: Largest absolute value.
        mean_square: Mean square.
    """

    largest: np.ndarray
    mean_square: np.ndarray


def input_axis(node: ir.Node) -> int:
    """Return the input channel axis of a layer's weight."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1):
        return 1
    return -2 if node.op_type == "MatMul" else 0


def choose_factors(
    model: ir.Model,
    nodes: Sequence[str],
    spec: SamplerSpec,
    *,
    num_samples: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    examples: Examples | None = None,
    events: Events = SILENT,
) -> dict[str, np.ndarray]:
    """Return the factors of each weight that improves, (C,) float64, by weight name.

    Args:
        model: The float32 sampler graph; it is not changed.
        nodes: Names of the layers that will be quantized.
        spec: The sampler.
        num_samples: Number of samples, the same as in ``calibrate``. With different samples for the ranges the shipped
            model loses 1.7 to 4 dB (mean PSNR of 512 fresh seeds; 128 and 128 others, three draws), and more with 64.
        seed: Random seed of the samples.
        batch_size: Batch size; it limits memory.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.
        events: Receives a step for each batch.

    Raises:
        BackendUnavailable: If onnxruntime is not installed.
    """
    layers = {node.name or "": node for node in model.graph if node.name in set(nodes) and _can_be_equalized(node)}
    if not layers:
        return {}
    seeds = calibration_seeds(spec, num_samples=num_samples, seed=seed, batch_size=batch_size)
    channels = _measure(Runner(model, spec, seeds, events, examples), list(layers.values()))
    found = {}
    for group in _groups(list(layers.values())):
        readers = {_weight(node): node for node in group}
        read = [channels[key] for key in {_read(node): None for node in group}]
        factors = _best([_by_input_channel(node) for node in readers.values()], read)
        names = ", ".join(node.name or "" for node in group)
        if factors is None:
            logger.debug("equalize: kept %s: no factors round it better", names)
        else:
            logger.debug("equalize: %s by factors of %.3g to %.3g", names, factors.min(), factors.max())
            found.update({weight.name or "": factors for weight in readers})
    return found


def equalize(model: ir.Model, nodes: Sequence[str], factors: Mapping[str, np.ndarray]) -> ir.Model:
    """Return an equivalent graph with equalized channels.

    Args:
        model: The graph in any precision; it is not changed.
        nodes: Names of the layers to equalize; other layers keep the original weight.
        factors: Result of ``choose_factors`` for the float32 graph.
    """
    copy = model.clone()
    chosen = set(nodes)
    divided: dict[tuple[ir.Value, int, bytes], ir.Value] = {}
    for node in list(copy.graph):
        if node.name in chosen and _weight(node).name in factors:
            by = factors[_weight(node).name or ""]
            key = (*_read(node), by.tobytes())
            divided[key] = _equalize_node(copy.graph, node, by, divided.get(key))
    for name in [name for name, value in copy.graph.initializers.items() if not value.uses()]:
        if not copy.graph.initializers[name].is_graph_output():
            del copy.graph.initializers[name]
    return copy


def _equalize_node(graph: ir.Graph, node: ir.Node, factors: np.ndarray, divided: ir.Value | None) -> ir.Value:
    """Divide the input of a layer by its factors, unless done, and multiply the weights by the rounded factors."""
    import onnx_ir as ir

    (data, axis), weight = _read(node), _weight(node)
    kept = weight.const_value
    assert data.dtype is not None and kept is not None
    values, inverse = kept.numpy(), (1 / factors).astype(data.dtype.numpy())
    undone = values.astype(np.float64) / _along(inverse.astype(np.float64), values.ndim, input_axis(node))
    if divided is None:
        broadcast = _along(inverse, len(data.shape or ()), axis)
        by = stored(graph, f"{weight.name}{FACTOR_SUFFIX}", np.ascontiguousarray(broadcast))
        divided = ir.Value(name=f"{node.name}{EQUALIZE_NODE}.out", shape=data.shape, type=data.type)
        name = f"{node.name}{EQUALIZE_NODE}"
        graph.insert_before(node, ir.Node("", "Mul", [data, by], outputs=[divided], name=name))
    node.replace_input_with(0, divided)
    node.replace_input_with(1, stored(graph, f"{weight.name}{EQUALIZED_SUFFIX}", undone.astype(values.dtype)))
    return divided


def _can_be_equalized(node: ir.Node) -> bool:
    return node.op_type in OUTPUT_AXIS and node.attributes.get_int("group", 1) == 1


def _groups(layers: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Group the layers that must share factors, because they read the same values or weights."""
    groups: list[tuple[set[object], list[ir.Node]]] = []
    for node in layers:
        shared: set[object] = {_read(node), _weight(node)}
        nodes, apart = [node], []
        for group in groups:
            if shared & group[0]:
                shared, nodes = shared | group[0], group[1] + nodes
            else:
                apart.append(group)
        groups = [*apart, (shared, nodes)]
    return [nodes for _, nodes in groups]


def _best(weights: Sequence[np.ndarray], channels: Sequence[Channels]) -> np.ndarray | None:
    """Return the factors with the smallest expected error, or None if no factors improve it.

    Args:
        weights: (C, O, ...) each, float64.
        channels: Statistics of their inputs, one per value.
    """
    largest = np.max([each.largest for each in channels], axis=0)
    weight_largest = np.max([np.abs(weight).max(axis=(1, 2)) for weight in weights], axis=0)
    if not largest.any() or not weight_largest.any():
        return None
    # A channel that is always zero, or unused, counts as the smallest of the others.
    x = np.maximum(largest, largest[largest > 0].min())
    w = np.maximum(weight_largest, weight_largest[weight_largest > 0].min())
    candidates = [np.ones_like(x)]
    for exponent in EXPONENTS:
        log_s = exponent * np.log(x) - (1 - exponent) * np.log(w)
        candidates.append(np.exp(np.clip(log_s - log_s.mean(), -np.log(_MAX_RATIO), np.log(_MAX_RATIO))))
    best = int(np.argmin([sum(_cost(weight, channels, s) for weight in weights) for s in candidates]))
    return candidates[best] if best else None


def _cost(weight: np.ndarray, channels: Sequence[Channels], s: np.ndarray) -> float:
    """Return the expected squared error of a layer's outputs; each rounding is uniform over one step of its scale."""
    scaled = weight * s[:, None, None]
    weight_step = np.abs(scaled).max(axis=(0, 2)) / QMAX
    total = 0.0
    for each in channels:
        data_step = float((each.largest / s).max()) / QMAX
        total += float(np.square(scaled).sum()) * data_step**2
        total += weight.shape[2] * float(np.square(weight_step).sum()) * float((each.mean_square / s**2).sum())
    return total / 12


def _measure(runner: Runner, layers: Sequence[ir.Node]) -> dict[tuple[ir.Value, int], Channels]:
    """Compute channel statistics of the inputs of layers inside the graph, by value and channel axis."""
    import onnx_ir as ir

    copy = runner.model.clone()
    readers = {_read(node): node.name for node in layers}
    copies = {node.name: node for node in copy.graph}
    outputs: list[ir.Value] = []
    for i, name in enumerate(readers.values()):
        value, channel = _read(copies[name])
        rank = len(value.shape or ())
        over = stored(copy.graph, f"axes_{i}", np.array([a for a in range(rank) if a != channel % rank], np.int64))
        absolute, square = ir.val(f"absolute_{i}", value.dtype), ir.val(f"square_{i}", value.dtype)
        copy.graph.append(ir.Node("", "Abs", [value], outputs=[absolute], name=f"measure/absolute_{i}"))
        copy.graph.append(ir.Node("", "Mul", [value, value], outputs=[square], name=f"measure/square_{i}"))
        for what, read in (("ReduceMax", absolute), ("ReduceMean", square)):
            out = ir.val(f"measured_{len(outputs)}", value.dtype)
            drop = [ir.AttrInt64("keepdims", 0)]
            copy.graph.append(ir.Node("", what, [read, over], drop, outputs=[out], name=f"measure/{out.name}"))
            outputs.append(out)
    batches = [[array.astype(np.float64) for array in arrays] for arrays in runner.run(copy, outputs)]
    columns = [np.stack(column) for column in zip(*batches, strict=True)]
    return {
        key: Channels(largest=columns[2 * i].max(axis=0), mean_square=columns[2 * i + 1].mean(axis=0))
        for i, key in enumerate(readers)
    }


def _read(node: ir.Node) -> tuple[ir.Value, int]:
    """Return the input of a layer and its channel axis."""
    value = node.inputs[0]
    assert value is not None, "choose_layers takes layers that read something"
    return value, 1 if node.op_type == "Conv" else -1


def _weight(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    assert value is not None, "choose_layers takes layers with weights"
    return value


def _by_input_channel(node: ir.Node) -> np.ndarray:
    """Return the weight of a layer as (C, O, ...), float64."""
    kept = _weight(node).const_value
    assert kept is not None, "choose_layers takes layers whose weights are stored"
    array = kept.numpy().astype(np.float64)
    axis = input_axis(node) % array.ndim
    array = np.moveaxis(array, axis, 0)
    if node.op_type == "MatMul" and array.ndim > 2:  # (..., C, O): the leading axes are batches of weights
        array = np.moveaxis(array, -1, 1)
    return array.reshape(array.shape[0], array.shape[1], -1)


def _along(vector: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Shape a vector so that it is broadcast along one axis of ``rank``."""
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
