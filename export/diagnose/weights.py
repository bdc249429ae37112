"""Compare the tensors stored in a graph with those of its checkpoint, within the rounding of their type.

Weights are compared with those of the checkpoint with the same name; derived tensors with other names are compared with
the bundle's fp32 graph. 8-bit codes are dequantized first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..precision.smoothquant import EQUALIZE_NODE, EQUALIZED_SUFFIX, input_axis

if TYPE_CHECKING:
    import onnx_ir as ir

    from scm_sdk.model.consistency import ConsistencyModel

_ROUNDING = {"FLOAT16": 2.0**-11, "BFLOAT16": 2.0**-8}
"""Largest relative rounding error of a type, slightly more than half its last bit."""
_EXACT = 1e-6
"""Tolerance for float32, which export writes without rounding."""
_SUBNORMAL = 2.0**-24
"""Largest absolute error in the subnormal range of FLOAT16."""
_ROUNDERS = ("DequantizeLinear", "QuantizeLinear")
_CODE_SUFFIXES = (".int8", "_quantized")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Result of the comparison.

    Attributes:
        changed: Name and relative distance of each tensor that differs from its original, the largest first.
        compared: Number of compared tensors.
        unchecked: Names of the floating-point tensors without a known original.
    """

    changed: tuple[tuple[str, float], ...]
    compared: int
    unchecked: tuple[str, ...]


def compare_stored(graph: ir.Model, originals: Mapping[str, np.ndarray]) -> Stored:
    """Compare every stored tensor with its original.

    Args:
        graph: A sampler graph in any precision.
        originals: Expected tensors by their name in a float32 graph.
    """
    changed: dict[str, float] = {}
    compared, unchecked = 0, []
    for tensor in _tensors(graph):
        original = originals.get(tensor.name)
        if original is None or original.shape != tensor.values.shape:
            unchecked.append(tensor.name)
            continue
        compared += 1
        wanted = original.astype(np.float64)
        gap = np.abs(tensor.values - wanted)
        if not (gap <= tensor.step + tensor.rounding * np.abs(wanted) + tensor.floor).all():
            norm = float(np.linalg.norm(wanted))
            share = float(np.linalg.norm(gap)) / norm if norm else np.inf
            changed[tensor.name] = max(share, changed.get(tensor.name, 0.0))
    return Stored(
        changed=tuple(sorted(changed.items(), key=lambda item: -item[1])),
        compared=compared,
        unchecked=tuple(unchecked),
    )


def originals_of(model: ConsistencyModel, exact: ir.Model | None) -> dict[str, np.ndarray]:
    """Return the expected stored tensors; the checkpoint has priority over the fp32 graph.

    The exporter stores the weight of a linear layer transposed, as the second factor of a product.
    """
    from torch import nn

    from scm_sdk.model.networks.magnitude import baked

    stored: Mapping[str, ir.Value] = {} if exact is None else exact.graph.initializers
    constants = {name: value.const_value for name, value in stored.items()}
    found = {name: np.asarray(t.numpy()) for name, t in constants.items() if t is not None}
    network = baked(model.network)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            found[f"{name}/MatMul.in1"] = module.weight.detach().float().numpy().T
    return found | {name: tensor.float().numpy() for name, tensor in network.state_dict().items()}


class _Tensor(NamedTuple):
    """A stored tensor in float64 with the tolerance of each element."""

    name: str
    values: np.ndarray
    step: np.ndarray | float
    rounding: float
    floor: np.ndarray | float


def _tensors(graph: ir.Model) -> Iterator[_Tensor]:
    """Yield every floating-point tensor; 8-bit codes are dequantized with their scale, which is not yielded."""
    initializers = graph.graph.initializers
    done: set[str] = set()
    for node in graph.graph:
        if (node.name or "").endswith(EQUALIZE_NODE):  # checked through the weights that compensate it
            done.update(value.name or "" for value in node.inputs if value is not None)
        if node.op_type not in _ROUNDERS:
            continue
        names = [value.name or "" if value is not None else "" for value in node.inputs]
        if node.op_type == "QuantizeLinear" or names[0] not in initializers:
            done.update(names[2:])  # an activation's zero point; its scale is calibrated, and stays unchecked
        elif names[0] not in done:
            done.update(names)
            yield _dequantized(node, names, initializers)
    for name, value in initializers.items():
        kept = value.const_value
        if name not in done and kept is not None and kept.dtype.is_floating_point():
            kind = kept.dtype.name
            floor = _SUBNORMAL if kind == "FLOAT16" else 0.0
            yield _Tensor(name, np.asarray(kept.numpy(), np.float64), 0.0, _ROUNDING.get(kind, _EXACT), floor)


def _dequantized(node: ir.Node, names: list[str], initializers: Mapping[str, ir.Value]) -> _Tensor:
    tensors = [initializers[name].const_value for name in names if name]
    codes, scale, *rest = (np.asarray(tensor.numpy()) for tensor in tensors if tensor is not None)
    axis = node.attributes.get_int("axis", 1)
    shape = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)] if scale.size > 1 else [1] * codes.ndim
    wide = scale.astype(np.float64).reshape(shape)
    shift = rest[0].astype(np.float64).reshape(shape) if rest else 0.0
    name = names[0]
    for suffix in _CODE_SUFFIXES:
        name = name.removesuffix(suffix)
    # Half a rounding step; the zero point was rounded too, which clips up to another half step at the ends.
    step = wide * (1.0 if np.any(shift) else 0.5) * (1 + 1e-6)
    scale_kind = initializers[names[1]].dtype
    rounding = _ROUNDING.get(scale_kind.name if scale_kind is not None else "", _EXACT)
    tensor = _Tensor(name, (codes.astype(np.float64) - shift) * wide, step, rounding, _SUBNORMAL)
    if not name.endswith(EQUALIZED_SUFFIX):
        return tensor
    name = name.removesuffix(EQUALIZED_SUFFIX)
    factor = _factor(node, codes.ndim)  # multiplied and then rounded again
    return _Tensor(name, tensor.values * factor, step * factor, 2 * rounding, _SUBNORMAL * np.maximum(factor, 1.0))


def _factor(node: ir.Node, rank: int) -> np.ndarray:
    """Return the equalization factors of the input of a layer, shaped to multiply its weight.

    1 if the input is not divided: then the weight differs from the checkpoint and is reported.
    """
    layer = next(iter(node.outputs[0].uses())).node
    before = layer.inputs[0]
    while before is not None and not (getattr(before.producer(), "name", None) or "").endswith(EQUALIZE_NODE):
        producer = before.producer()
        before = producer.inputs[0] if producer is not None and producer.op_type in _ROUNDERS else None
    multiply = before.producer() if before is not None else None
    kept = multiply.inputs[1].const_value if multiply is not None and multiply.inputs[1] is not None else None
    if kept is None:
        return np.ones([1] * rank)
    shape = [1] * rank
    shape[input_axis(layer)] = -1
    return np.asarray(kept.numpy(), np.float64).reshape(shape)
