"""Open and cache the selected backends, and run requests on them.

``Opener`` opens what the plan selected and applies the fallback policy if it cannot be loaded; ``Opened`` is one open
backend.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from .._util.arguments import nearest_hint
from .._util.events import SILENT, Events
from .._util.forked import check_process
from ..bundle.goldens import GOLDEN_PATH
from ..bundle.manifest import ImageSize, ParityRecord
from ..engines.compatibility import EngineHost
from ..errors import BackendError, BackendFailure, BundleError, ConfigError, IntegrityError
from ..spec import Precision, SamplerSpec
from .backends import BACKENDS, Backend, Graph, backend_info, open_backend
from .latency_cache import recall, remember
from .output import GenerationInfo, GeneratorOutput
from .parts import Part, PartsBackend, Sample
from .request import OutputType, Request, make_example
from .selection import Measured, Plan, PlanRow, WayKey, make_plan, nothing_accepted
from .sources import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open backend.

    Attributes:
        backend: The backend.
        row: Its row of the plan.
        plan: The plan.
        spec: The sampler.
        load_ms: Time to open it, ms.
        fallback: The requested backend that could not run, if any.
    """

    backend: Backend
    row: PlanRow
    plan: Plan
    spec: SamplerSpec
    load_ms: float
    fallback: str | None = None

    @property
    def device(self) -> str:
        """Device of the backend."""
        return str(getattr(self.backend, "device", "cpu"))

    def run(
        self, request: Request, batch_size: int, events: Events = SILENT
    ) -> tuple[np.ndarray, tuple[int, ...], dict[str, float]]:
        """Run a request in batches; the noise of a batch is drawn while the previous one runs.

        Returns:
            The images ``(N, *image_shape)`` float32 in data units, the size of each batch, and ``timings``; the noise
            counts only the time that was waited for.
        """
        count = len(request)
        parts = [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        timings = {"load_ms": self.load_ms, "noise_ms": 0.0, "sample_ms": 0.0}
        whole = self.backend if isinstance(self.backend, PartsBackend) else None
        decodes = whole is not None and whole.decodes

        def sampled(sample: Sample) -> Iterator[np.ndarray]:
            inputs = _inputs(request, parts)
            for _, stop in parts:
                began = perf_counter()
                noise, conditioning = next(inputs)
                drawn = perf_counter()
                out = sample(noise, conditioning)
                timings["noise_ms"] += (drawn - began) * 1e3
                timings["sample_ms"] += (perf_counter() - drawn) * 1e3
                events.step("latents" if decodes else "images", stop, count)
                yield out

        def decoded(decode: Callable[[np.ndarray], np.ndarray], latents: np.ndarray) -> Iterator[np.ndarray]:
            for start, stop in parts:
                began = perf_counter()
                out = decode(latents[start:stop])
                timings["decode_ms"] = timings.get("decode_ms", 0.0) + (perf_counter() - began) * 1e3
                events.step("images", stop, count)
                yield out

        if whole is None:
            raw = _join(sampled(self.backend.sample), parts)
        else:  # each part runs all batches, since it may have to be loaded for them
            with whole.sampling() as sample:
                raw = _join(sampled(sample), parts)
            if decodes:
                with whole.decoding() as decode:
                    raw = _join(decoded(decode, raw), parts)
        return raw, tuple(stop - start for start, stop in parts), timings

    def info(self, source: Source, *, batches: tuple[int, ...], timings: dict[str, float]) -> GenerationInfo:
        """Return the description of a run of this backend."""
        return GenerationInfo(
            backend=self.row.backend,
            device=self.device,
            precision=self.row.precision,
            artifact=self.row.artifact,
            sha256=source.sha256(self.row.artifact),
            build_id=source.build_id,
            model=source.status,
            num_inference_steps=self.spec.num_inference_steps,
            batches=batches,
            timings=timings,
            rejected=self.plan.rejected,
            fallback=self.fallback,
        )


@runtime_checkable
class OpensBackends(Protocol):
    """The part of ``Generator`` that measurements and comparisons use, which are below it."""

    def opened(self, num_inference_steps: int | None = None) -> Opened:
        """Return the open backend for a number of steps; None is the default of the generator."""
        ...

    def __call__(
        self,
        num_images: int = 1,
        *,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
    ) -> GeneratorOutput:
        """Generate images; see ``Generator``."""
        ...


def _inputs(
    request: Request, parts: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """Yield noise and conditioning of each part, drawn one part ahead."""
    if len(parts) == 1 or request.noise is not None:
        yield from (request.inputs(*part) for part in parts)
        return
    from concurrent.futures import ThreadPoolExecutor  # not needed for one image, and slow to import

    with ThreadPoolExecutor(1, "scm-noise") as thread:
        ahead = thread.submit(request.inputs, *parts[0])
        for part in parts[1:]:
            ready, ahead = ahead, thread.submit(request.inputs, *part)
            yield ready.result()
        yield ahead.result()


def _join(batches: Iterator[np.ndarray], parts: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the batches as one array; a single one is not copied."""
    if len(parts) == 1:
        return next(batches)
    joined = None
    for (start, stop), batch in zip(parts, batches, strict=True):
        joined = np.empty((parts[-1][1], *batch.shape[1:]), np.float32) if joined is None else joined
        joined[start:stop] = batch
    assert joined is not None, "a request holds at least one image"
    return joined


Fallback = Literal["error", "warn", "allow"]
GOLDEN_TOLERANCE = 1e-3
"""Largest difference from a recorded sample, units of sigma_data, if no parity record allows more. It covers fp32
rounding of other processors and is two orders of magnitude below visible differences."""
GOLDEN_FACTOR = 2.0
"""Factor by which a reduced precision may exceed its recorded difference."""
_LOADS = 3
"""Maximum number of attempts to load a file that changes while it is loaded."""


class Opener:
    """Keeps one open backend per number of steps; thread-safe.

    Args:
        source: The model on disk, at one image size.
        backend: ``"auto"`` or a name.
        precision: ``"auto"`` or a precision.
        device: Passed to the backend.
        fallback: Fallback policy if the choice cannot be loaded.
        num_threads: Passed to the backend.
        trust_engines: Run engines that were not built here.
        turn: See ``Part``; None keeps the parts of the model open.

    Raises:
        ConfigError: If the backend or the precision is unknown.
    """

    def __init__(
        self,
        source: Source,
        backend: str,
        precision: str,
        *,
        device: str | None,
        fallback: Fallback,
        num_threads: int | None,
        trust_engines: bool = False,
        turn: threading.Lock | None = None,
    ) -> None:
        if backend != "auto":
            backend_info(backend)
        if precision not in ("auto", *get_args(Precision)):
            raise ConfigError(
                f"precision is {precision!r}, expected 'auto' or one of {', '.join(get_args(Precision))}."
                f"{nearest_hint(precision, get_args(Precision))}"
            )
        self.source, self._backend, self._precision = source, backend, precision
        self._device, self._num_threads = device, num_threads
        self._fallback: Fallback = fallback
        self._trust_engines, self.turn = trust_engines, turn
        self._decoders: dict[str, Part[Graph]] = {}  # by backend, each for all numbers of steps
        self._opened: dict[int, Opened] = {}
        self._retired: list[Opened] = []
        self._measured: dict[int, Mapping[WayKey, Measured]] = {}
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False

    def at_size(self, size: ImageSize) -> Opener:
        """Return an opener for another image size of the model; itself for its own.

        Raises:
            ConfigError: If the model does not have this size.
        """
        source = self.source.at_size(size)
        if source is self.source:
            return self
        made = Opener(
            source, self._backend, self._precision, device=self._device, fallback=self._fallback,
            num_threads=self._num_threads, trust_engines=self._trust_engines, turn=self.turn,
        )  # fmt: skip
        made._pid, made._closed = self._pid, self._closed
        return made

    def plan(self, steps: int) -> Plan:
        """Return the plan of the open backend, or the plan for opening it."""
        opened = self._opened.get(steps)
        return opened.plan if opened else self._plan(steps, self._backend, self._precision)

    def get(self, steps: int) -> Opened:
        """Return the open backend for this number of steps; open it on first use.

        Raises:
            BackendError: If no accepted backend can be opened.
            ConfigError: If the source lacks the requested artifact.
            BundleError: If an artifact is damaged; there is no fallback for this.
        """
        check_process(self._pid, "generator")  # before the lock, which a thread of the parent process may hold
        with self._lock:
            if self._closed:
                raise BackendFailure("this generator was closed, expected an open one. Open it again.")
            if steps not in self._opened:
                self._opened[steps] = self._open_first(steps)
            return self._opened[steps]

    def open_accepted(self, steps: int) -> list[Opened]:
        """Open every accepted row of the plan; the caller closes them."""
        check_process(self._pid, "generator")
        plan = self.plan(steps)
        opened: list[Opened] = []
        try:
            for row in plan.accepted:
                opened.append(self._open(plan, row, steps))
        except BaseException:
            for each in opened:
                each.backend.close()
            raise
        return opened

    @property
    def opened(self) -> tuple[Opened, ...]:
        """The open backends in the order of opening; empty after ``close``."""
        return () if self._closed or os.getpid() != self._pid else tuple(self._opened.values())

    def remember(self, medians: Mapping[WayKey, Measured], steps: int) -> None:
        """Use these medians, by the rows' keys, in this opener's plans, and store them for later ones on this machine.

        If another row is now the best, it is opened for new calls. Running calls finish on the old backend, which is
        closed with the others.
        """
        remember(
            medians,
            self.source.timed_as,
            num_inference_steps=steps,
            device=self._device,
            num_threads=self._num_threads,
        )
        with self._lock:
            self._measured[steps] = medians
            before = self._opened.get(steps)
            if before is None or before.fallback is not None:
                return
            plan = self._plan(steps, self._backend, self._precision)
            best = plan.accepted[0]
            if best.key == before.row.key:
                self._opened[steps] = replace(before, row=best, plan=plan)
                return
            self._opened[steps] = self._open(plan, best, steps)
            self._retired.append(before)

    def run_goldens(self, all_steps: Sequence[int]) -> None:
        """Run the recorded samples and compare.

        Raises:
            BundleError: If no sample is recorded.
            BackendFailure: If a sample is not reproduced.
        """
        goldens = {}
        if self.source.bundle is not None:
            self.source.check_unchanged(GOLDEN_PATH)
            goldens = self.source.bundle.goldens()
        for steps in all_steps:
            if steps not in goldens:
                raise BundleError(
                    f"{self.source.path} records no sample of {steps} steps, expected one for "
                    "verify='smoke' or 'full'. Use verify='digest', or export the bundle again."
                )
            golden, opened = goldens[steps], self.get(steps)
            labels = None if golden.class_labels is None else golden.class_labels.tolist()
            request = make_example(opened.spec, golden.seeds.tolist(), class_labels=labels)
            images, _, _ = opened.run(request, opened.spec.max_batch)
            worst = float(np.abs(images - golden.images).max()) / opened.spec.sigma_data
            allowed = max([GOLDEN_TOLERANCE, *(_allowed(record) for record in self._records(opened.row, steps))])
            if not worst <= allowed:  # NaN also fails
                raise BackendFailure(
                    f"{opened.row.backend} ({opened.row.artifact}) differs from the recorded sample by "
                    f"{worst:.1e} sigma_data, expected at most {allowed:.1e}. "
                    "Compare it here: scm-export validate"
                )

    def close(self) -> None:
        """Close every backend; in a forked process only drop the references."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            for opened in (*self._opened.values(), *self._retired):
                opened.backend.close()
            self._opened.clear()
            self._retired.clear()
            for decoder in self._decoders.values():
                decoder.close()

    def _records(self, row: PlanRow, steps: int) -> list[ParityRecord]:
        return row.records(self.source.parity, num_inference_steps=steps, device=self._device)

    def _plan(self, steps: int, backend: str, precision: str) -> Plan:
        measured = recall(
            self.source.timed_as,
            num_inference_steps=steps,
            device=self._device,
            num_threads=self._num_threads,
        )
        measured |= self._measured.get(steps, {})
        # Steps the source was not made for run only where the user named a backend that unrolls them:
        # "auto" would otherwise change the backend because of a number.
        unrolled = backend != "auto" and "safetensors" in BACKENDS[backend].opens
        if steps not in self.source.steps and not unrolled:
            self.source.spec(steps, unrolled=False)  # raises with the steps there are
        return make_plan(
            self.source.artifacts,
            num_inference_steps=steps,
            backend=backend,
            precision=precision,
            parity=self.source.parity,
            measured=measured,
            device=self._device,
            host=self._host(),
            sha256=self.source.sha256,
            offload=self.turn is not None,
        )

    def _host(self) -> EngineHost | None:
        """Inspect the GPU and the libraries of this machine only if there are engines."""
        if not any(artifact.engine is not None for artifact in self.source.artifacts):
            return None
        return EngineHost.here(device=self._device, trust_engines=self._trust_engines)

    def _open_first(self, steps: int) -> Opened:
        """Open the best row; with a fallback policy, the best row that can be opened."""
        problems: list[BackendError | ConfigError] = []
        wanted = (self._backend, self._precision)
        for backend, precision in dict.fromkeys([wanted, ("auto", self._precision), ("auto", "auto")]):
            plan = self._plan(steps, backend, precision)
            if not plan.accepted:
                problems.append(nothing_accepted(self.source, plan, steps, backend, precision))
            for row in plan.accepted:
                try:
                    return self._open(plan.choose(row), row, steps, problems)
                except BackendError as exc:
                    problems.append(exc)
                    if self._fallback == "error":
                        others = list(dict.fromkeys(r.backend for r in plan.accepted if r.backend != row.backend))
                        if not others:
                            raise
                        raise type(exc)(
                            f"{str(exc).rstrip('.')}. Nothing else is taken unasked, but {', '.join(others)} can run "
                            "it: name it with backend=, or pass fallback='warn'."
                        ) from exc
            if self._fallback == "error":
                break
        raise problems[0]

    def _open(
        self, plan: Plan, row: PlanRow, steps: int, problems: Sequence[BackendError | ConfigError] = ()
    ) -> Opened:
        start = perf_counter()
        spec = self.source.spec(steps, unrolled=row.num_inference_steps == 0)
        backend = self._load(row, spec)
        load_ms = (perf_counter() - start) * 1e3
        logger.debug("opened %s on %s in %.0f ms: %s", row.artifact, row.backend, load_ms, row.reason)
        fallback = f"{row.backend} ({row.precision}) runs instead: {problems[0]}" if problems else None
        doubts = [fallback] if fallback and self._fallback == "warn" else []
        if any(not record.passed for record in self._records(row, steps)):
            # Only a named backend, which must open so that the comparison can be repeated.
            doubts.append(f"{row.backend} runs {row.artifact}, {row.reason}. Compare it again: scm-export validate")
        for doubt in doubts:
            warnings.warn(doubt, RuntimeWarning, stacklevel=_callers())
        return Opened(backend=backend, row=row, plan=plan, spec=spec, load_ms=load_ms, fallback=fallback)

    def _load(self, row: PlanRow, spec: SamplerSpec) -> Backend:
        """Open an artifact, and the decoder of one that ends in latents."""
        splits = self.source.ends_in_latents(row.artifact)
        if not splits and self.turn is None:
            return self._load_artifact(row, spec)
        own = spec.before_decoder if splits else spec
        sampler = Part(partial(self._load_artifact, row, own), self.turn)
        if splits and row.backend not in self._decoders:
            open_decoder = partial(
                self.source.open_decoder, spec, backend=row.backend, device=self._device,
                num_threads=self._num_threads,
            )  # fmt: skip
            self._decoders[row.backend] = Part(open_decoder, self.turn)
        return PartsBackend(spec, sampler, self._decoders[row.backend] if splits else None)

    def _load_artifact(self, row: PlanRow, spec: SamplerSpec) -> Backend:
        """Open an artifact and check its files against the opened source."""
        for _ in range(_LOADS):
            stamps, backend = self.source.stamps(row.artifact), None
            try:
                with self.source.check_while_loading(row.artifact):
                    self.source.check_graph(row.artifact)
                    backend = open_backend(
                        row.backend, self.source.locate(row.artifact), spec, device=self._device,
                        num_threads=self._num_threads, trust_engines=self._trust_engines,
                        precision=row.precision if row.lowered else None,
                    )  # fmt: skip
            except BundleError:
                if backend is not None:  # weights that were hashed while they were loaded
                    backend.close()
                raise
            if self.source.stamps(row.artifact) == stamps:
                return backend
            backend.close()  # the file was written in the meantime, so the loaded content is unknown
        raise IntegrityError(
            f"{row.artifact} of {self.source.path} was written while it was loaded, {_LOADS} times, expected a model "
            "that stays as it is. Open it again when it is complete."
        )


def _callers() -> int:
    """Return the ``stacklevel`` for a warning that points to the first line outside of scm-sdk."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("scm_sdk."):
        frame, level = frame.f_back, level + 1
    return level


def _allowed(record: ParityRecord) -> float:
    """Return the largest difference expected from a parity record, units of sigma_data."""
    return record.threshold if record.gate == "max_abs" else GOLDEN_FACTOR * record.max_abs


def plan_for(
    source: Source, steps: int, *, backend: str = "auto", precision: str = "auto", num_threads: int | None = None
) -> Plan:
    """Return the plan for a model, without opening it; the arguments are those of ``Opener``."""
    return Opener(source, backend, precision, device=None, fallback="error", num_threads=num_threads).plan(steps)
