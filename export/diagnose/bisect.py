"""Find the first value in which two graphs differ.

Graphs of reduced precision keep the value names of the float32 graph, so that each value can be compared on the same
noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scm_sdk.errors import ExportError
from scm_sdk.spec import SamplerSpec

from ..precision.half import PRECISION_KEY
from ..precision.probe import feeds_of
from .intermediate import inner_values, read_values

if TYPE_CHECKING:
    import onnx_ir as ir

TOLERANCE = {
    "fp32": 1e-4, "fp32-cpu": 1e-3, "fp16": 1e-2, "bf16": 8e-2, "int8": 2.5e-1, "int8-cpu": 2.5e-1,
    "int8-weights": 8e-2, "int4": 5e-1,
}  # fmt: skip
"""Largest relative L2 difference that rounding explains, by precision. Measured on the shipped model, every value of
both steps: fp16 at most 1.6e-3, int8 at most 7.2e-2."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One value of both graphs.

    Attributes:
        value: Name of the value.
        node: The node that computes it.
        op: Operator of the node.
        shape: Shape of the value.
        error: Norm of the difference over the norm of the reference's value; infinite if not finite.
        before: The largest error among the inputs of the node.
    """

    value: str
    node: str
    op: str
    shape: tuple[int, ...]
    error: float
    before: float

    @property
    def growth(self) -> float:
        """Ratio of the error to the error of the inputs."""
        return self.error / max(self.before, 1e-7)


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """The first difference of two graphs.

    Attributes:
        first: The first value that differs by more than the tolerance, or None.
        tolerance: The tolerance.
        steps: Every shared value, in order.
    """

    first: Step | None
    tolerance: float
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        if self.first is None:
            worst = max((s.error for s in self.steps), default=0.0)
            return f"no value differs by more than {self.tolerance:.0e} (largest {worst:.1e} of {len(self.steps)})"
        s = self.first
        return (
            f"first differs at node {s.node} ({s.op}), value {s.value} {list(s.shape)}: relative error {s.error:.1e}, "
            f"{s.before:.1e} in what it reads, {self.tolerance:.0e} allowed"
        )

    def around(self, count: int = 3) -> Sequence[Step]:
        """Return some values before and after the first difference."""
        at = self.steps.index(self.first) if self.first is not None else len(self.steps) - 1
        return self.steps[max(0, at - count) : at + count + 1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def bisect(
    candidate: ir.Model, reference: ir.Model, spec: SamplerSpec, *, seed: int = 0, tolerance: float | None = None
) -> Bisection:
    """Compare every value that two graphs of one sampler share.

    Args:
        candidate: The candidate graph.
        reference: The float32 reference graph.
        spec: The sampler.
        seed: Seed of the sample and its label.
        tolerance: Largest relative error; None is that of the candidate's precision.

    Raises:
        ExportError: If they share no value.
        UnsupportedGraphError: If ONNX Runtime cannot run one of them on a CPU.
    """
    if tolerance is None:
        tolerance = TOLERANCE[candidate.metadata_props.get(PRECISION_KEY, "fp32")]
    shared = set(inner_values(reference))
    names = [name for name in inner_values(candidate) if name in shared]
    if not names:
        raise ExportError("the two graphs share no value's name, expected two graphs of one sampler by scm-export.")
    feeds = feeds_of(spec, [seed])
    a, b = (read_values(model, names, feeds) for model in (candidate, reference))
    errors: dict[str, float] = {}
    steps = []
    makers = {value.name: node for node in candidate.graph for value in node.outputs}
    for name in names:
        node = makers[name]
        errors[name] = relative_difference(a[name], b[name])
        before = max((errors.get(read, 0.0) for read in _sources(node, shared)), default=0.0)
        steps.append(
            Step(
                value=name,
                node=node.name or "",
                op=node.op_type,
                shape=b[name].shape,
                error=errors[name],
                before=before,
            )
        )
    return Bisection(
        first=next((s for s in steps if s.error > tolerance), None), tolerance=tolerance, steps=tuple(steps)
    )


def _sources(node: ir.Node, shared: set[str]) -> list[str]:
    """Return the nearest shared values upstream, skipping casts and quantizers."""
    found, open_, seen = [], [value for value in node.inputs if value is not None], set()
    while open_:
        value = open_.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if value.name in shared:
            found.append(value.name)
        elif producer is not None:
            open_ += [read for read in producer.inputs if read is not None]
    return found


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return |a - b| / |b|; infinite if the shapes differ or a value is not finite."""
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    norm = float(np.linalg.norm(b.astype(np.float64)))
    gap = float(np.linalg.norm(a.astype(np.float64) - b))
    return gap / norm if norm else (float("inf") if gap else 0.0)
