"""Streams: each request gets the images of its own call, in order, and batches are full."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.batching import BOTH, PLAIN, requests, same, wrong
from scm_sdk import Generator


@pytest.fixture
def gen(linear_bundle: Callable[..., Path]) -> Iterator[Generator]:
    with Generator.from_pretrained(linear_bundle(*BOTH), backend="onnxruntime", num_threads=1) as gen:
        yield gen


@settings(max_examples=25)
@given(st.lists(requests | wrong, max_size=8))
def test_a_stream_equals_its_single_calls_bit_by_bit(ort: Generator, asked: list[dict[str, Any]]) -> None:
    same(list(ort.stream(asked, return_exceptions=True)), asked, ort)


def test_a_stream_packs_across_numbers_of_steps(gen: Generator) -> None:
    asked = [{"seed": n, "num_inference_steps": 1 + n % 2, "output_type": "raw"} for n in range(16)]
    outputs = list(gen.stream(asked))
    assert [out.info.batches for out in outputs] == [(4,)] * 16, "two kinds in turn, and every batch is full"
    same(outputs, asked, gen)


def test_a_stream_reads_no_further_than_its_window(gen: Generator) -> None:
    read = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        yield {"seed": 0, "num_inference_steps": 1}  # alone of its kind: it must not wait indefinitely
        while True:
            read += 1
            yield {"seed": read}

    stream = gen.stream(endless())
    assert next(stream).seeds == (0,)
    assert read <= 4 * PLAIN.max_batch
    assert next(stream).seeds == (1,)


def test_what_the_requests_raise_comes_after_the_outputs_before_it(gen: Generator) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"seed": 1}
        raise OSError("the queue of requests went away")

    stream = gen.stream(broken())
    assert next(stream).seeds == (1,)
    with pytest.raises(OSError, match="went away"):
        next(stream)
