"""Backend selection: which backend runs which artifact, and why, as printable rows.

``make_plan`` compares every artifact with every backend that opens its format. ``nothing_accepted`` turns a plan
without an accepted row into one error that names each reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, overload

from .._util.gpu import current_gpu, parse_device
from .._util.lazy import install_command, is_installed
from .._util.processor import BF16_CLASSES, cpu_class
from ..bundle.manifest import Artifact, ParityRecord, describe_way
from ..engines.compatibility import TRUST_VARIABLE, EngineHost, incompatibility_reason
from ..errors import BackendError, BackendUnavailable, ConfigError, IncompatibleEngineError, printable
from ..spec import Precision
from .backends import BACKENDS, BackendInfo, backend_info
from .sources import Source

FP32_CPU_IS_FASTER = frozenset({"avx512_bf16"})
"""Classes of CPUs on which graphs of precision ``fp32-cpu`` beat those of fp32 (``benchmarks/results/winograd-*``): an
unmeasured plan takes them first there."""
WayKey = tuple[str, str, str]
"""Key of a measured latency: backend, artifact path and precision."""


class Measured(NamedTuple):
    """A stored median latency of this machine.

    Attributes:
        ms: Time of one call, ms.
        batch: Images per call.
    """

    ms: float
    batch: int


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One artifact assessed for one backend, in one precision.

    Attributes:
        backend: Name in ``BACKENDS``.
        artifact: Path inside the bundle.
        precision: What it is computed in: the artifact's precision, or a lower one.
        num_inference_steps: Its steps; 0 means any.
        accepted: Whether it may run.
        reason: Why, or why not.
        measured: Median latency remembered from this machine, if there is one.
        chosen: Whether it is the one that runs.
        lowered: Whether the backend computes in a lower precision than the artifact's.
    """

    backend: str
    artifact: str
    precision: Precision
    num_inference_steps: int
    accepted: bool
    reason: str
    measured: Measured | None = None
    chosen: bool = False
    lowered: bool = False

    @property
    def key(self) -> WayKey:
        """Key that is unique among the rows of a plan."""
        return self.backend, self.artifact, self.precision

    @property
    def name(self) -> str:
        """Name for tables: backend and artifact, and the precision if it differs from the artifact's."""
        return describe_way(f"{self.backend}:{self.artifact}", self.precision if self.lowered else "")

    def records(
        self, parity: Iterable[ParityRecord], *, num_inference_steps: int, device: str | None = None
    ) -> list[ParityRecord]:
        """Return this row's parity records for a number of steps; for bf16 on a CPU, those of this class of CPU."""
        there = cpu_class() if BACKENDS[self.backend].needs_cpu_class(self.precision, device) else ""
        wanted = (self.artifact, self.backend, self.precision if self.lowered else "", there)
        return [
            record
            for record in parity
            if (record.artifact, record.backend, record.precision, record.cpu_class) == wanted
            and record.num_inference_steps in (0, num_inference_steps)
        ]


class Plan(Sequence[PlanRow]):
    """All rows, accepted ones first, best first.

    ``str()`` is a table of the rows with the requested number of steps; other rows are counted.

    Args:
        rows: The rows.
        num_inference_steps: The requested number of steps; 0 shows all rows.
    """

    def __init__(self, rows: Sequence[PlanRow], *, num_inference_steps: int = 0) -> None:
        self.rows = tuple(rows)
        self.num_inference_steps = num_inference_steps
        self.accepted = tuple(row for row in self.rows if row.accepted)
        """The accepted rows, best first."""
        self.rejected = tuple(row for row in self.rows if not row.accepted)
        """The rejected rows with their reasons."""

    @property
    def chosen(self) -> PlanRow | None:
        """The row that runs, or None if no row can."""
        return next((row for row in self.rows if row.chosen), None)

    def choose(self, chosen: PlanRow) -> Plan:
        """Return this plan with another chosen row."""
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


def make_plan(
    artifacts: Sequence[Artifact],
    *,
    num_inference_steps: int,
    backend: str = "auto",
    precision: str = "auto",
    parity: Sequence[ParityRecord] = (),
    measured: Mapping[WayKey, Measured] | None = None,
    device: str | None = None,
    host: EngineHost | None = None,
    sha256: Callable[[str], str] = lambda path: "",
    offload: bool = False,
) -> Plan:
    """Decide for every artifact and every backend of its format.

    Args:
        artifacts: What can be run.
        num_inference_steps: The requested number of steps.
        backend: ``"auto"`` or a name in ``BACKENDS``. ``"auto"`` takes only what is the fp32
            reference or has a recorded parity that passed; a name also takes what was never compared or
            failed, and the reason says so, but no precision lower than the artifact's own unless that is named, too.
        precision: ``"auto"`` or the only precision that is taken.
        parity: The recorded comparisons.
        measured: Medians remembered from this machine by backend, artifact path and precision.
        device: The device that was asked for; engines run on GPUs alone.
        host: This machine, for engines; None looks at it where there are engines.
        sha256: Returns the digest of an artifact's file, which decides whether an engine is trusted.
        offload: Whether parts are loaded in turn, for which a checkpoint is too large a part.

    Returns:
        The plan, with the best accepted row chosen.

    Raises:
        ConfigError: If no backend has this name.
    """
    if backend != "auto":
        backend_info(backend)
    if host is None and any(artifact.engine is not None for artifact in artifacts):
        host = EngineHost.here(device=device)

    def engine_incompatibility(artifact: Artifact) -> str | None:
        return _engine_incompatibility(artifact, device, host, sha256(artifact.path))

    rows = [
        _assess(
            name, artifact, computed, num_inference_steps, backend, precision, parity, measured or {},
            engine_incompatibility, device, offload,
        )
        for name, info in BACKENDS.items()
        for artifact in artifacts
        for computed in precisions_of(info, artifact, artifacts)
    ]  # fmt: skip
    accepted = [row for row in rows if row.accepted]
    # Half a measurement decides nothing: a row without a time could be faster or slower than all, and times of two
    # batches cannot be compared.
    times = [row.measured for row in accepted if row.measured is not None]
    if len(times) == len(accepted) and len({time.batch for time in times}) == 1:
        accepted.sort(key=lambda row: row.measured or times[0])
    else:
        # Engines that fit and passed first, because they were built on purpose; those for one kind of GPU before those
        # for several. Then float32; within that the order of BACKENDS.
        kinds = {a.path: a.engine for a in artifacts}
        accepted.sort(
            key=lambda row: (0, len(facts.compute_capabilities)) if (facts := kinds[row.artifact]) else (1, _order(row))
        )
    plan = Plan(accepted + [row for row in rows if not row.accepted], num_inference_steps=num_inference_steps)
    return plan.choose(accepted[0]) if accepted else plan


def precisions_of(info: BackendInfo, artifact: Artifact, artifacts: Iterable[Artifact]) -> tuple[Precision, ...]:
    """Return the precisions that a backend computes an artifact in: its own, then lower ones.

    Where a graph was made in a lower precision, which keeps some of it in float32, that graph is taken for it.
    """
    if artifact.format not in info.opens:
        return ()
    made = {a.precision for a in artifacts if (a.format, a.num_inference_steps) == _kind(artifact)}
    return (artifact.precision, *(low for low in info.computes.get(artifact.precision, ()) if low not in made))


def _kind(artifact: Artifact) -> tuple[str, int]:
    return artifact.format, artifact.num_inference_steps


def _order(row: PlanRow) -> int:
    """Return the place of an unmeasured row among those of graphs and checkpoints."""
    if row.precision == "fp32-cpu" and cpu_class() in FP32_CPU_IS_FASTER:
        return 0
    return 1 if row.precision == "fp32" else 3 if row.lowered else 2


def _assess(
    name: str,
    artifact: Artifact,
    computed: Precision,
    steps: int,
    wanted: str,
    precision: str,
    parity: Sequence[ParityRecord],
    measured: Mapping[WayKey, Measured],
    engine_incompatibility: Callable[[Artifact], str | None],
    device: str | None,
    offload: bool,
) -> PlanRow:
    """Return one row with the first reason to reject it, or the reason to accept it."""
    info = BACKENDS[name]
    row = PlanRow(
        backend=name,
        artifact=artifact.path,
        precision=computed,
        num_inference_steps=artifact.num_inference_steps,
        accepted=False,
        reason="",
        measured=measured.get((name, artifact.path, computed)),
        lowered=computed != artifact.precision,
    )
    records = row.records(parity, num_inference_steps=steps, device=device)
    failed = [r for r in records if not r.passed]
    is_reference = artifact.format == "safetensors" and computed == "fp32"
    by_class = info.needs_cpu_class(computed, device)

    def objections() -> Iterator[str | None]:
        if wanted not in ("auto", name):
            yield f"backend={wanted!r} was asked for"
        if precision not in ("auto", computed):
            yield f"precision={precision!r} was asked for"
        if row.lowered and precision == "auto" and wanted != "auto":
            yield f"the artifact is {artifact.precision}; precision={computed!r} was not asked for"
        if artifact.num_inference_steps not in (0, steps):
            yield f"is a {artifact.num_inference_steps}-step graph, {steps} asked for"
        yield info.unfit.get(artifact.precision)
        if offload and artifact.format == "safetensors":
            yield "offload was asked for, but a checkpoint is loaded whole; use the graphs: backend='onnxruntime'"
        if not is_installed(info.library):
            yield f"{info.library} is not installed: {install_command(info.extra)}"
        if info.runs_engines:
            yield engine_incompatibility(artifact)
        yield _unfit_cpu(row, by_class=by_class, device=device)
        if failed and wanted == "auto":
            yield _failure(failed[0])
        if not records and not is_reference and wanted == "auto":
            where = f" in {computed} on this class of CPU ({cpu_class()})" if by_class else ""
            also = " and the precision" if row.lowered else ""
            yield f"no recorded parity{where}; compare it (scm-export validate) or ask for the backend{also} by name"
        if by_class:  # last, as it loads the library
            yield info.cannot_compute(computed)

    against = next(filter(None, objections()), None)
    reason = _why(row, records, is_reference=is_reference) if against is None else against
    return replace(row, accepted=against is None, reason=reason)


def _unfit_cpu(row: PlanRow, *, by_class: bool, device: str | None) -> str | None:
    """Return why this machine's CPU does not compute in the row's precision, or None."""
    if row.lowered and not by_class:
        return f"device={device!r} was asked for, {row.precision} of this artifact is computed on CPUs"
    if by_class and (here := cpu_class()) not in BF16_CLASSES:
        return f"this CPU ({here}) has no bf16 instructions, expected one of {', '.join(sorted(BF16_CLASSES))}"
    return None


def _engine_incompatibility(artifact: Artifact, device: str | None, host: EngineHost | None, sha256: str) -> str | None:
    """Return the reason against running an engine here, or None."""
    if artifact.engine is None or host is None:
        return "the manifest does not say where this engine runs; build it again: scm-export engine"
    if device is not None and parse_device(device)[0] != "cuda":
        return f"device={device!r} was asked for, engines run on GPUs"
    unfit = incompatibility_reason(
        "tensorrt" if artifact.format == "tensorrt" else "tensorrt_rtx", artifact.engine, host
    )
    if unfit is None and not host.trusts(sha256):
        return (
            "an engine is executable code and this one was not built here; if you trust where it comes from: "
            f"trust_engines=True or {TRUST_VARIABLE}=1"
        )
    return unfit


def _why(row: PlanRow, records: Sequence[ParityRecord], *, is_reference: bool) -> str:
    if is_reference:
        reason = "the fp32 reference"
    elif failed := [record for record in records if not record.passed]:
        reason = f"asked for by name, although {_failure(failed[0])}"
    elif records:
        worst = max(records, key=lambda record: record.max_abs)
        reason = f"parity passed: {worst.finding}"
    else:
        reason = "asked for by name; no recorded parity"
    measured = row.measured
    return reason if measured is None else f"{reason}; measured here: {measured.ms:.2f} ms at batch {measured.batch}"


def _failure(record: ParityRecord) -> str:
    return f"recorded parity failed: {record.finding}"


def nothing_accepted(
    source: Source, plan: Plan, steps: int, backend: str, precision: str
) -> BackendError | ConfigError:
    """Return the error for a plan without an accepted row.

    Args:
        source: The model on disk.
        plan: The plan.
        steps: The requested number of steps.
        backend: The requested backend, or ``"auto"``.
        precision: The requested precision, or ``"auto"``.
    """
    info = BACKENDS.get(backend)
    if info is not None and not is_installed(info.library):
        return BackendUnavailable(
            f"backend {backend!r} needs {info.library}, which is not installed. "
            f"Install it with: {install_command(info.extra)}. See what runs here: scm-export doctor"
        )
    formats = {artifact.format for artifact in source.artifacts}
    rows = [row for row in plan if backend in ("auto", row.backend)]
    fitting = [row for row in rows if row.num_inference_steps in (0, steps) and precision in ("auto", row.precision)]
    by_reason: dict[str, dict[str, None]] = {}  # ordered; an artifact that a backend computes in two precisions once
    for row in fitting or rows:  # only the requested rows are relevant, unless there are none
        by_reason.setdefault(row.reason, {})[f"{row.backend} on {row.artifact}"] = None
    reasons = "; ".join(f"{', '.join(what)}: {reason}" for reason, what in by_reason.items())
    asked = f"backend={backend!r}, precision={precision!r}"
    found = f"{source.path} has nothing that runs {steps} step{'' if steps == 1 else 's'} with {asked}"
    if info is not None and not formats & set(info.opens):
        return ConfigError(
            f"{found}: it holds {', '.join(sorted(formats))}, {backend} opens {', '.join(info.opens)}."
            + (source.cut_note or f" Make it first: scm-export {'engine' if info.runs_engines else 'onnx'}")
        )
    if precision not in ("auto", *(row.precision for row in plan)):
        return ConfigError(
            f"precision {precision!r} is not in {source.path}, expected {describe_precisions(source.artifacts)}. "
            "Choose one of them, or add it: scm-export precision, or scm-export quantize for int8." + source.cut_note
        )
    error: type[BackendError | ConfigError] = ConfigError
    by_class = info is not None and info.needs_cpu_class(precision, None) and bool(fitting)
    if (backend, precision) == ("auto", "auto") or by_class:  # a name takes all that runs here
        error = BackendUnavailable
    elif info is not None and info.runs_engines and any(row.num_inference_steps == steps for row in rows):
        error = BackendUnavailable if current_gpu() is None else IncompatibleEngineError
    return error(f"{found}: {reasons}. Choose one of what is there: scm-export inspect {source.path}.{source.cut_note}")


def describe_precisions(artifacts: Iterable[Artifact]) -> str:
    """Return the precisions of artifacts with their numbers of steps: ``fp32 (any steps), fp16 (1, 2 steps)``."""
    steps: dict[str, set[int]] = {}
    for artifact in artifacts:
        steps.setdefault(artifact.precision, set()).add(artifact.num_inference_steps)
    return ", ".join(
        f"{precision} ({'any number of' if 0 in counts else ', '.join(map(str, sorted(counts)))} steps)"
        for precision, counts in steps.items()
    )
