"""Latency budgets stored in a bundle's manifest, measured and enforced by ``validate``."""

from __future__ import annotations

import os
from contextlib import ExitStack

from .._util.events import SILENT, Events
from ..bundle.bundle import Bundle
from ..errors import BackendUnavailable, ConfigError, IncompatibleEngineError
from ..inference.backends import BACKENDS
from ..inference.generator import Generator
from ..inference.latency import P99_ROUNDS, Budget, Latency, measure

ROUNDS = 50


def keep_budgets(path: str | os.PathLike[str], text: str) -> Bundle:
    """Store budgets in a bundle; existing ones are replaced.

    Args:
        path: The bundle.
        text: Comma-separated budgets, ``[BACKEND[:PRECISION]:]p95=25ms@b1``; "" removes all. Without a backend it
            limits the choice of ``backend="auto"``.

    Raises:
        ConfigError: If a budget cannot be parsed, or names an unknown backend.
        BundleError: If the bundle is damaged or cannot be written.
    """
    bundle = Bundle.open(path)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        backend = (Budget.parse(part).name or "auto").partition(":")[0]
        if backend not in ("auto", *BACKENDS):
            raise ConfigError(
                f"budget is for {backend!r}, expected one of auto, {', '.join(BACKENDS)}: a bundle keeps budgets of "
                "itself alone."
            )
    return bundle.with_budgets(*parts)


def check_budgets(path: str | os.PathLike[str], *, events: Events = SILENT) -> list[Latency]:
    """Measure the candidates of a bundle's budgets, one run per batch size.

    Args:
        path: The bundle.
        events: Receives which budgets are skipped since their backend cannot run here.

    Returns:
        One measurement for each batch; ``raise_if_over`` makes it a gate.

    Raises:
        ConfigError: If a budget is for a batch that the samplers do not allow.
        BackendError: If a backend fails.
    """
    budgets = [(text, Budget.parse(text)) for text in Bundle.open(path, verify="none").manifest.budgets]
    results = []
    with ExitStack() as stack:
        opened: dict[str, Generator] = {}
        for name in dict.fromkeys(budget.name or "auto" for _, budget in budgets):
            backend, _, precision = name.partition(":")
            try:
                opened[name] = stack.enter_context(
                    Generator.from_pretrained(path, backend=backend, precision=precision or "auto", verify="none")
                )
            except (BackendUnavailable, IncompatibleEngineError) as exc:
                events.skip(f"the budget of {name} is not measured here: {exc}")
        for batch in sorted({budget.batch for _, budget in budgets}):
            mine = [(text, b) for text, b in budgets if b.batch == batch and (b.name or "auto") in opened]
            if not mine:
                continue
            names = dict.fromkeys(budget.name or "auto" for _, budget in mine)
            texts = [text if budget.name else f"auto:{text}" for text, budget in mine]
            rounds = max([ROUNDS, *(P99_ROUNDS for _, b in mine if b.statistic == "p99")])
            results.append(
                measure({name: opened[name] for name in names}, batch=batch, rounds=rounds, budget=",".join(texts))
            )
    return results
