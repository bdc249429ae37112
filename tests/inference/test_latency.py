"""Latency: the schedule, the statistics and the budget. No test asserts how fast anything is."""

import json
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk import Generator
from scm_sdk._util.events import EventLines
from scm_sdk._util.machine import peak_rss_mib
from scm_sdk.errors import ConfigError, LatencyError
from scm_sdk.inference import latency as module
from scm_sdk.inference.latency import Budget, bootstrap_median, measure


class Clock:
    """A clock that only the candidates move, so that every number is known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        self.order: list[str] = []
        monkeypatch.setattr(module, "perf_counter_ns", lambda: self.now_ns)

    def candidate(self, name: str, *times_ms: float) -> Any:
        """Return a function that takes these times in turn, the last one repeatedly."""
        left = list(times_ms)

        def call() -> None:
            self.order.append(name)
            self.now_ns += int((left.pop(0) if len(left) > 1 else left[0]) * 1e6)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_candidates_are_interleaved_and_follow_one_another_in_every_order(clock: Clock) -> None:
    measure({name: clock.candidate(name, module.SHORT_MS) for name in "abc"}, rounds=60, warmup=2)
    assert clock.order[:3] == list("abc")  # the first calls
    rounds = ["".join(clock.order[i : i + 3]) for i in range(3, len(clock.order), 3)]
    assert len(rounds) == 62 and {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "no candidate always finds the caches of the same other one"
    again = len(clock.order)
    measure({name: clock.candidate(name, module.SHORT_MS) for name in "abc"}, rounds=60, warmup=2)
    assert clock.order[again:] == clock.order[:again], "the same orders each time"


def test_a_short_call_is_measured_after_others_of_its_candidate(clock: Clock) -> None:
    short = [5.0] + [2.0, 1.2, 1.1, 1.0] * 10  # the first call of each turn finds the caches of the other candidate
    both = {"long": clock.candidate("long", 90.0), "short": clock.candidate("short", *short)}
    assert measure(both, rounds=9, warmup=1)["short"].samples_ms == (1.0,) * 9
    assert Counter(clock.order) == {"long": 1 + 1 + 9, "short": 1 + 4 * 10}
    clock.order.clear()
    assert measure({"short": clock.candidate("short", 1.0)}, rounds=9, warmup=1)["short"].samples_ms == (1.0,) * 9
    assert len(clock.order) == 1 + 1 + 9, "nothing else fills the caches"


def test_first_call_warm_up_and_steady_state_are_apart(clock: Clock) -> None:
    times = [500.0] + [50.0, 40.0, 30.0] + [10.0] * 40
    result = measure({"a": clock.candidate("a", *times)}, rounds=10, batch=4)
    timing = result["a"]
    assert timing.first_call_ms == 500
    assert result.stable
    assert result.warmup_rounds == 11  # the windows are then 40 30 10 10 10 and 10 10 10 10 10
    assert timing.samples_ms == (10.0,) * 10
    assert (timing.median_ms, timing.p90_ms, timing.p95_ms) == (10, 10, 10)
    assert timing.median_interval_ms == (10, 10)
    assert timing.images_per_s == 400


def test_warm_up_gives_up_and_says_so(clock: Clock) -> None:
    growing = [1.1**n for n in range(200)]
    result = measure({"a": clock.candidate("a", *growing)}, rounds=2)
    assert (result.warmup_rounds, result.stable) == (module.WARMUP_LIMIT, False)
    assert measure({"a": clock.candidate("a", 1)}, rounds=2, warmup=0).warmup_rounds == 0


def test_slow_candidates_get_fewer_rounds_if_time_is_short(clock: Clock) -> None:
    slow = measure({"a": clock.candidate("a", 2000.0)}, max_seconds=14.0)
    assert (slow.warmup_rounds, slow.stable, slow.rounds) == (7, False, 7)
    very_slow = measure({"a": clock.candidate("a", 60_000.0)}, max_seconds=14.0)
    assert (very_slow.warmup_rounds, very_slow.rounds, len(very_slow["a"].samples_ms)) == (1, module.LEAST_ROUNDS, 5)
    assert measure({"a": clock.candidate("a", 1.0)}, max_seconds=14.0).rounds == 100
    with pytest.raises(ConfigError, match="max_seconds is given with a budget"):
        measure({"a": clock.candidate("a", 1.0)}, max_seconds=14.0, budget="median=30ms@b1")


def test_the_ratio_is_paired(clock: Clock) -> None:
    """The machine slows down tenfold half-way; each round's ratio stays 2."""
    slow = [60.0] * 4 + [600.0] * 10
    fast = [30.0] * 4 + [300.0] * 10
    result = measure(
        {"slow": clock.candidate("slow", *slow), "fast": clock.candidate("fast", *fast)}, rounds=9, warmup=0
    )
    assert result["fast"].speedup == 2
    assert result["fast"].speedup_interval == (2, 2)
    assert result["slow"].speedup == 1
    assert result["fast"].median_interval_ms[1] == 300


def test_percentiles_and_p99_only_with_enough_samples(clock: Clock) -> None:
    times = [1.0] + [float(n) for n in range(1, 101)]
    few = measure({"a": clock.candidate("a", *times)}, rounds=99, warmup=0)["a"]
    assert few.p99_ms is None
    many = measure({"a": clock.candidate("a", *times)}, rounds=100, warmup=0)["a"]
    assert many.median_ms == 50.5
    assert many.p90_ms == pytest.approx(np.percentile(np.arange(1, 101), 90))
    assert many.p95_ms == pytest.approx(np.percentile(np.arange(1, 101), 95))
    assert many.p99_ms == pytest.approx(np.percentile(np.arange(1, 101), 99))


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=30))
def test_the_interval_holds_the_median_and_stays_within_the_samples(times: list[float]) -> None:
    samples = np.array(times)
    low, high = bootstrap_median(samples)
    assert samples.min() <= low <= high <= samples.max()
    assert low <= np.median(samples) <= high
    assert bootstrap_median(samples) == (low, high)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """200 experiments of 40 exponential samples: 95 % intervals miss the true median about 10 times."""
    draw = np.random.default_rng(0)
    intervals = [bootstrap_median(draw.exponential(size=40)) for _ in range(200)]
    covered = sum(low <= np.log(2) <= high for low, high in intervals)
    assert 180 <= covered <= 199


# Budgets


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("p95=25ms@b1", Budget(statistic="p95", limit_ms=25, batch=1)),
        ("p50=0.5s@b32", Budget(statistic="median", limit_ms=500, batch=32)),
        ("median=800us@b8", Budget(statistic="median", limit_ms=0.8, batch=8)),
        ("onnxruntime:p99=.5ms@b1", Budget(statistic="p99", limit_ms=0.5, batch=1, name="onnxruntime")),
        ("ort:onnx/a.onnx:p90=1ms@b1", Budget(statistic="p90", limit_ms=1, batch=1, name="ort:onnx/a.onnx")),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text", ["", "p95", "p95=25", "p95=25ms", "p42=25ms@b1", "p95=-1ms@b1", "p95=25 ms@b1", "p95<2ms@b1"]
)
def test_malformed_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected \[NAME:\]STATISTIC=TIME@bBATCH such as p95=25ms@b1"):
        Budget.parse(text)


def test_a_budget_is_a_gate(clock: Clock) -> None:
    candidates = {"fast": clock.candidate("fast", 10), "slow": clock.candidate("slow", 30)}
    assert measure(candidates, rounds=2, warmup=0, budget="fast:p95=25ms@b1,median=30ms@b1")
    over = measure(candidates, rounds=2, warmup=0, budget="p95=25ms@b1")
    assert not over
    assert over.over_budget == ("slow has p95 30 ms at batch 1, expected at most 25 ms",)
    with pytest.raises(LatencyError, match=r"slow has p95 30 ms .*at most 25 ms"):
        over.raise_if_over()
    measure(candidates, rounds=2, warmup=0).raise_if_over()


# Arguments, real candidates, JSON


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": {}}, "candidates is empty"),
        ({"candidates": {"a": 3}}, "a candidate is int, expected a Generator, a backend or a function"),
        ({"batch": 0}, "batch is 0, expected 1 or more"),
        ({"rounds": 0}, "rounds is 0, expected 1 or more"),
        ({"rounds": 1}, "rounds is 1, expected 2 or more"),
        ({"budget": "p95=1ms@b2"}, "budget is for batch 2, expected 1"),
        ({"budget": "b:p95=1ms@b1"}, "budget is for 'b', expected one of a"),
        ({"budget": "p99=1ms@b1"}, "budget is for p99, but rounds is 2; expected at least 100"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"candidates": {"a": lambda: None}, "rounds": 2}
    with pytest.raises(ConfigError, match=message):
        measure(**(call | arguments))


def test_a_batch_over_the_samplers_is_refused(ort: Generator) -> None:
    with pytest.raises(ConfigError, match=r"batch is 6, expected 1\.\.5"):
        measure({"ort": ort}, batch=6)


def test_real_backends_side_by_side(ort: Generator, reference: Generator) -> None:
    lines: list[str] = []
    result = measure(
        {
            "torch": reference,
            "onnxruntime": ort,
            "backend": ort.opened().backend,
            "sleep": lambda: time.sleep(1e-3),
        },
        batch=3,
        rounds=4,
        warmup=1,
        events=EventLines(lines.append),
    )
    assert lines == [f"{n} of 4: rounds" for n in (1, 2, 3, 4)]
    assert [timing.name for timing in result] == ["torch", "onnxruntime", "backend", "sleep"]
    assert result["onnxruntime"].load_ms == ort.opened().load_ms
    assert result["backend"].load_ms is None
    assert result["sleep"].median_ms >= 1
    assert all(min(timing.samples_ms) > 0 for timing in result)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["passed"] is True
    assert len(plain["timings"][0]["samples_ms"]) == 4
    assert result.machine["cpus"]


def test_end_to_end_takes_in_the_noise_and_the_pictures(ort: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    original = Generator.__call__

    def spy(gen: Generator, *args: Any, **options: Any) -> Any:
        calls.append(options)
        return original(gen, *args, **options)

    monkeypatch.setattr(Generator, "__call__", spy)
    assert measure({"ort": ort}, batch=2, rounds=2, warmup=0, end_to_end=True)
    assert len(calls) == 3
    assert {call["output_type"] for call in calls} == {"uint8"}


def test_peak_memory_grows_with_what_is_used() -> None:
    if peak_rss_mib() is None:
        pytest.skip("this system does not report a process's peak memory")
    code = (
        "from scm_sdk._util.machine import peak_rss_mib\n"
        "before = peak_rss_mib()\n"
        "block = b'1' * (256 << 20)\n"
        "del block\n"
        "print(peak_rss_mib() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=True)
    assert 192 <= float(done.stdout) <= 257
