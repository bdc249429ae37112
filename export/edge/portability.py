"""What edge runtimes get wrong in a graph: one rule for each fault, and the forms that avoid them.

A rule names the runtime and the version that showed the fault, and ``tests/export/edge/test_portability.py`` builds the
smallest graph that shows it, runs it where the runtime is installed, and checks that the rule finds it. A graph is
written so that a fault cannot occur where that costs nothing; where it costs speed, or bits that depend on the
batch, ``portable_form`` rewrites the graph for the runtime that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scm_sdk.errors import UnsupportedGraphError

from ..graph.cleanup import MOST_PARTS, narrow_splits
from ..graph.ops import put_before

if TYPE_CHECKING:
    import onnx_ir as ir

EdgeRuntime = Literal["onnxruntime-web", "mnn", "openvino"]
_PARTS: dict[str, tuple[str, str]] = {
    "ReduceL1": ("Abs", ""),
    "ReduceL2": ("Mul", "Sqrt"),
    "ReduceSumSquare": ("Mul", ""),
    "ReduceLogSum": ("", "Log"),
}
"""Operators before and after the ReduceSum that a reduction is made of; "Mul" multiplies a value by itself."""
_AXES_AS_INPUT = frozenset({*_PARTS, "ReduceLogSumExp"})
_AXES_AS_ATTRIBUTE = frozenset({"ReduceL1", "ReduceLogSum", "ReduceLogSumExp"})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One fault of one runtime.

    Attributes:
        name: Short name, for tables and tests.
        runtime: Which runtime has the fault.
        version: The version in which it was seen.
        fault: What the runtime does.
        remedy: What avoids it.
        applies: Whether a node of a graph of an opset shows it.
        rewrite: Removes it from a graph, in place; None where only another export does.
    """

    name: str
    runtime: EdgeRuntime
    version: str
    fault: str
    remedy: str
    applies: Callable[[ir.Node, int], bool]
    rewrite: Callable[[ir.Model], object] | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A node that a runtime gets wrong.

    Attributes:
        rule: Which fault.
        node: Name of the node.
        op_type: Its operator.
    """

    rule: Rule
    node: str
    op_type: str


def _is_wide_split(node: ir.Node, opset: int) -> bool:
    return node.op_type == "Split" and len(node.outputs) > MOST_PARTS


def _has_axes_as_input(node: ir.Node, opset: int) -> bool:
    return node.op_type in _AXES_AS_INPUT and len(node.inputs) > 1 and node.inputs[1] is not None


def _has_axes_as_attribute(node: ir.Node, opset: int) -> bool:
    return node.op_type in _AXES_AS_ATTRIBUTE and 13 <= opset < 18 and "axes" in node.attributes


def _sum_instead(model: ir.Model) -> None:
    """Replace reductions whose axes are an input by ReduceSum and the operators around it."""
    for node in [node for node in model.graph if node.op_type in _PARTS and _has_axes_as_input(node, 0)]:
        _replace(model.graph, node)


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, axes, out, (before, after) = node.inputs[0], node.inputs[1], node.outputs[0], _PARTS[node.op_type]
    options = {key: node.attributes.get_int(key) for key in node.attributes}

    def put(op_type: str, inputs: list[ir.Value | None], like: ir.Value | None, **attributes: int) -> ir.Value:
        shape = None if like is None else like.shape
        value = put_before(graph, node, f"{node.name}.{op_type}", op_type, inputs, attributes, shape=shape)
        value.type = out.type
        return value

    terms = put(before, [x, x] if before == "Mul" else [x], x) if before else x
    last = put("ReduceSum", [terms, axes], out, **options)  # pyright: ignore[reportArgumentType]
    last = put(after, [last], out) if after else last
    name = out.name
    out.replace_all_uses_with(last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.name = name


RULES = (
    Rule(
        name="wide-split",
        runtime="onnxruntime-web",
        version="1.30.0 with WebGPU",
        fault="binds each output of a Split to a storage buffer and refuses more than the adapter has, 8 guaranteed",
        remedy=f"Splits of at most {MOST_PARTS} outputs, as scm-export onnx writes them: export the bundle again",
        applies=_is_wide_split,
        rewrite=narrow_splits,
    ),
    Rule(
        name="reduction-axes-input",
        runtime="mnn",
        version="3.6.1",
        fault="reduces over all axes where the axes are an input (opset 18 and later), and reports success",
        remedy="a ReduceSum with other operators around it, as scm-export edge --runtime mnn writes it",
        applies=_has_axes_as_input,
        rewrite=_sum_instead,
    ),
    Rule(
        name="reduction-axes-attribute",
        runtime="openvino",
        version="2026.4.1",
        fault="reduces over all axes where the axes are an attribute (opset 13 to 17)",
        remedy="opset 18 or later, as scm-export onnx writes it: export the bundle again",
        applies=_has_axes_as_attribute,
    ),
)
"""Every fault that was seen, with the version in which it was seen."""


def find_faults(model: ir.Model, *, runtime: str = "") -> list[Finding]:
    """Return the nodes of a graph that a runtime gets wrong, in the graph's order.

    Args:
        model: The graph.
        runtime: Only the faults of this runtime; "" is all.
    """
    opset = model.opset_imports.get("", 0)
    return [
        Finding(rule=rule, node=node.name or "", op_type=node.op_type)
        for node in _nodes(model)
        for rule in RULES
        if runtime in ("", rule.runtime) and node.domain == "" and rule.applies(node, opset)
    ]


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def portable_form(model: ir.Model, runtime: EdgeRuntime) -> ir.Model:
    """Return a graph that a runtime computes right: the model itself where it has no fault, else a rewritten copy.

    The copy computes the same up to rounding. It is not the form of a bundle, because ONNX Runtime adds up
    a ReduceSum over channels of images in an order that depends on the batch, which ReduceL2 does not.

    Args:
        model: A sampler graph, not changed.
        runtime: For which runtime.

    Raises:
        UnsupportedGraphError: If a fault remains; it names the runtime, the rule, the nodes and the remedy.
    """
    found = find_faults(model, runtime=runtime)
    if not found:
        return model
    copy = model.clone()
    for rule in RULES:
        if rule.rewrite is not None and any(finding.rule is rule for finding in found):
            rule.rewrite(copy)
    require_portable(copy, runtime)
    return copy


def require_portable(model: ir.Model, runtime: EdgeRuntime) -> None:
    """Raise unless a runtime computes a graph right, as far as is known.

    Raises:
        UnsupportedGraphError: Names the runtime, the rule, the nodes and the remedy.
    """
    found = find_faults(model, runtime=runtime)
    if found:
        rule = found[0].rule
        nodes = [finding.node for finding in found if finding.rule is rule]
        raise UnsupportedGraphError(
            f"{rule.runtime} ({rule.version}) {rule.fault}: {describe_nodes(nodes)}. Expected {rule.remedy}."
        )


def describe_nodes(nodes: Sequence[str]) -> str:
    """Return the first few names and how many there are."""
    more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
    return f"{', '.join(nodes[:3])}{more}"
