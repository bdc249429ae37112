"""FP16 and BF16 as a graph transform: a plan states the precision of every node.

A plan names the *islands*: nodes that stay in float32. All other nodes and their weights use the reduced precision.
Casts are only at the borders of islands, one per value; inputs and outputs stay in float32, so all graphs have the same
interface. Strongly typed engines, the only kind of TensorRT 11, take the precision from the graph.

By default the algebra of the sampler and values that do not depend on the noise (label and time branches), except
matrix products, stay in float32: a small part of the work whose rounding would affect every pixel.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Literal

import msgspec

from scm_sdk._util.json_struct import JsonFile
from scm_sdk.errors import ConfigError, ExportError

from .fp16_unsafe import DELICATE, delicate_nodes

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

logger = logging.getLogger(__name__)


@cache
def types_of(
    op_type: str, domain: str, opset: int, num_inputs: int, num_outputs: int
) -> tuple[tuple[bool, ...], tuple[bool, ...], frozenset[str]]:
    """Return which inputs and outputs of an operator may change their float type, and the allowed types.

    Returns:
        For each input and each output whether its type is free, and the reduced types that all free ones allow, out of
        ``FLOAT16`` and ``BFLOAT16``.
    """
    import onnx

    schema = onnx.defs.get_schema(op_type, opset, domain)
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}

    def formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> Iterator[str]:
        for i in range(count):  # the last one may be variadic
            yield parameters[min(i, len(parameters) - 1)].type_str

    inputs, outputs = list(formal(schema.inputs, num_inputs)), list(formal(schema.outputs, num_outputs))
    names = {"FLOAT16": "tensor(float16)", "BFLOAT16": "tensor(bfloat16)"}
    floats = [types for name in {*inputs, *outputs} if "tensor(float)" in (types := allowed.get(name, set()))]
    able = frozenset(name for name, text in names.items() if all(text in types for types in floats))
    free = {name for name, types in allowed.items() if "tensor(float)" in types}
    return tuple(t in free for t in inputs), tuple(t in free for t in outputs), able


LowPrecision = Literal["fp16", "bf16"]
CONDITIONING = "@conditioning"
"""Pattern of the nodes that do not depend on the noise, except matrix products; their names differ between networks.
The products lose no accuracy in reduced precision, and TensorRT-RTX has no float32 product for Turing GPUs."""
NORMS = "@norms"
"""Pattern of the nodes that sum squares over channels, which overflow float16 long before their root."""
SUMS_OF_SQUARES = frozenset({"ReduceL2", "ReduceSumSquare"})
PRODUCTS = frozenset({"Gemm", "MatMul"})
PRECISION_KEY = "scm_precision"
"""Metadata key of the graph for its precision; fp32 graphs have none."""

BF16_OPSET = 22
"""First opset in which convolutions and normalizations support bfloat16."""

MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "DepthToSpace", "SpaceToDepth"})
"""Operators that move data without arithmetic: they take the type of their input, so that an island extends through
them to the next computation."""


class Island(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nodes that stay in float32.

    Attributes:
        pattern: A shell pattern over node names, such as ``step*/up.0.*``, ``@conditioning`` or ``@norms``.
        reason: Reason, for readers of the plan.
    """

    pattern: str
    reason: str


class PrecisionPlan(JsonFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Precision of the nodes of a sampler graph; stored in a bundle as ``precision/<p>.json``.

    Attributes:
        precision: Precision of the nodes outside the islands.
        islands: Nodes that stay in float32.
    """

    TITLE = "precision plan"
    REMEDY = "Expected the JSON that scm-export precision writes."
    ERROR = ConfigError

    precision: LowPrecision
    islands: tuple[Island, ...] = ()

    def with_islands(self, *islands: Island) -> PrecisionPlan:
        """Return this plan with more islands."""
        return msgspec.structs.replace(self, islands=self.islands + islands)


def default_plan(precision: LowPrecision) -> PrecisionPlan:
    """Return the default plan, suitable for every built-in network."""
    return PrecisionPlan(
        precision=precision,
        islands=(
            Island(pattern="step*/sampler/*", reason="time, trigonometry and the final combination stay float32"),
            Island(pattern=CONDITIONING, reason="small, and its rounding would shift every pixel alike"),
            Island(pattern=NORMS, reason="sums of squares over many channels do not fit float16"),
        ),
    )


def apply_precision(model: ir.Model, plan: PrecisionPlan) -> ir.Model:
    """Return a float32 sampler graph in another precision.

    Args:
        model: A float32 graph from ``compose_sampler`` or ``read_model``; it is not changed.
        plan: The plan. Nodes whose operator does not support the type also stay in float32.

    Returns:
        A new graph with the same node names; values in reduced precision keep their names. A weight that only reduced
        nodes read is stored in reduced precision under its name.

    Raises:
        ConfigError: If the graph is not float32, or a pattern of the plan matches no node.
        ExportError: If a weight is not representable in the reduced precision: it would become infinite, or an entire
            tensor zero.
    """
    found = model.metadata_props.get(PRECISION_KEY, "fp32")
    if found != "fp32":
        raise ConfigError(f"the graph is {found} already, expected a float32 graph. Start from onnx/fp32.")
    copy = model.clone()
    if plan.precision == "bf16":
        _raise_opset(copy, BF16_OPSET)
    lowering = _Lowering(copy, plan)
    lowering.run()
    for node, reason in lowering.kept.items():
        logger.debug("%s: kept %s in float32: %s", plan.precision, node.name, reason)
    logger.debug("%s: %d nodes, %d of them islands", plan.precision, copy.graph.num_nodes(), len(lowering.kept))
    copy.metadata_props[PRECISION_KEY] = plan.precision
    return copy


def island_nodes(graph: ir.Graph, plan: PrecisionPlan) -> dict[ir.Node, str]:
    """Return the nodes that a plan keeps in float32, each with the reason.

    Raises:
        ConfigError: If a pattern matches no node, because of a typo or a plan of another network.
    """
    free = conditioning_nodes(graph)
    delicate = delicate_nodes(graph) if any(i.pattern == DELICATE for i in plan.islands) else set()
    kept: dict[ir.Node, str] = {}
    for island in plan.islands:
        if island.pattern == CONDITIONING:
            matched = [node for node in free if node.op_type not in PRODUCTS]
        elif island.pattern == NORMS:
            matched = [node for node in graph if node.op_type in SUMS_OF_SQUARES]
        elif island.pattern == DELICATE:
            matched = [node for node in graph if node in delicate]
        else:
            matched = [node for node in graph if fnmatchcase(node.name or "", island.pattern)]
            if not matched:
                some = ", ".join(sorted({(node.name or "").rpartition("/")[0] for node in graph})[:5])
                raise ConfigError(
                    f"island {island.pattern!r} matches no node, expected a shell pattern over node names "
                    f"such as {some}. Correct the plan, or drop the island."
                )
        for node in matched:
            kept.setdefault(node, island.reason)
    return kept


def conditioning_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that do not depend on the noise, except through the size of the batch."""
    noisy = {value for value in graph.inputs if (value.name or "").startswith("noise_")}
    free: set[ir.Node] = set()
    for node in graph:
        if node.op_type not in ("Shape", "Size") and any(value in noisy for value in node.inputs):
            noisy.update(node.outputs)
        else:
            free.add(node)
    return free


def count_precisions(model: ir.Model) -> Counter[str]:
    """Return the number of nodes by the type of their first output, without casts."""
    return Counter(
        node.outputs[0].dtype.name.lower()
        for node in model.graph
        if node.op_type != "Cast" and node.outputs[0].dtype is not None
    )


def _raise_opset(model: ir.Model, opset: int) -> None:
    from onnxscript import version_converter

    try:
        version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError) as exc:
        raise ExportError(
            f"the graph cannot be raised to opset {opset}, which bf16 needs: {exc}. Use fp16, or report the operator."
        ) from exc
    if model.opset_imports[""] < opset:
        raise ExportError(
            f"the graph stays at opset {model.opset_imports['']}, expected {opset} for bf16: an operator in it has no "
            "such version. Use fp16, or report it."
        )


class _Lowering:
    """Walks a graph once in order and sets the types of each node by the plan."""

    def __init__(self, model: ir.Model, plan: PrecisionPlan) -> None:
        import onnx_ir as ir

        self.graph = model.graph
        self.opset = model.opset_imports[""]
        self.name = plan.precision
        self.full = ir.DataType.FLOAT
        self.low = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[plan.precision]
        self.kept = island_nodes(self.graph, plan)
        self.copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Change the graph."""
        for node in list(self.graph):
            self._retype(node)
        for value in list(self.graph.outputs):
            self._restore_output(value)
        self._name_weights()

    def _retype(self, node: ir.Node) -> None:
        import onnx_ir as ir

        inputs, outputs, able = types_of(node.op_type, node.domain, self.opset, len(node.inputs), len(node.outputs))
        moved = node.op_type in MOVES and node.inputs[0] is not None and node.inputs[0].dtype == self.full
        stays = node in self.kept or moved or self.low.name not in able or self._has_lost_factor(node)
        wanted = self.full if stays else self.low
        for i, value in enumerate(list(node.inputs)):
            if value is None or value.dtype not in (self.full, self.low):
                continue
            node.replace_input_with(i, self._as(value, wanted if inputs[i] else self.full, node))
        for i, value in enumerate(node.outputs):
            if value.dtype == self.full and outputs[i]:
                value.type = ir.TensorType(wanted)
        if node.op_type == "Cast" and node.outputs[0].dtype == self.low:
            node.attributes["to"] = ir.AttrInt64("to", self.low.value)

    def _as(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """Return a value in a type: itself, a converted weight, or a cast shared by all its readers."""
        import onnx_ir as ir

        if value.dtype == dtype:
            return value
        key = (value, dtype)
        if key not in self.copies:
            suffix = "fp32" if dtype == self.full else self.name
            name = f"{value.name}.{suffix}"
            if value.is_initializer() and value.const_value is not None:
                array = self._round(value.const_value.numpy(), value.name or "")
                copy = ir.val(name, const_value=ir.tensor(array, dtype=dtype, name=name))
                self.graph.register_initializer(copy)
            else:
                copy = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
                to = [ir.AttrInt64("to", dtype.value)]
                cast = ir.Node("", "Cast", [value], to, outputs=[copy], name=f"{value.name}/to_{suffix}")
                self.graph.insert_before(reader, cast)
            self.copies[key] = copy
        return self.copies[key]

    def _has_lost_factor(self, node: ir.Node) -> bool:
        """Return whether a product has a scalar factor that overflows or vanishes in the reduced precision.

        The product itself often fits: a coefficient of a step is 2e-8, not 0, where rounded times give no exact zero.
        """
        if node.op_type != "Mul":
            return False
        constants = [value.const_value for value in node.inputs if value is not None and value.is_initializer()]
        return any(c is not None and c.size == 1 and self._rounded(c.numpy())[1] for c in constants)

    def _rounded(self, array: np.ndarray) -> tuple[np.ndarray, str]:
        """Return an array in the reduced precision, and the kind of loss beyond rounding, "" for none."""
        import numpy as np

        with np.errstate(over="ignore"):
            rounded: np.ndarray = array.astype(self.low.numpy())
        if (np.isinf(rounded.astype(np.float32)) & np.isfinite(array)).any():
            return rounded, "infinite"
        return rounded, "0" if array.size == 1 and bool(np.any((array != 0) & (rounded == 0))) else ""

    def _round(self, array: np.ndarray, name: str) -> np.ndarray:
        import numpy as np

        rounded, becomes = self._rounded(array)
        if becomes:
            remedy = ", or use bf16" if self.name == "fp16" else ""
            raise ExportError(
                f"{name!r} holds {float(np.abs(array).max()):.3g}, which {self.name} cannot (it becomes {becomes}). "
                f"Keep its reader in float32 with an island in the plan{remedy}."
            )
        return rounded

    def _restore_output(self, value: ir.Value) -> None:
        """Cast an output in reduced precision back to float32, under its name."""
        import onnx_ir as ir

        if value.dtype != self.low:
            return
        name = value.name or ""
        value.name = f"{name}.{self.name}"
        out = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.full))
        to = [ir.AttrInt64("to", self.full.value)]
        self.graph.append(ir.Node("", "Cast", [value], to, outputs=[out], name=f"{name}/to_fp32"))
        self.graph.outputs[self.graph.outputs.index(value)] = out

    def _name_weights(self) -> None:
        """Drop unused float32 weights; their replacements take their names."""
        for (value, dtype), copy in self.copies.items():
            if value.is_initializer() and dtype == self.low and not value.uses() and not value.is_graph_output():
                name = value.name or ""
                del self.graph.initializers[name]
                copy.name = name
                if copy.const_value is not None:
                    copy.const_value.name = name
