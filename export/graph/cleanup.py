"""Graph passes that simplify the exporter's graph.

Each pass works in place, returns its argument so that calls chain, and documents what it requires and ensures.
``clean`` runs them, and those of ``naming`` and ``pixel_norm``, in an order that meets every requirement.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Protocol

from scm_sdk.bundle.graph_checks import SIZE_BY_VALUE
from scm_sdk.errors import UnsupportedGraphError

from .naming import name_by_module, source_line
from .ops import stored
from .partial_eval import BATCH_DIM, Depends, classify, evaluate, needed
from .pixel_norm import lengths_for_pixel_norms

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

logger = logging.getLogger(__name__)


SMALL_TENSOR = 1024
"""Maximum size of shapes and axes, bytes."""


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
    logger.debug("name_batch: dimension %s of the inputs is the batch", *symbols)
    return model


def infer_shapes(model: ir.Model) -> ir.Model:
    """Find the type and shape of every value, the batch its only symbol.

    ONNX shape inference runs for two batch sizes and the results are compared, because inference with a symbolic batch
    loses the symbol at a Reshape.

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
    logger.debug("infer_shapes: the values of %d nodes have types and shapes", model.graph.num_nodes())
    return model


def _inferred(graph: ir.Graph, batch: int) -> dict[str, tuple[int, list[int | None]]]:
    """Return the inferred types and shapes for one batch size, by name."""
    import onnx
    import onnx_ir as ir

    def declare(value: ir.Value) -> onnx.ValueInfoProto:
        assert value.dtype is not None, "inputs, outputs and weights have a type"
        dims = None if value.shape is None else [batch if d == BATCH_DIM else int(str(d)) for d in value.shape]
        return onnx.helper.make_tensor_value_info(value.name or "", int(value.dtype), dims)

    inputs, initializers = [declare(value) for value in graph.inputs], []
    for value in graph.initializers.values():
        # Inference reads small tensors (shapes, axes); of weights it needs only the shape.
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


SMALL_CONSTANT = 1 << 20
"""Maximum size of a folded constant that is stored in addition to its source weight, bytes."""
GUIDANCE_INPUT = "guidance_scale"
_TIME_FUNCTIONS = {"Sin", "Cos"}


MOST_PARTS = 7
"""Maximum number of outputs of a Split. WebGPU guarantees 8 storage buffers per kernel, one for the input;
onnxruntime-web 1.30 binds each output to a separate buffer and refuses more."""


def narrow_splits(model: ir.Model) -> ir.Model:
    """Replace each Split of many outputs by a tree of Splits of at most ``MOST_PARTS``.

    Requires: ``infer_shapes``.
    Ensures: no Split has more outputs, except along the batch axis; values keep their names.
    """
    for node in [node for node in model.graph if node.op_type == "Split" and len(node.outputs) > MOST_PARTS]:
        value, shapes = node.inputs[0], [output.shape for output in node.outputs]
        if value is None or value.shape is None:
            logger.debug("narrow_splits: kept %s: its input has no shape", node.name)
            continue
        axis = node.attributes.get_int("axis", 0) % len(value.shape)
        sizes = [shape[axis] if shape is not None else None for shape in shapes]
        parts = [(part, size) for part, size in zip(node.outputs, sizes, strict=True) if isinstance(size, int)]
        if len(parts) < len(shapes):
            logger.debug("narrow_splits: kept %s: the sizes of its outputs depend on the batch", node.name)
            continue
        logger.debug("narrow_splits: %s has %d outputs, at most %d are portable", node.name, len(parts), MOST_PARTS)
        lengths = node.inputs[1] if len(node.inputs) > 1 else None
        made = _split(model.graph, node, value, axis, parts, "")
        for part, _ in parts:
            part.replace_all_uses_with(made[part], replace_graph_outputs=True)
        names = [(made[part], part.name) for part, _ in parts]
        model.graph.remove(node, safe=True)
        for new, name in names:
            new.name = name
        if lengths is not None and lengths.name and not lengths.uses():
            model.graph.initializers.pop(lengths.name, None)
    return model


def _split(
    graph: ir.Graph, wide: ir.Node, value: ir.Value, axis: int, parts: list[tuple[ir.Value, int]], place: str
) -> dict[ir.Value, ir.Value]:
    """Insert Splits of ``MOST_PARTS`` before a wide Split; return the replacements of its outputs."""
    import numpy as np
    import onnx_ir as ir

    group = 1  # number of parts in each output of this Split
    while len(parts) > group * MOST_PARTS:
        group *= MOST_PARTS
    groups = [parts[i : i + group] for i in range(0, len(parts), group)]
    widths = [sum(size for _, size in each) for each in groups]
    shapes = [[*(value.shape or ())] for _ in groups]
    for shape, width in zip(shapes, widths, strict=True):
        shape[axis] = width
    outputs = [
        ir.Value(name=f"{wide.name}{place}.{i}.out", shape=ir.Shape(shape), type=value.type)
        for i, shape in enumerate(shapes)
    ]
    sizes = stored(graph, f"split.{'_'.join(map(str, widths))}", np.array(widths, np.int64))
    attributes = [ir.AttrInt64("axis", axis)]
    split = ir.Node("", "Split", [value, sizes], attributes, outputs=outputs, name=f"{wide.name}{place}")
    graph.insert_before(wide, split)
    made: dict[ir.Value, ir.Value] = {}
    for i, (each, output) in enumerate(zip(groups, outputs, strict=True)):
        if len(each) == 1:
            output.shape, output.type = each[0][0].shape, each[0][0].type
            made[each[0][0]] = output
        else:
            made |= _split(graph, wide, output, axis, each, f"{place}.{i}")
    return made


class _Documented(Protocol):
    doc_string: str | None

    @property
    def metadata_props(self) -> MutableMapping[str, str]: ...


def clean(model: ir.Model, *, root: str = "") -> ir.Model:
    """Run every pass of this module on a network from torch's exporter.

    Args:
        model: The network.
        root: Attribute of the traced module that holds the network; it is removed from all names, so that weights
            have their names in the checkpoint.

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
    """Compute values that depend only on weights, such as normalized weights, and store the result.

    Ensures: no large weight is stored twice: a result above ``SMALL_CONSTANT`` bytes stays as nodes if one of its
    source weights is also used elsewhere.
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
    folded = 0
    for value, array in zip(targets, evaluate(graph, targets), strict=True):
        if array.nbytes <= SMALL_CONSTANT or not any(
            classes[n.outputs[0]] != Depends.CONSTANT for weight in _weights_of(value) for n in weight.consumers()
        ):
            _replace_by_constant(graph, value, array)
            folded += 1
        else:
            logger.debug(
                "fold_constants: kept %s as nodes: others read its weights, %d bytes", value.name, array.nbytes
            )
    logger.debug("fold_constants: stored %d values that depend on weights alone", folded)
    return drop_unused(model)


def static_reshapes(model: ir.Model) -> ir.Model:
    """Give every Reshape a constant target shape, with -1 for the axis of the batch.

    The exporter computes targets from shapes of other tensors; engines and quantizers optimize constants better.

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
            logger.debug("static_reshapes: kept the target of %s: %d of its axes vary", node.name, varying.sum())
            continue
        at_3[varying] = -1
        if (key := at_3.tobytes()) not in constants:
            constants[key] = _add_constant(graph, at_3)
        node.replace_input_with(1, constants[key])
    logger.debug("static_reshapes: %d Reshapes were computed from the batch", len(reshapes))
    return model


def drop_unused(model: ir.Model) -> ir.Model:
    """Remove nodes and initializers that no output needs."""
    graph = model.graph
    before = graph.num_nodes(), len(graph.initializers)
    for node in reversed(list(graph)):
        if not any(v.is_graph_output() or v.uses() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    dropped = before[0] - graph.num_nodes(), before[1] - len(graph.initializers)
    logger.debug("drop_unused: removed %d nodes and %d stored tensors", *dropped)
    return model


def strip_metadata(model: ir.Model) -> ir.Model:
    """Remove all metadata and doc strings, which hold source paths of the exporting machine.

    Ensures: empty ``metadata_props`` and no ``doc_string`` on the model, graph, nodes and values.
    """
    import onnx_ir as ir

    parts: list[_Documented] = [model, model.graph, *model.graph, *_values(model.graph)]  # pyright: ignore[reportAssignmentType]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and (tensor.doc_string or tensor.metadata_props):
            value.const_value = ir.tensor(tensor.numpy(), name=value.name)
    return model


def check_time_folded(model: ir.Model) -> ir.Model:
    """Check that the only remaining trigonometry is that of the guidance scale, because times are constants.

    Raises:
        UnsupportedGraphError: If another Sin or Cos node remains; it names the node.
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
