"""Stable, readable names for nodes and values, from the modules of the network."""

from __future__ import annotations

import ast
import itertools
import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

_SCOPES = "pkg.torch.onnx.name_scopes"
_STACK = "pkg.torch.onnx.stack_trace"
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def name_by_module(model: ir.Model, *, root: str = "") -> ir.Model:
    """Name nodes and values after their module of the network.

    A node is named ``<module path>/<operator>``, with ``_1``, ``_2``, ... if that is not unique,
    its output the same with ``.out`` (``.out0``, ``.out1``, ... if several), a constant after the
    first input it feeds: ``<node>.in1``. Weights keep their name in the state dict. Names depend only
    on the network, not on counters of the exporter, so that precision plans can refer to them.

    Requires: the exporter's node metadata, so ``strip_metadata`` comes later.
    Ensures: unique names; inputs and outputs of the graph keep theirs.
    """
    graph = model.graph
    fixed = {v.name or "" for v in (*graph.inputs, *graph.outputs)}
    taken = set(fixed)

    def unique(name: str) -> str:
        candidates = (f"{name}_{i}" if i else name for i in itertools.count())
        found = next(c for c in candidates if c not in taken)
        taken.add(found)
        return found

    weights = [v for v in graph.initializers.values() if _is_weight(v)]
    names: dict[ir.Value, str] = {v: unique((v.name or "").removeprefix(f"{root}.")) for v in weights}
    node_names: dict[ir.Node, str] = {}
    for node in graph:
        scope = _scope(node).removeprefix(root).removeprefix(".")
        name = node_names[node] = unique(f"{scope}/{node.op_type}" if scope else node.op_type)
        for i, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value not in names:
                names[value] = unique(f"{name}.in{i}")
        for i, value in enumerate(node.outputs):
            names[value] = unique(f"{name}.out{i}" if len(node.outputs) > 1 else f"{name}.out")
    for node, name in node_names.items():
        node.name = name
    renamed = {v: n for v, n in names.items() if v.name not in fixed}
    for i, value in enumerate(
        renamed
    ):  # temporary names first, because an old name may be the new name of another value
        value.name = f"\0{i}"
    for value, name in renamed.items():
        value.name = name
    logger.debug("name_by_module: named %d nodes and %d values", len(node_names), len(renamed))
    return model


def _is_weight(value: ir.Value) -> bool:
    return value.metadata_props.get(_KIND) in ("PARAMETER", "BUFFER")


def _scope(node: ir.Node) -> str:
    """Return the dotted module path of a node; a rewritten node uses that of its producer."""
    if text := node.metadata_props.get(_SCOPES):
        scopes = [s for s in ast.literal_eval(text)[:-1] if not s.startswith("_empty")]
        return str(scopes[-1]) if scopes else ""
    producers = (v.producer() for v in node.inputs if v is not None)
    return next((_scope(p) for p in producers if p is not None), "")


def source_line(node: ir.Node) -> str:
    """Return the source line of a node as the end of a message; empty if unknown.

    Requires: the exporter's node metadata.
    """
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.metadata_props.get(_STACK, ""))
    return " It comes from {}:{}.".format(*lines[-1]) if lines else ""
