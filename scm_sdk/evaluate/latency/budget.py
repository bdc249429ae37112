"""Latency budgets in the command-line format ``p95=25ms@b1``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError

P99_ROUNDS = 100
"""Minimum number of samples for a 99th percentile; with fewer it would be their maximum."""
_FORM = re.compile(r"(?:(?P<name>.+):)?(?P<stat>\w+)=(?P<number>[0-9]*\.?[0-9]+)(?P<unit>us|ms|s)@b(?P<batch>[0-9]+)")
_STATISTICS: dict[str, Literal["median", "p90", "p95", "p99"]] = {
    "median": "median",
    "p50": "median",
    "p90": "p90",
    "p95": "p95",
    "p99": "p99",
}
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One limit.

    Attributes:
        statistic: The limited statistic.
        limit_ms: Maximum of the statistic, ms.
        batch: Batch size of the measurement.
        name: The limited candidate; None for all candidates.
    """

    statistic: Literal["median", "p90", "p95", "p99"]
    limit_ms: float
    batch: int
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse one budget.

        Raises:
            ConfigError: If it does not have the form ``[name:]p95=25ms@b1``.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or match["stat"] not in _STATISTICS:
            raise ConfigError(
                f"budget is {text!r}, expected [NAME:]STATISTIC=TIME@bBATCH such as p95=25ms@b1, with one of "
                f"{', '.join(_STATISTICS)} and us, ms or s."
            )
        limit = float(match["number"]) * _MS[match["unit"]]
        return cls(
            statistic=_STATISTICS[match["stat"]],
            limit_ms=limit,
            batch=int(match["batch"]),
            name=match["name"],
        )


def parse_budgets(text: str | None, *, batch: int, rounds: int, names: tuple[str, ...]) -> tuple[Budget, ...]:
    """Parse comma-separated budgets and check that this measurement can decide them.

    Raises:
        ConfigError: If a budget is malformed, for another batch or an unknown candidate, or needs more rounds.
    """
    budgets = tuple(Budget.parse(part) for part in text.split(",")) if text else ()
    for budget in budgets:
        if budget.batch != batch:
            raise ConfigError(f"budget is for batch {budget.batch}, expected {batch}, the one that is measured.")
        if budget.name is not None and budget.name not in names:
            raise ConfigError(f"budget is for {budget.name!r}, expected one of {', '.join(names)}.")
        if budget.statistic == "p99" and rounds < P99_ROUNDS:
            raise ConfigError(f"budget is for p99, but rounds is {rounds}; expected at least {P99_ROUNDS}.")
    return budgets
