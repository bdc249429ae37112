"""Small functions model -> model; together they make the exporter's graph fit to be shipped.

Each works in place, returns its argument so that calls chain, and says what it requires and
ensures. ``clean`` runs them, and those of ``names``, ``shapes`` and ``pixel_norms``, in the one order
that meets every requirement.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Protocol

from scm_sdk.errors import UnsupportedGraphError
from scm_sdk.graph_checks import SIZE_BY_VALUE

from .names import name_by_module, source_line
from .partial import Depends, classify, evaluate, needed
from .pixel_norms import lengths_for_pixel_norms
from .shapes import infer_shapes, name_batch

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

SMALL_CONSTANT = 1 << 20
"""Bytes. A folded constant up to this size may be stored beside the weight that it was made from."""
GUIDANCE_INPUT = "guidance_scale"
_TIME_FUNCTIONS = {"Sin", "Cos"}


class _Documented(Protocol):
    doc_string: str | None

    @property
    def metadata_props(self) -> MutableMapping[str, str]: ...


def clean(model: ir.Model, *, root: str = "") -> ir.Model:
    """Run every pass of this file on a network as torch's exporter wrote it.

    Args:
        model: The network.
        root: Name of the attribute of the traced module that holds the network; it is cut off
            the front of all names, so that weights are called as in the checkpoint.

    Raises:
        UnsupportedGraphError: If the graph holds subgraphs, foreign operators or random numbers.
    """
    for step in (require_plain, name_batch, infer_shapes, fold_constants, static_reshapes, drop_unused):
        step(model)
    return drop_unused(lengths_for_pixel_norms(strip_metadata(name_by_module(model, root=root))))


def require_plain(model: ir.Model) -> ir.Model:
    """Check that the graph is one flat list of standard operators.

    Ensures: no functions, no subgraphs (If, Loop, Scan), only operators of the ONNX domain.

    Raises:
        UnsupportedGraphError: Otherwise; it names the node.
    """
    for node in model.graph:
        if any(attr.type.name in ("GRAPH", "GRAPHS") for attr in node.attributes.values()):
            raise UnsupportedGraphError(
                f"node {node.name!r} ({node.op_type}) holds a subgraph. A sampler graph must be free of "
                f"control flow: replace torch.cond and loops over tensors by torch.where.{source_line(node)}"
            )
        if node.op_type in SIZE_BY_VALUE:
            raise UnsupportedGraphError(
                f"node {node.name!r} ({node.op_type}) has an output whose size depends on values, "
                "expected sizes that depend on the batch alone. Use torch.where instead of masks as "
                f"indices.{source_line(node)}"
            )
        if node.domain:
            raise UnsupportedGraphError(
                f"node {node.name!r} is {node.domain}::{node.op_type}, expected standard ONNX operators "
                f"only. Write that part of the network with plain torch operators.{source_line(node)}"
            )
    return model


def fold_constants(model: ir.Model) -> ir.Model:
    """Compute what depends on weights alone, such as normalized weights, and store the result.

    Ensures: no large weight is stored twice: a result above ``SMALL_CONSTANT`` bytes is kept as
    nodes if one of the weights it is made from is needed elsewhere too.
    """
    graph = model.graph
    classes = classify(graph)
    targets = [
        v
        for node in graph
        if classes[node.outputs[0]] == Depends.CONSTANT
        for v in node.outputs
        if v.is_graph_output() or any(classes[n.outputs[0]] != Depends.CONSTANT for n in v.consumers())
    ]
    for value, array in zip(targets, evaluate(graph, targets), strict=True):
        if array.nbytes <= SMALL_CONSTANT or not any(
            classes[n.outputs[0]] != Depends.CONSTANT for weight in _weights_of(value) for n in weight.consumers()
        ):
            _replace_by_constant(graph, value, array)
    return drop_unused(model)


def static_reshapes(model: ir.Model) -> ir.Model:
    """Give every Reshape a constant target shape, -1 standing for the axis that holds the batch.

    The exporter computes targets from the shapes of other tensors; engines and quantizers see
    more with constants.

    Requires: ``infer_shapes``.
    """
    graph = model.graph
    classes = classify(graph)
    reshapes = [
        node
        for node in graph
        if node.op_type == "Reshape" and (target := node.inputs[1]) is not None and classes[target] == Depends.BATCH
    ]
    targets = [node.inputs[1] for node in reshapes if node.inputs[1] is not None]
    constants: dict[bytes, ir.Value] = {}
    few, many = (evaluate(graph, targets, batch=batch) for batch in (3, 5))
    for node, at_3, at_5 in zip(reshapes, few, many, strict=True):
        varying = at_3 != at_5
        if varying.sum() > 1:
            continue
        at_3[varying] = -1
        if (key := at_3.tobytes()) not in constants:
            constants[key] = _add_constant(graph, at_3)
        node.replace_input_with(1, constants[key])
    return model


def drop_unused(model: ir.Model) -> ir.Model:
    """Remove nodes and initializers that no output needs."""
    graph = model.graph
    for node in reversed(list(graph)):
        if not any(v.is_graph_output() or v.uses() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return model


def strip_metadata(model: ir.Model) -> ir.Model:
    """Remove all metadata and doc strings; the exporter's hold source paths of the machine.

    Ensures: empty ``metadata_props`` and no ``doc_string`` on the model, graph, nodes and values.
    """
    import onnx_ir as ir

    parts: list[_Documented] = [model, model.graph, *model.graph, *_values(model.graph)]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and (tensor.doc_string or tensor.metadata_props):
            value.const_value = ir.tensor(tensor.numpy(), name=value.name)
    return model


def check_time_folded(model: ir.Model) -> ir.Model:
    """Check that no trigonometry is left but the guidance scale's: the rest is of the time, and times are constants.

    Raises:
        UnsupportedGraphError: If another Sin or Cos node is left; it names the node.
    """
    foreign = {value for value in model.graph.inputs if value.name != GUIDANCE_INPUT}
    for node in model.graph:
        if foreign.intersection(value for value in node.inputs if value is not None):
            foreign.update(node.outputs)
    for node in model.graph:
        if node.op_type in _TIME_FUNCTIONS and foreign.intersection(node.outputs):
            raise UnsupportedGraphError(
                f"node {node.name!r} ({node.op_type}) is left, expected the time branch to be constant. "
                "It depends on the samples or the labels; embed the time on its own and combine afterwards."
            )
    return model


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _weights_of(value: ir.Value) -> set[ir.Value]:
    return {v for n in needed([value], stop={}) for v in n.inputs if v is not None and v.is_initializer()}


def _add_constant(graph: ir.Graph, array: np.ndarray, name: str | None = None) -> ir.Value:
    import onnx_ir as ir

    name = name or f"constant_{len(graph.initializers)}"
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _replace_by_constant(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    constant = _add_constant(graph, array, f"{value.name}.folded")
    value.replace_all_uses_with(constant)
