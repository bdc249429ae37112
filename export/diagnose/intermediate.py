"""Read intermediate outputs of a graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from scm_sdk._util.files import scratch_folder
from scm_sdk.errors import ExportError

from ..precision.session import open_session

if TYPE_CHECKING:
    import onnx_ir as ir

_AT_ONCE = 1 << 29
"""Maximum size of the values read in one run, bytes."""


def inner_values(model: ir.Model) -> list[str]:
    """Return the names of the floating-point values of nodes in the order of computation."""
    return [
        value.name
        for node in model.graph
        for value in node.outputs
        if value.name and value.dtype is not None and value.dtype.is_floating_point()
    ]


def read_values(model: ir.Model, names: Iterable[str], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph node by node and return some of its values as float32.

    Args:
        model: The graph; it is not changed.
        names: Names of the values; inputs are allowed.
        feeds: Inputs of the graph.

    Raises:
        ExportError: If a name is unknown.
        UnsupportedGraphError: If ONNX Runtime cannot run it on a CPU.
    """
    wanted = list(dict.fromkeys(names))
    found = {name: np.asarray(feeds[name], np.float32) for name in wanted if name in feeds}
    inner = [name for name in wanted if name not in found]
    for part in _parts(model, inner, batch=max((len(array) for array in feeds.values()), default=1)):
        tapped = _with_outputs(model, part)
        with scratch_folder() as folder:
            session = open_session(tapped, folder, node_by_node=True)
            arrays = session.run(part, dict(feeds))
        found |= {name: np.asarray(array, np.float32) for name, array in zip(part, arrays, strict=True)}
    return found


def _parts(model: ir.Model, names: list[str], *, batch: int) -> Iterator[list[str]]:
    """Split values into runs of bounded memory."""
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    part: list[str] = []
    size = 0
    for name in names:
        shape = shapes.get(name)
        part.append(name)
        size += 4 * batch * math.prod(d for d in shape or () if isinstance(d, int))
        if size >= _AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _with_outputs(model: ir.Model, names: list[str]) -> ir.Model:
    tapped = model.clone()
    made = {value.name: value for node in tapped.graph for value in node.outputs}
    missing = [name for name in names if name not in made]
    if missing:
        raise ExportError(
            f"the graph has no value {missing[0]!r}, expected a sampler graph that scm-export wrote, with its names."
        )
    outputs = [made[name] for name in names]
    tapped.graph.outputs.clear()
    tapped.graph.outputs.extend(outputs)
    return tapped
