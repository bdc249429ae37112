"""Run the builder of TensorRT or TensorRT-RTX on a graph, and translate its errors."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from scm_sdk._util.events import Events
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk.engines.tensorrt import LibraryObject, make_logger
from scm_sdk.errors import BackendUnavailable, ConfigError, ExportError, IncompatibleEngineError, ScmError
from scm_sdk.errors import UnsupportedGraphError as Unsupported
from scm_sdk.spec import SamplerSpec

from .options import EngineOptions

_NO_GPU = "no GPU is here. TensorRT builds on the GPU that runs the engine; --flavor tensorrt_rtx builds ahead of time"
_WEIGHTS_APART = "the graph's weights are not next to it. Copy <name>_data too"
_MEANINGS: tuple[tuple[str, type[ScmError], str], ...] = (
    ("HW-specific datatypes", Unsupported,
     "the target cannot compute a type in the graph. BF16 needs compute capability 8.0, FP8 8.9: choose fp16 or int8"),
    ("FP32 GEMM is not supported", Unsupported,
     "TensorRT-RTX has no float32 matrix product for Turing (7.5). Use fp16 or int8 there, or --flavor tensorrt"),
    ("CUDA driver version is insufficient", BackendUnavailable, _NO_GPU),
    ("no CUDA-capable device", BackendUnavailable, _NO_GPU),
    ("Non-zero zero point", Unsupported,
     "the graph is quantized with shifted zero points. Quantize symmetrically (scm-export quantize does)"),
    ("has type Int32 but must have type", Unsupported,
     "the graph has quantized biases. Keep them in floating point (scm-export quantize does)"),
    ("Plugin not found", Unsupported, "the graph has an operator that TensorRT does not know"),
    ("must have same input types", Unsupported,
     "the graph mixes types in one operator. Put a Cast where an island ends (scm-export precision does)"),
    ("dedicated kernel", Unsupported,
     "an attention block has no kernel. Use opset 20 to 22, where attention is written out"),
    ("length out of range", ExportError, "the graph's weights are cut short. Copy or export it again"),
    ("Failed to open file", ExportError, _WEIGHTS_APART),
    ("Failed to import initializer", ExportError, _WEIGHTS_APART),
    ("MODEL_DESERIALIZE_FAILED", ExportError, "the file is no ONNX graph, or is damaged. Export it again"),
    ("cannot be found, or is not a regular file", ExportError, "the file is not there"),
    ("optimization profile", ConfigError, "the batch sizes do not fit. Expected min <= opt <= max"),
    ("libnvinfer_lean", IncompatibleEngineError,
     "such an engine needs TensorRT's lean runtime: install tensorrt-lean, or leave --version-compatible out"),
    ("graph_jit", BackendUnavailable, "this kind of engine can only be built with a GPU"),
    ("out of memory", ExportError, "the builder ran out of memory. Lower --workspace or the largest batch"),
    ("UNSUPPORTED_NODE", Unsupported, "the graph has an operator that this builder cannot run"),
)  # fmt: skip


def explain(texts: Sequence[str], *, doing: str) -> ScmError:
    """Return the error for the messages of a builder, the most informative message first.

    Args:
        texts: Error messages of the parser and the logger.
        doing: The failed operation, the subject of the message.
    """
    for sign, error, meaning in _MEANINGS:
        for text in texts:
            if sign in text:
                return error(f"{doing} failed: {meaning}. The builder said: {_short(text)}")
    said = _short(texts[0]) if texts else "nothing"
    return ExportError(f"{doing} failed, expected an engine. The builder said: {said}")


def _short(text: str) -> str:
    return " ".join(text.split())[:400]


class Build:
    """One build. It keeps references to the parser, the network and the logger, which the library needs."""

    def __init__(
        self,
        library: ModuleType,
        graph: Path,
        spec: SamplerSpec,
        options: EngineOptions,
        timing_cache: Path | None,
        events: Events,
    ) -> None:
        self.trt, self.graph, self.spec, self.options = library, graph, spec, options
        self.timing_cache, self.events = timing_cache, events
        self.log = make_logger(library, kernels=True)
        self.seconds: dict[str, float] = {}

    def run(self) -> memoryview:
        """Parse and build; return the bytes of the engine in memory of the library, without a copy."""
        trt, start = self.trt, time.perf_counter()
        try:
            self.builder = trt.Builder(self.log)
        except TypeError as exc:  # the library is installed, but could not start
            raise explain([*self.log.errors(), str(exc)], doing=f"starting {self.options.flavor}") from exc
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self.log)
        # From the file, so that external weights are found; an empty file parses without errors and has no output.
        parsed = self.parser.parse_from_file(str(self.graph.resolve())) and self.network.num_outputs > 0
        if not parsed:
            errors = [self.parser.get_error(i) for i in range(self.parser.num_errors)]
            texts = [f"{e.code().name}: {e.desc()} (node {e.node_name()!r}, {e.node_operator()})" for e in errors]
            raise explain([*texts, *self.log.errors()] or ["the graph is empty"], doing=f"parsing {self.graph}")
        self.seconds["parse"] = time.perf_counter() - start
        config = self._configure()
        start = time.perf_counter()
        with held_signals() as received:
            self.monitor = config.progress_monitor = make_monitor(trt, self.events, received)
            plan = self.builder.build_serialized_network(self.network, config)
            if plan is None:
                self._clear_target()
        self.seconds["build"] = time.perf_counter() - start
        if self.monitor.stopped_by is not None:
            raise self.monitor.stopped_by
        if plan is None:
            raise explain(self.log.errors(), doing=f"building {self.graph}")
        self._keep_timing_cache(config)
        return memoryview(plan)

    def _configure(self) -> Any:
        trt, options = self.trt, self.options
        config = self.builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)  # no TF32
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.flavor == "tensorrt_rtx":
            config.num_compute_capabilities = len(options.compute_capabilities)
            for i, capability in enumerate(options.compute_capabilities):
                name = "SM" + capability.replace(".", "")
                config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
        else:
            level = options.hardware_compatibility.upper()
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
            if self.timing_cache is not None:
                give_timing_cache(config, self.timing_cache)
        profile = self.builder.create_optimization_profile()
        for tensor in self.spec.inputs:
            profile.set_shape(tensor.name, *((batch, *tensor.shape) for batch in options.batch))
        config.add_optimization_profile(profile)
        return config

    def _clear_target(self) -> None:
        """Build a tiny engine to reset the target after a failed build.

        TensorRT-RTX 1.7.1 keeps the target in the process (measured): after a failed build for 7.5, the next one for
        8.0 was silently compiled for 7.5, which only the INT8 census showed.
        """
        if self.options.flavor != "tensorrt_rtx":
            return
        trt = self.trt
        network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", trt.float16, (4, 4))
        network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
        config = self.builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM80, 0)
        self.builder.build_serialized_network(network, config)

    def _keep_timing_cache(self, config: Any) -> None:
        if self.timing_cache is not None and self.options.flavor == "tensorrt":
            cache = config.get_timing_cache()
            blob = cache.serialize() if cache is not None else None
            if blob is not None:
                atomic_write_bytes(self.timing_cache, bytes(memoryview(blob)))


def give_timing_cache(config: LibraryObject, path: Path) -> None:
    """Load and store kernel times in a file; a damaged or unrelated file counts as empty."""
    try:
        old = path.read_bytes()
    except OSError:
        old = b""
    for blob in (old, b""):
        try:
            cache = config.create_timing_cache(blob)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return
        except (RuntimeError, TypeError, ValueError):  # the result of the bindings for an unreadable blob
            continue


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Delay SIGINT and SIGTERM, and deliver the first one at the end.

    The library swallows exceptions of signal handlers while it calls Python (logger, monitor). Ignored signals stay
    ignored; outside the main thread nothing changes.

    Yields:
        Numbers of the received signals.
    """
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, lambda number, _frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


class ProgressMonitor(Protocol):
    """A progress monitor of one of the libraries; ``stopped_by`` is the reason of a stopped build, or None."""

    stopped_by: BaseException | None


def make_monitor(library: ModuleType, events: Events, received: Sequence[int] = ()) -> ProgressMonitor:
    """Return the progress monitor of a library, which reports the steps of each phase and stops when that raises.

    Args:
        library: TensorRT or TensorRT-RTX.
        events: Receives a step for each completed step of the builder, named like its phase.
        received: Delayed signals; the build stops if there is one.

    Returns:
        An object with ``stopped_by``: the exception to raise for a stopped build, or None.
    """

    class Monitor(library.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stopped_by: BaseException | None = None
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if received:
                    self.stopped_by = ExportError(
                        f"the build was canceled in {phase_name!r}, expected to continue. Nothing was written."
                    )
                else:
                    events.step(phase_name, step + 1, self.totals.get(phase_name, step + 1))
            except BaseException as exc:  # also KeyboardInterrupt, which must not cross frames of the library
                self.stopped_by = exc
            return self.stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()
