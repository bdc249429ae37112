"""Measure the latency of one batch, interleaved between candidates.

Candidates run interleaved, one measured call each per round in random order, so that disturbances of the machine affect
all of them equally; ratios are computed within rounds. First calls are reported separately, warm-up lasts until the
times are stable, and every raw sample is kept.

Short calls are measured as an application makes them, one after another: a call that follows another candidate finds
weights and code of that one in the processor's caches, so that a call of 0.5 ms takes 1 ms, the next one 0.65, and the
fourth what all later ones take. So a turn begins with unmeasured calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from random import Random
from statistics import median
from time import perf_counter_ns
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .._util.arguments import checked_names
from .._util.events import SILENT, Events
from .._util.machine import describe_machine, peak_rss_mib
from ..errors import ConfigError, LatencyError
from .backends import Backend
from .request import check_count, make_example
from .session import OpensBackends

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


_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 200


def bootstrap_median(samples: NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of the median, from 2,000 resamples.

    It assumes independent samples; on a machine with drifting load the interval is too narrow. The interleaved ratios
    are less affected than the medians.
    """
    draw = np.random.default_rng(seed)
    parts = [
        np.median(draw.choice(samples, (_RESAMPLES_AT_ONCE, len(samples))), axis=1)
        for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE)
    ]
    low, high = np.percentile(np.concatenate(parts), (2.5, 97.5))
    return float(low), float(high)


WARMUP_WINDOW = 5
WARMUP_LIMIT = 50
STABLE_WITHIN = 0.05
"""Warm-up ends when the medians of two successive windows of every candidate differ by less than this."""
SHORT_MS = 20.0
"""Shorter calls follow ``UNMEASURED`` others; longer ones refill the caches in a few percent of their time."""
UNMEASURED = 3
LEAST_ROUNDS = 5
"""Minimum number of rounds, also for slow candidates."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The latency of one candidate. Intervals are 95 % bootstrap intervals.

    Attributes:
        name: Name of the candidate.
        batch: Images in a call.
        load_ms: Time to open the candidate, ms; None if unknown.
        first_call_ms: The first call, which allocates and tunes.
        samples_ms: Every measured call in order.
        median_ms: Median of ``samples_ms``.
        median_interval_ms: Interval of the median.
        p90_ms: 90th percentile.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile; None with fewer than 100 samples.
        images_per_s: ``batch`` over the median.
        speedup: Median over rounds of (time of the first candidate / time of this one).
        speedup_interval: Interval of ``speedup``.
    """

    name: str
    batch: int
    load_ms: float | None
    first_call_ms: float
    samples_ms: tuple[float, ...]
    median_ms: float
    median_interval_ms: tuple[float, float]
    p90_ms: float
    p95_ms: float
    p99_ms: float | None
    images_per_s: float
    speedup: float
    speedup_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Measured latencies. True if every budget was met; iterates over its timings.

    Attributes:
        timings: One per candidate, in the given order.
        batch: Images in a call.
        rounds: Measured calls of each candidate.
        warmup_rounds: Discarded rounds after the first call.
        stable: Whether the times were stable at the start of the measurement.
        peak_rss_mib: Peak resident memory of the process so far, MiB; None if the system does not report it.
        over_budget: One line for each budget that was exceeded.
        exceeded: Names of the candidates in these lines.
        machine: Description of the machine.
    """

    timings: tuple[Timing, ...]
    batch: int
    rounds: int
    warmup_rounds: int
    stable: bool
    peak_rss_mib: float | None
    over_budget: tuple[str, ...]
    exceeded: tuple[str, ...]
    machine: dict[str, str]

    def __bool__(self) -> bool:
        return not self.over_budget

    def __iter__(self) -> Iterator[Timing]:
        return iter(self.timings)

    def __len__(self) -> int:
        return len(self.timings)

    def __getitem__(self, name: str) -> Timing:
        return next(timing for timing in self.timings if timing.name == name)

    def __str__(self) -> str:
        table = [("candidate", "median ms", "95 % interval", "p95 ms", "images/s", "speedup")]
        for t in self.timings:
            low, high = t.median_interval_ms
            numbers = f"{t.median_ms:.2f}", f"{low:.2f}..{high:.2f}", f"{t.p95_ms:.2f}", f"{t.images_per_s:.1f}"
            table.append((t.name, *numbers, f"{t.speedup:.2f}x"))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        steady = "" if self.stable else "; the times had not become stable"
        return "\n".join([*lines, f"batch {self.batch}, {self.rounds} rounds{steady}", *self.over_budget])

    def raise_if_over(self) -> None:
        """Raise ``LatencyError`` unless every budget was met."""
        if self.over_budget:
            raise LatencyError(
                f"{'; '.join(self.over_budget)}. Measure again on an idle machine, take fewer steps "
                "or a faster backend, or widen the budget."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, raw samples included."""
        return {**asdict(self), "passed": bool(self)}


@checked_names("measure")
def measure(
    candidates: Mapping[str, OpensBackends | Backend | Callable[[], object]],
    *,
    batch: int = 1,
    rounds: int = 100,
    warmup: int | None = None,
    max_seconds: float | None = None,
    budget: str | None = None,
    num_inference_steps: int | None = None,
    end_to_end: bool = False,
    events: Events = SILENT,
) -> Latency:
    """Measure candidates against each other, interleaved in this process.

    With several candidates, three unmeasured calls precede each measured one that takes less than 20 ms.

    Args:
        candidates: By name. Backends and generators are timed from noise arrays to image arrays; a function is called
            without arguments and counts as ``batch`` images. ``speedup`` is relative to the first candidate.
        batch: Images in a call.
        rounds: Measured calls of each, 2 or more; p99 needs 100.
        warmup: Discarded rounds after the first call; None continues until stable, at most 50.
        max_seconds: Time limit of the measurement and of the warm-up: only rounds that start within it, at least 5.
            None for no limit. Not allowed with a budget, which needs all rounds.
        budget: For example ``"p95=25ms@b1"``, or ``"onnxruntime:p95=25ms@b1"`` for one candidate; several separated by
            commas. Without a name it applies to every candidate.
        num_inference_steps: Number of steps of generators; None is the default of each.
        end_to_end: Time generators from a seed to 8-bit images.
        events: Receives a step after each round.

    Raises:
        ConfigError: If there is no candidate, a number is out of range, or the budget cannot be parsed or is for
            another batch or candidate.
        BackendError: If a candidate cannot run.
    """
    if not candidates:
        raise ConfigError("candidates is empty, expected at least one generator, backend or function.")
    check_count("batch", batch)
    if check_count("rounds", rounds) < 2:
        raise ConfigError("rounds is 1, expected 2 or more: one sample has no spread.")
    if max_seconds is not None and budget is not None:
        raise ConfigError("max_seconds is given with a budget, expected one of them: all rounds decide a budget.")
    budgets = parse_budgets(budget, batch=batch, rounds=rounds, names=tuple(candidates))
    calls = {name: _call(each, batch, num_inference_steps, end_to_end) for name, each in candidates.items()}
    first = {name: _time_ms(call) for name, call in calls.items()}
    turns = _Turns(calls, first)
    warmup_rounds, stable = _warm_up(turns, warmup, _timer(max_seconds))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    is_over = _timer(max_seconds)
    for number in range(rounds):
        if number >= LEAST_ROUNDS and is_over():
            rounds = number
            break
        turns.run(samples)
        events.step("rounds", number + 1, rounds)
    base = np.array(next(iter(samples.values())))
    timings = tuple(
        _timing(name, batch, _load_ms(candidates[name], num_inference_steps), first[name], np.array(times), base)
        for name, times in samples.items()
    )
    over = list(_over(budgets, timings))
    return Latency(
        timings=timings,
        batch=batch,
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        stable=stable,
        peak_rss_mib=peak_rss_mib(),
        over_budget=tuple(line for _, line in over),
        exceeded=tuple(dict.fromkeys(name for name, _ in over)),
        machine=describe_machine(),
    )


def _call(
    candidate: OpensBackends | Backend | Callable[[], object], batch: int, steps: int | None, end_to_end: bool
) -> Callable[[], object]:
    """Return the function to time, after the untimed preparation."""
    if isinstance(candidate, OpensBackends) and end_to_end:
        return lambda: candidate(batch, num_inference_steps=steps, seed=0, output_type="uint8", batch_size=batch)
    backend = candidate.opened(steps).backend if isinstance(candidate, OpensBackends) else candidate
    if isinstance(backend, Backend):
        if batch > backend.spec.max_batch:
            raise ConfigError(f"batch is {batch}, expected 1..{backend.spec.max_batch}, the sampler's largest.")
        request = make_example(backend.spec, range(batch))
        noise, conditioning = request.inputs(0, batch)
        return lambda: backend.sample(noise, conditioning)
    if not callable(backend):
        raise ConfigError(f"a candidate is {type(backend).__name__}, expected a Generator, a backend or a function.")
    return backend


def _load_ms(candidate: object, steps: int | None) -> float | None:
    return candidate.opened(steps).load_ms if isinstance(candidate, OpensBackends) else None


def _time_ms(call: Callable[[], object]) -> float:
    start = perf_counter_ns()
    call()
    return (perf_counter_ns() - start) / 1e6


class _Turns:
    """Runs rounds: one turn of each candidate, in a random order, the same orders each time.

    So no candidate always follows the same other one.
    """

    def __init__(self, calls: Mapping[str, Callable[[], object]], first_ms: Mapping[str, float]) -> None:
        self.calls, self._latest_ms, self._random = calls, dict(first_ms), Random(0)

    def run(self, samples: Mapping[str, list[float]]) -> None:
        """Run one round and append the time of each candidate, ms."""
        for name in self._random.sample(list(self.calls), len(self.calls)):
            call = self.calls[name]
            if len(self.calls) > 1 and self._latest_ms[name] < SHORT_MS:
                for _ in range(UNMEASURED):
                    call()
            self._latest_ms[name] = _time_ms(call)
            samples[name].append(self._latest_ms[name])


def _timer(seconds: float | None) -> Callable[[], bool]:
    """Return a function that returns whether a time limit is over; with None it never is."""
    began = perf_counter_ns()
    return lambda: seconds is not None and perf_counter_ns() - began >= seconds * 1e9


def _warm_up(turns: _Turns, rounds: int | None, is_over: Callable[[], bool]) -> tuple[int, bool]:
    """Run until stable or out of time, or exactly ``rounds``; return the rounds and whether the times were stable."""
    samples: dict[str, list[float]] = {name: [] for name in turns.calls}
    number = stable = 0
    while number < (WARMUP_LIMIT if rounds is None else rounds) and not (rounds is None and (stable or is_over())):
        turns.run(samples)
        number += 1
        stable = all(_is_stable(times) for times in samples.values())
    return number, bool(stable)


def _is_stable(times: list[float]) -> bool:
    if len(times) < 2 * WARMUP_WINDOW:
        return False
    before, now = median(times[-2 * WARMUP_WINDOW : -WARMUP_WINDOW]), median(times[-WARMUP_WINDOW:])
    return abs(now - before) <= STABLE_WITHIN * before


def _timing(
    name: str,
    batch: int,
    load_ms: float | None,
    first_call_ms: float,
    samples: NDArray[np.float64],
    base: NDArray[np.float64],
) -> Timing:
    middle = float(np.median(samples))
    ratios = base / samples
    p90, p95, p99 = (float(p) for p in np.percentile(samples, (90, 95, 99)))
    return Timing(
        name=name,
        batch=batch,
        load_ms=load_ms,
        first_call_ms=first_call_ms,
        samples_ms=tuple(samples.tolist()),
        median_ms=middle,
        median_interval_ms=bootstrap_median(samples),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99 if len(samples) >= P99_ROUNDS else None,
        images_per_s=1e3 * batch / middle,
        speedup=float(np.median(ratios)),
        speedup_interval=bootstrap_median(ratios),
    )


def _over(budgets: tuple[Budget, ...], timings: tuple[Timing, ...]) -> Iterator[tuple[str, str]]:
    for budget in budgets:
        for timing in timings:
            found = getattr(timing, f"{budget.statistic}_ms")
            if budget.name in (None, timing.name) and not found <= budget.limit_ms:
                yield (
                    timing.name,
                    f"{timing.name} has {budget.statistic} {found:.3g} ms at batch {timing.batch}, "
                    f"expected at most {budget.limit_ms:.3g} ms",
                )
