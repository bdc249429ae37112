"""The driver of NVIDIA's builder: its words, its progress, its timing cache and its log."""

import importlib
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest

from helpers.engine_helpers import graph, options
from helpers.recorded_events import Recorded
from scm_sdk.engines.tensorrt import make_logger
from scm_sdk.errors import BackendUnavailable, ExportError, IncompatibleEngineError, ScmError, UnsupportedGraphError
from scm_sdk.export.engines.builder import explain, give_timing_cache, make_monitor
from scm_sdk.export.engines.engine import build_engine

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 Linux and Windows")


def test_a_damaged_timing_cache_counts_as_empty(tmp_path: Path) -> None:
    """TensorRT-RTX keeps these calls and does nothing in them; its answers are those of the real library."""
    trt = importlib.import_module("tensorrt_rtx")
    log = make_logger(trt)
    builder = trt.Builder(log)
    path = tmp_path / "timing.cache"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for content in (None, b"garbage" * 100, b""):
            if content is not None:
                path.write_bytes(content)
            config = builder.create_builder_config()
            give_timing_cache(config, path)
            assert config.get_timing_cache() is not None

        given: list[object] = []

        class Refuses:
            """As TensorRT may: by an exception, by None, or by False."""

            def create_timing_cache(self, blob: bytes) -> object:
                if blob == b"raise":
                    raise RuntimeError("cannot read it")
                return None if blob == b"none" else blob

            def set_timing_cache(self, cache: object, ignore_mismatch: bool) -> bool:
                given.append(cache)
                return cache != b"mismatch"

        for content in (b"raise", b"none", b"mismatch"):
            path.write_bytes(content)
            give_timing_cache(Refuses(), path)
            assert given[-1] == b""


def test_the_log_does_not_grow_for_ever() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    running, building = make_logger(trt), make_logger(trt, kernels=True)
    for log in (running, building):
        for i in range(2000):
            log.log(trt.ILogger.VERBOSE, f"Name: k{i}, LayerType: kgen")
            log.log(trt.ILogger.VERBOSE, f"a tactic that took {i} ms")
            log.log(trt.ILogger.WARNING, f"warning {i}")
        assert len(log.warnings()) <= 500 and log.warnings()[-1] == "warning 1999"
    assert len(running.kernels) == 0 and len(building.kernels) == 2000


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("cudaError 35: CUDA driver version is insufficient for CUDA runtime version", BackendUnavailable, "no GPU"),
        ("Non-zero zero point is not supported.", UnsupportedGraphError, "shifted zero points"),
        ("input has type Int32 but must have type FP8", UnsupportedGraphError, "quantized biases"),
        ("Plugin not found, are the plugin name, version, and namespace correct?", UnsupportedGraphError, "operator"),
        ("ElementWiseOperation SUM must have same input types. But", UnsupportedGraphError, "mixes types"),
        ("Unable to load library: libnvinfer_lean.so.1", IncompatibleEngineError, "lean runtime"),
        ("graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed", BackendUnavailable, "only be built with a GPU"),
        ("something new", ExportError, "something new"),
    ],
)  # fmt: skip
def test_the_builders_words_are_explained(text: str, error: type[ScmError], message: str) -> None:
    found = (
        explain(["a first line that says little", text], doing="building x")
        if text != "something new"
        else explain([text], doing="building x")
    )
    assert type(found) is error and message in str(found) and str(found).startswith("building x failed")


def test_progress_is_reported_and_stops_the_build(graphs: Path, tmp_path: Path) -> None:
    class Stopping(Recorded):
        def step(self, text: str, done: int, total: int, /) -> None:
            super().step(text, done, total)
            if len(self.steps) == 5:
                raise KeyboardInterrupt

    events = Stopping()
    with pytest.raises(KeyboardInterrupt):
        build_engine(graph(graphs, "fp16"), tmp_path / "engine", options(), events=events)
    assert len(events.steps) == 5 and all(1 <= step <= total for _, step, total in events.steps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_build_wherever_it_comes(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The library swallows what is raised in its other callbacks, as in the start of a phase."""

    class Stopped(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    made: list[Any] = []

    def signaled(library: Any, *arguments: Any) -> Any:
        made.append(make_monitor(library, *arguments))
        start = type(made[0]).phase_start
        type(made[0]).phase_start = lambda self, *about: (signal.raise_signal(number), start(self, *about))[1]
        return made[0]

    monkeypatch.setattr("scm_sdk.export.engines.builder.make_monitor", signaled)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            build_engine(graph(graphs, "fp16"), tmp_path / "engine", options())
        assert signal.getsignal(number) is stop, "the handler is back"
    finally:
        signal.signal(number, before)
    assert made[0].stopped_by is not None and not list(tmp_path.iterdir())
