"""Shared batches: whatever is packed with it, each request gets the images of its own call, and only its own errors."""

import dataclasses
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.batching import BOTH, PLAIN, requests, same, wrong
from scm_sdk import Generator
from scm_sdk.errors import BackendFailure, ConfigError, QueueFull, ScmError
from scm_sdk.inference.batcher import concurrent_batches
from scm_sdk.inference.output import GeneratorOutput
from scm_sdk.noise import draw_noise


class Gate:
    """A backend that waits until it may run, and records how large its batches were."""

    def __init__(self, gen: Generator, steps: int = 2) -> None:
        self.inner, self.spec, self.batches = gen.opened(steps).backend, gen.opened(steps).spec, list[int]()
        self.threads = list[str]()
        self.open, self.entered, self.fault = threading.Event(), threading.Semaphore(0), 0
        object.__setattr__(gen.opened(steps), "backend", self)

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        self.entered.release()
        assert self.open.wait(120)
        self.batches.append(len(noise[0]))
        self.threads.append(threading.current_thread().name)
        if self.fault in conditioning["class_labels"] and self.fault:
            raise BackendFailure("label 2 broke the library")
        return self.inner.sample(noise, conditioning)

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def gen(linear_bundle: Callable[..., Path]) -> Iterator[Generator]:
    with Generator.from_pretrained(linear_bundle(*BOTH), backend="onnxruntime", num_threads=1) as gen:
        yield gen


@pytest.fixture
def gate(gen: Generator) -> Iterator[Gate]:
    gate = Gate(gen)
    yield gate
    gate.open.set()


@settings(max_examples=10)
@given(st.lists(requests | wrong, min_size=1, max_size=12))
def test_callers_get_what_they_would_alone(ort: Generator, asked: list[dict[str, Any]]) -> None:
    def ask(request: dict[str, Any]) -> GeneratorOutput | Exception:
        try:
            return batcher(**request)
        except ScmError as exc:
            return exc

    with ort.batcher(max_queue_size=10) as batcher, ThreadPoolExecutor(8) as pool:
        same(list(pool.map(ask, asked)), asked, ort)


@pytest.mark.parametrize("callers", [1, 2, 8, 64])
def test_a_crowd(gen: Generator, callers: int) -> None:
    """Directly and through the front, with the queue full most of the time."""
    asked = [
        {"num_images": 1 + n % 3, "seed": n, "class_labels": n % 3, "num_inference_steps": 1 + n % 2}
        | {"output_type": "raw"}
        for n in range(64)
    ]
    expected = [gen(**request) for request in asked]
    with gen.batcher(max_queue_size=8) as batcher, ThreadPoolExecutor(callers) as pool:
        for call in (gen, batcher):
            for out, alone in zip(pool.map(lambda request: call(**request), asked), expected, strict=True):  # noqa: B023
                assert out.seeds == alone.seeds
                np.testing.assert_array_equal(out.images, alone.images)


def test_what_waits_is_run_together_in_order(gen: Generator, gate: Gate) -> None:
    done: list[int] = []
    with gen.batcher(max_concurrent_batches=1) as batcher:
        futures = [batcher.submit(seed=0, num_images=2)]
        assert gate.entered.acquire(timeout=120)
        futures += [batcher.submit(seed=n) for n in (10, 11, 12, 13, 14)]
        futures.append(batcher.submit(seed=20, num_images=9))  # longer than a batch: on its own
        futures.append(batcher.submit(seed=40, noise=None, class_labels=[1, 2], num_images=2))
        for n, future in enumerate(futures):
            future.add_done_callback(lambda _, n=n: done.append(n))
        assert batcher.waiting == 16
        gate.open.set()
        wait(futures, timeout=120)
    assert gate.batches == [2, 4, 1, 4, 2, 4, 1], "between two batches of the long one, one of what waits"
    assert [future.result().info.batches for future in futures] == [(2,)] + [(4,)] * 4 + [(1,), (4, 4, 1), (2,)]
    assert sorted(done) == list(range(8))


def test_a_caller_with_nothing_before_it_runs_its_own(gen: Generator, gate: Gate) -> None:
    with gen.batcher(max_concurrent_batches=1) as batcher, ThreadPoolExecutor(1, "caller") as pool:
        first = pool.submit(batcher, seed=0)
        assert gate.entered.acquire(timeout=120)
        later = [batcher.submit(seed=n) for n in (1, 2)]
        assert not gate.entered.acquire(timeout=0.1), "the only room is taken"
        assert batcher.waiting == 2
        gate.open.set()
        assert [future.result(120).seeds for future in (first, *later)] == [(0,), (1,), (2,)]
    assert gate.batches == [1, 2]
    assert gate.threads == ["caller_0", "scm-batcher"]


def test_batches_run_side_by_side(gen: Generator, gate: Gate) -> None:
    with gen.batcher(max_concurrent_batches=2) as batcher:
        futures = []
        for n in range(2):  # the second does not wait for the first
            futures.append(batcher.submit(seed=n))
            assert gate.entered.acquire(timeout=120)
        futures += [batcher.submit(seed=n) for n in range(2, 5)]
        assert not gate.entered.acquire(timeout=0.1), "a third would share the cores of the two"
        assert batcher.waiting == 3
        gate.open.set()
        assert [future.result(120).seeds for future in futures] == [(n,) for n in range(5)]
    assert sorted(gate.batches) == [1, 1, 3]
    with pytest.raises(ConfigError, match="max_concurrent_batches is 0"):
        gen.batcher(max_concurrent_batches=0)


@pytest.mark.parametrize(
    ("backend", "device", "num_threads", "batches"),
    [
        ("onnxruntime", "cpu", 1, 8),
        ("onnxruntime", "cpu", 3, 2),
        ("onnxruntime", "cpu", 9, 1),
        ("onnxruntime", "cpu", None, 1),
        ("onnxruntime", "cuda:0", 1, 1),
        ("torch", "cpu", 1, 1),
    ],
)
def test_as_many_side_by_side_as_cores_hold(
    gen: Generator, monkeypatch: pytest.MonkeyPatch, backend: str, device: str, num_threads: int | None, batches: int
) -> None:
    monkeypatch.setattr("scm_sdk._util.processor.usable_cores", lambda: 8)
    opened = gen.opened()
    monkeypatch.setattr(opened.backend, "device", device)
    row = dataclasses.replace(opened.row, backend=backend)
    assert concurrent_batches(dataclasses.replace(opened, row=row), num_threads) == batches


def test_given_noise_is_packed_with_seeds(gen: Generator, gate: Gate) -> None:
    with gen.batcher(max_concurrent_batches=1) as batcher:
        first = batcher.submit(seed=0)
        assert gate.entered.acquire(timeout=120)
        named = batcher.submit(seed=7, class_labels=1, output_type="raw")
        given_noise = batcher.submit(noise=draw_noise(PLAIN, [7]), class_labels=1, output_type="raw")
        gate.open.set()
        assert first.result(120).seeds == (0,)
        assert (named.result(120).seeds, given_noise.result(120).seeds) == ((7,), ())
        np.testing.assert_array_equal(named.result().images, given_noise.result().images)
    assert gate.batches == [1, 2]


def test_a_full_queue_refuses_or_waits(gen: Generator, gate: Gate) -> None:
    with gen.batcher(max_queue_size=3, max_concurrent_batches=1) as batcher:
        running = batcher.submit(seed=0)
        assert gate.entered.acquire(timeout=120)
        held = batcher.submit(seed=1, num_images=2)
        for timeout in (0, 0.01):
            with pytest.raises(QueueFull, match=r"2 images wait.*max_queue_size = 3"):
                batcher.submit(seed=2, num_images=2, timeout=timeout)
        assert held.cancel(), "a canceled request makes room at once"
        large = batcher.submit(seed=3, num_images=8, timeout=0)
        with ThreadPoolExecutor(1) as pool:
            patient = pool.submit(batcher, seed=4)
            gate.open.set()
            assert patient.result(120).seeds == (4,)
        assert len(large.result(120).images) == 8
        assert running.result(120).seeds == (0,)
    with pytest.raises(ConfigError, match="max_queue_size is 0"):
        gen.batcher(max_queue_size=0)


def test_a_cancelled_request_is_never_computed(gen: Generator, gate: Gate) -> None:
    with gen.batcher(max_concurrent_batches=1) as batcher:
        running = batcher.submit(seed=0)
        assert gate.entered.acquire(timeout=120)
        futures = [batcher.submit(seed=n) for n in range(1, 4)]
        assert futures[1].cancel()
        assert not running.cancel(), "its batch has started"
        gate.open.set()
        assert [futures[n].result(120).seeds for n in (0, 2)] == [(1,), (3,)]
        with pytest.raises(CancelledError):
            futures[1].result(120)
    assert gate.batches == [1, 2]


def test_an_error_reaches_its_own_request_only(gen: Generator, gate: Gate) -> None:
    """Label 2 makes the library raise for the whole batch; the others are run again without it."""
    gate.fault = 2
    with gen.batcher(max_concurrent_batches=1) as batcher:
        first = batcher.submit(seed=0, class_labels=0)
        assert gate.entered.acquire(timeout=120)
        futures = [batcher.submit(seed=n, class_labels=n) for n in (1, 2, 0)]
        with pytest.raises(ConfigError, match="class label is 7"):
            batcher.submit(class_labels=7)
        gate.open.set()
        assert first.result(120).seeds == (0,)
        assert [futures[n].result(120).seeds for n in (0, 2)] == [(1,), (0,)]
        with pytest.raises(BackendFailure, match="label 2 broke the library"):
            futures[1].result(120)
    assert gate.batches == [1, 3, 1, 1, 1]
    outputs = list(gen.stream([{"class_labels": n} for n in (1, 2, 0)], return_exceptions=True))
    assert [type(out) for out in outputs] == [GeneratorOutput, BackendFailure, GeneratorOutput]


def test_one_bad_image_does_not_spoil_the_batch(gen: Generator, gate: Gate) -> None:
    loud = [np.full((1, 3, 4, 4), 3e38, np.float32)] * 2  # finite, but its sum is not
    with gen.batcher(max_concurrent_batches=1) as batcher:
        futures = [batcher.submit(seed=0)]
        assert gate.entered.acquire(timeout=120)
        futures += [batcher.submit(seed=1, class_labels=0), batcher.submit(noise=loud, class_labels=0)]
        gate.open.set()
        assert futures[1].result(120).seeds == (1,)
        with pytest.raises(BackendFailure, match="returned NaN or infinity for image 0"):
            futures[2].result(120)
    assert gate.batches == [1, 2]


# Closing


def test_closing_finishes_what_waits(gen: Generator) -> None:
    batcher = gen.batcher()
    futures = [batcher.submit(seed=n) for n in range(20)]
    batcher.close()
    assert [future.result(0).seeds for future in futures] == [(n,) for n in range(20)]
    batcher.close()
    with pytest.raises(BackendFailure, match="this batcher was closed, expected an open one"):
        batcher(seed=1)
    assert gen(seed=1).seeds == (1,), "the generator stays open"


def test_closing_waits_for_a_caller_that_runs_its_own(gen: Generator, gate: Gate) -> None:
    batcher = gen.batcher(max_concurrent_batches=1)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(batcher, seed=0)
        assert gate.entered.acquire(timeout=120)
        closing = pool.submit(batcher.close)
        assert not wait([closing], timeout=0.1).done
        gate.open.set()
        closing.result(120)
        assert running.result(120).seeds == (0,)


def test_closing_can_cancel_what_waits_and_does_so_when_the_block_fails(gen: Generator, gate: Gate) -> None:
    with pytest.raises(KeyError), gen.batcher(max_concurrent_batches=1) as batcher:
        running = batcher.submit(seed=0)
        assert gate.entered.acquire(timeout=120)
        waiting = batcher.submit(seed=1)
        threading.Timer(0.05, gate.open.set).start()
        raise KeyError
    assert waiting.cancelled()
    assert running.result(0).seeds == (0,)
    assert gate.batches == [1]


def test_closing_wakes_who_waits_for_room(gen: Generator, gate: Gate) -> None:
    batcher = gen.batcher(max_queue_size=1, max_concurrent_batches=1)
    running = batcher.submit(seed=0)
    assert gate.entered.acquire(timeout=120)
    batcher.submit(seed=1)
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(batcher, seed=2)
        closing = pool.submit(batcher.close, cancel_waiting=True)
        with pytest.raises(BackendFailure, match="this batcher was closed"):
            late.result(120)
        gate.open.set()
        closing.result(120)
    assert running.result(0).seeds == (0,)


def test_closing_answers_who_waits_in_the_queue_with_an_error_of_this_package(gen: Generator, gate: Gate) -> None:
    batcher = gen.batcher(max_concurrent_batches=1)
    running = batcher.submit(seed=0)
    assert gate.entered.acquire(timeout=120)
    with ThreadPoolExecutor(9) as pool:
        queued = [pool.submit(batcher, seed=n) for n in range(1, 9)]
        while batcher.waiting < 8:
            sleep(0.01)
        closing = pool.submit(batcher.close, cancel_waiting=True)
        for each in queued:
            with pytest.raises(BackendFailure, match=r"this batcher was closed.* gen\.batcher"):
                each.result(120)
        gate.open.set()
        closing.result(120)
    assert running.result(0).seeds == (0,) and gate.batches == [1]


# Long requests


def test_a_long_request_leaves_room_for_others_and_ends_when_the_batcher_is_closed(gen: Generator, gate: Gate) -> None:
    batcher = gen.batcher(max_concurrent_batches=1)
    long = batcher.submit(64, seed=0)
    assert gate.entered.acquire(timeout=120)
    second = batcher.submit(8, seed=100)
    small = [batcher.submit(seed=n) for n in (200, 201)]
    gate.open.set()
    assert [future.result(120).seeds for future in small] == [(200,), (201,)]
    assert gate.batches[:2] == [4, 2], "before what is long, too"
    assert long.result(120).info.batches == (4,) * 16 and second.result(120).info.batches == (4, 4)
    batcher.close()


@pytest.mark.parametrize("wait", [True, False])
def test_closing_ends_a_long_request_after_its_batch_where_it_is_told_to(
    wait: bool, gen: Generator, gate: Gate
) -> None:
    batcher = gen.batcher(max_concurrent_batches=1)
    long = batcher.submit(64, seed=0)
    assert gate.entered.acquire(timeout=120)
    assert not long.cancel(), "it runs"
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(batcher.close, cancel_waiting=not wait)
        while not batcher._queue._closed:
            sleep(0.01)
        gate.open.set()
        closing.result(120)
    if wait:
        assert len(long.result(0).images) == 64
    else:
        with pytest.raises(BackendFailure, match="closed with cancel_waiting"):
            long.result(0)
        assert gate.batches == [4]


# Callbacks, and a batcher without references


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, CancelledError, ValueError])
def test_a_callback_that_raises_ends_no_thread_and_no_other_callback(
    error: type[BaseException], gen: Generator, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(future: object) -> None:
        raise error("from a callback")

    called = list[int]()
    with gen.batcher(max_concurrent_batches=1) as batcher:
        futures = [batcher.submit(64 if n == 0 else 1, seed=n) for n in range(4)]
        for n, future in enumerate(futures):
            future.add_done_callback(fail)
            future.add_done_callback(lambda _, n=n: called.append(n))
        gate.open.set()
        wait(futures, timeout=120)
        for n in range(8):
            assert batcher.submit(seed=n).result(120).seeds == (n,)
        assert all(worker.is_alive() for worker in batcher._queue._workers)
    assert sorted(called) == [0, 1, 2, 3] and len(caplog.records) == 4


def test_a_callback_on_its_own_thread_may_end_it(gen: Generator) -> None:
    with gen.batcher() as batcher:
        done = batcher.submit(seed=1)
        done.result(120)
        with pytest.raises(SystemExit):
            done.add_done_callback(lambda _: sys.exit(3))


def test_who_waits_for_a_cancelled_future_is_woken(gen: Generator, gate: Gate) -> None:
    with gen.batcher(max_concurrent_batches=1) as batcher:
        futures = [batcher.submit(seed=0)]
        assert gate.entered.acquire(timeout=120)
        futures += [batcher.submit(seed=n) for n in (1, 2)]  # these wait for the first
        assert futures[2].cancel()
        gate.open.set()
        assert not wait(futures, timeout=120).not_done


def test_a_batcher_that_nobody_holds_answers_and_ends_its_threads(gen: Generator, gate: Gate) -> None:
    before = threading.active_count()
    batcher = gen.batcher(max_concurrent_batches=2)
    workers = batcher._queue._workers
    futures = [batcher.submit(seed=n) for n in range(3)]
    assert gate.entered.acquire(timeout=120)
    del batcher
    gc.collect()
    gate.open.set()
    assert [future.result(120).seeds for future in futures] == [(0,), (1,), (2,)]
    for worker in workers:
        worker.join(120)
    for _ in range(20):
        gen.batcher()(seed=1)
    gc.collect()
    until = monotonic() + 120
    while threading.active_count() > before and monotonic() < until:
        sleep(0.01)
    assert threading.active_count() <= before, "none is left of the batchers"


def test_a_generator_closed_below_answers_everyone(gen: Generator) -> None:
    batcher = gen.batcher()
    gen.opened().backend.close()
    with pytest.raises(BackendFailure, match="this onnxruntime backend was closed"):
        batcher(seed=1)
    gen.close()
    with pytest.raises(BackendFailure, match="this generator was closed"):
        batcher.submit(seed=1)
    batcher.close()
