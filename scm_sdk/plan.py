"""Artifacts held against the backends that open their kind, as rows that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, overload

from .errors import printable


class Measured(NamedTuple):
    """A median latency remembered from this machine.

    Attributes:
        ms: Of one call.
        batch: Its images.
    """

    ms: float
    batch: int


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One artifact held against one backend.

    Attributes:
        backend: Name in ``BACKENDS``.
        artifact: Path inside the bundle.
        precision: The precision that lies in the artifact.
        num_inference_steps: Its steps; 0 means any.
        accepted: Whether it may run.
        reason: Why, or why not.
        measured: Median latency remembered from this machine, if there is one.
        chosen: Whether it is the one that runs.
    """

    backend: str
    artifact: str
    precision: str
    num_inference_steps: int
    accepted: bool
    reason: str
    measured: Measured | None = None
    chosen: bool = False


class Plan(Sequence[PlanRow]):
    """Every row, the accepted ones first and best first.

    ``str()`` is a table of the rows with the number of steps that was asked for; the others are counted.

    Args:
        rows: The rows.
        num_inference_steps: The number of steps that was asked for; 0 shows all rows.
    """

    def __init__(self, rows: Sequence[PlanRow], *, num_inference_steps: int = 0) -> None:
        self.rows = tuple(rows)
        self.num_inference_steps = num_inference_steps
        self.accepted = tuple(row for row in self.rows if row.accepted)
        """The rows that may run, best first."""
        self.rejected = tuple(row for row in self.rows if not row.accepted)
        """The rows that may not, with their reasons."""

    @property
    def chosen(self) -> PlanRow | None:
        """The row that runs, or None when nothing can."""
        return next((row for row in self.rows if row.chosen), None)

    def choose(self, chosen: PlanRow) -> Plan:
        """Return this plan with another row as the chosen one."""
        rows = [replace(row, chosen=False) for row in self.rows]
        at = self.rows.index(chosen)
        rows[at] = replace(rows[at], chosen=True)
        return Plan(rows, num_inference_steps=self.num_inference_steps)

    @overload
    def __getitem__(self, index: int) -> PlanRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[PlanRow, ...]: ...
    def __getitem__(self, index: int | slice) -> PlanRow | tuple[PlanRow, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        table = [("", "backend", "artifact", "precision", "steps", "verdict", "reason")]
        asked = self.num_inference_steps
        shown = [row for row in self.rows if not asked or row.num_inference_steps in (0, asked)]
        for row in shown:
            mark, verdict = "*" if row.chosen else "", "accepted" if row.accepted else "rejected"
            steps = str(row.num_inference_steps or "any")
            table.append((mark, row.backend, row.artifact, row.precision, steps, verdict, printable(row.reason)))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        if hidden := len(self.rows) - len(shown):
            lines.append(f"not shown: {hidden} with artifacts of other numbers of steps")
        return "\n".join(lines)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain data for JSON."""
        return [
            asdict(row) | {"measured": None if row.measured is None else row.measured._asdict()} for row in self.rows
        ]
