"""Partial evaluation of a network's graph: constants, batch size, time.

Every value of a graph is in one of four classes, by the inputs it depends on:

* ``CONSTANT``  weights and literals,
* ``BATCH``     also the batch size, read from the shape of a tensor,
* ``TIME``      also the time ``t``, and ``r`` of a flow map, one number each for the whole batch,
* ``DATA``      anything else: the samples, the labels.

Only ``DATA`` must be computed when the graph runs. ``graph.cleanup`` and ``graph.compose`` use this module to classify
and evaluate values.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from scm_sdk.errors import UnsupportedGraphError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

BATCH_DIM = "batch"
"""Name of the only symbolic dimension, axis 0 of every input."""
TIME_INPUT = "t"
"""Name of the network's time input, (1,)."""
TARGET_INPUT = "r"
"""Name of the second time input of a flow map, (1,): the time that a step leads to."""
TIME_INPUTS = (TIME_INPUT, TARGET_INPUT)


ROUNDING = 1e-5
"""Tolerance of a matrix product between two batch sizes, relative to the largest element."""


class Depends(IntEnum):
    """Dependencies of a value; a larger member includes the smaller ones."""

    CONSTANT = 0
    BATCH = 1
    TIME = 2
    DATA = 3


def classify(graph: ir.Graph) -> dict[ir.Value, Depends]:
    """Return the class of every value of ``graph``.

    Requires: nodes in topological order, no subgraphs, the batch dimension called ``"batch"``.

    Raises:
        UnsupportedGraphError: If a node draws random numbers, because its output is not constant.
    """
    classes: dict[ir.Value, Depends] = dict.fromkeys(graph.initializers.values(), Depends.CONSTANT)
    for value in graph.inputs:
        classes[value] = Depends.TIME if value.name in TIME_INPUTS else Depends.DATA
    for node in graph:
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
            raise UnsupportedGraphError(
                f"node {node.name!r} ({node.op_type}) draws random numbers inside the network. All noise "
                "must enter as graph inputs, so that backends can be compared; draw it outside."
            )
        if _known_shape(node) is not None:
            found = Depends.BATCH
        else:
            found = max((classes[v] for v in node.inputs if v is not None), default=Depends.CONSTANT)
        classes.update(dict.fromkeys(node.outputs, found))
    return classes


def needed(values: Iterable[ir.Value], *, stop: Mapping[ir.Value, Any]) -> list[ir.Node]:
    """Return the nodes that compute ``values``, in graph order, without those before ``stop``."""
    wanted: set[ir.Node] = set()
    todo = [v for v in values if v not in stop]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in wanted:
            wanted.add(node)
            todo.extend(v for v in node.inputs if v is not None and v not in stop)
    if not wanted:
        return []
    graph = next(iter(wanted)).graph
    assert graph is not None, "a network's nodes belong to its graph"
    return [node for node in graph if node in wanted]


def evaluate(
    graph: ir.Graph,
    values: list[ir.Value],
    *,
    batch: int = 1,
    times: Mapping[str, float] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Compute ``values`` with numpy; they must not depend on ``DATA`` other than ``given``.

    Args:
        graph: The graph.
        values: Values to compute.
        batch: The batch size that shapes report.
        times: Values of the ``TIME_INPUTS``, radians; None if no value is ``TIME``.
        given: Inputs of the graph by name; axis 0 has length ``batch``.

    Returns:
        One array per value.

    Raises:
        UnsupportedGraphError: If onnx.reference does not support an operator.
    """
    import numpy as np
    import onnx
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    shapes = {node.outputs[0]: shape for node in graph if (shape := _known_shape(node)) is not None}
    nodes = needed(values, stop=shapes)
    feeds: dict[ir.Value, np.ndarray] = {}
    for value in (*values, *_inputs_of(nodes)):
        if value.is_initializer() and value.const_value is not None:
            feeds[value] = value.const_value.numpy()
        elif value.name in TIME_INPUTS:
            feeds[value] = np.array([(times or {})[value.name]], dtype=np.float32)
        elif (array := (given or {}).get(value.name or "")) is not None:
            feeds[value] = array
        elif value in shapes:
            dims = [batch if d == BATCH_DIM else d for d in shapes[value]]
            feeds[value] = np.array(dims, dtype=np.int64)
    proto = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "partial",
        [onnx.helper.make_empty_tensor_value_info(v.name or "") for v in feeds],
        [onnx.helper.make_empty_tensor_value_info(v.name or "") for v in dict.fromkeys(values) if v not in feeds],
    )
    try:
        # Weights are feeds, not initializers, to avoid copies.
        runner = ReferenceEvaluator(proto, opsets=dict(graph.opset_imports))
        arrays = runner.run(None, {v.name or "": array for v, array in feeds.items()})
    except Exception as exc:  # onnx.reference raises many unrelated types
        raise UnsupportedGraphError(
            f"the constant part of the graph could not be computed: {str(exc)[:200]}. Expected operators "
            f"that onnx.reference knows; this part holds {sorted({n.op_type for n in nodes})}."
        ) from exc
    computed = dict(zip(runner.output_names, arrays, strict=True))
    return [np.asarray(feeds[v] if v in feeds else computed[v.name]) for v in values]  # pyright: ignore[reportArgumentType]


def _inputs_of(nodes: list[ir.Node]) -> Iterator[ir.Value]:
    for node in nodes:
        yield from (v for v in node.inputs if v is not None)


def _known_shape(node: ir.Node) -> list[int | str] | None:
    """Return the output of a Shape node, with ``"batch"`` for the batch size; None if it is unknown."""
    if node.op_type != "Shape" or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    start = node.attributes.get("start")
    end = node.attributes.get("end")
    dims: list[int | str] = []
    for dim in node.inputs[0].shape[slice(start and start.as_int(), end and end.as_int())]:
        if isinstance(dim, int):
            dims.append(dim)
        elif dim.value == BATCH_DIM:
            dims.append(BATCH_DIM)
        else:
            return None
    return dims


class TimeConstant(NamedTuple):
    """One value of the time branch at a fixed time.

    Attributes:
        array: The value; with ``per_sample`` that of one sample, with axis 0 of size 1.
        per_sample: Whether the value has one such row per sample.
    """

    array: np.ndarray
    per_sample: bool


def read_outside(values: Iterable[ir.Value], inside: Container[ir.Value]) -> list[ir.Value]:
    """Return the inner ``values`` that a node outside, or the caller of the graph, reads."""
    return [
        value
        for value in values
        if value in inside
        and (value.is_graph_output() or any(node.outputs[0] not in inside for node in value.consumers()))
    ]


def time_border(graph: ir.Graph, classes: Mapping[ir.Value, Depends]) -> list[ir.Value]:
    """Return the values of the time branch that the rest of the graph, or the caller, reads."""
    branch = {value for value, found in classes.items() if found == Depends.TIME}
    return read_outside((*graph.inputs, *(value for node in graph for value in node.outputs)), branch)


def time_constants(graph: ir.Graph, border: list[ir.Value], times: Mapping[str, float]) -> list[TimeConstant]:
    """Compute the border of the time branch at the times of one step.

    It is computed for one sample and for three: the time is the same for all samples, so a value is either independent
    of the batch size or has equal rows.

    Raises:
        UnsupportedGraphError: If one does neither; it names the value.
    """
    import numpy as np

    constants = []
    for value, one, three in zip(
        border,
        evaluate(graph, border, batch=1, times=times),
        evaluate(graph, border, batch=3, times=times),
        strict=True,
    ):
        if three.shape[:1] == (3,) and one.shape == (1, *three.shape[1:]):
            rows = np.broadcast_to(one, three.shape)
        else:
            rows = one
        scale = float(np.abs(one).max(initial=0.0)) or 1.0
        if rows.shape != three.shape or not np.allclose(rows, three, rtol=0, atol=ROUNDING * scale):
            raise UnsupportedGraphError(
                f"{value.name!r} depends on the time and the batch size alone, but is {one.shape} for "
                f"one sample and {three.shape} for three, with other content. Expected the same for every "
                "sample: the network must not mix the times of different samples."
            )
        constants.append(TimeConstant(one, rows is not one))
    return constants
