"""Which backend runs which artifact, and why: a plan that can be printed.

Every artifact of a bundle is held against every backend; each pair is one row, accepted or rejected
with its reason, and the accepted rows are ranked. ``Generator`` opens the first and shows the rest.

Rank: what was measured on this machine (``Generator.benchmark`` remembers it) when every accepted
row was measured; otherwise the order of ``BACKENDS``, and fp32 before the other precisions.
Nothing here imports a backend's library: its presence is looked up, not tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np

from .errors import ConfigError
from .manifest import Artifact, ParityRecord
from .spec import SamplerSpec


@runtime_checkable
class Backend(Protocol):
    """Something that turns noise into images. Three members, nothing else.

    A protocol, not a base class: a test double or a customer's own runtime fits without importing
    us. Opening loads the artifact and takes memory; ``close`` gives it back and may be called twice.
    ``sample`` may be called from many threads at once; a backend whose library does not allow that
    takes its own lock. ``name`` and ``device`` are used in reports when they are there.
    """

    spec: SamplerSpec

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the whole sampler once.

        Args:
            noise: Standard normal, one (B, *sample_shape) float32 array per step.
            conditioning: The tensors of ``spec.conditioning_inputs`` by name, (B, *shape).

        Returns:
            (B, *image_shape) float32, data units, not clipped; owned by the caller.

        Raises:
            ShapeError: If an input does not fit ``spec``.
            BackendFailure: If the library raised, or the backend is closed.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """One line of ``BACKENDS``: where a backend lies and what it needs.

    Attributes:
        module: The module with ``open_backend(artifact_path, spec, *, device, num_threads)``.
        library: Import name of what it runs on.
        extra: The extra of this package that brings the library.
        opens: The artifact formats it can open.
    """

    module: str
    library: str
    extra: str
    opens: tuple[str, ...]


BACKENDS: dict[str, BackendInfo] = {  # in order of preference where nothing was measured
    "onnxruntime": BackendInfo(
        module="scm_sdk.runtimes.ort_backend", library="onnxruntime", extra="onnxruntime", opens=("onnx",)
    ),
    "torch": BackendInfo(
        module="scm_sdk.runtimes.torch_backend", library="torch", extra="torch", opens=("safetensors",)
    ),
}


def open_backend(
    name: str,
    artifact_path: Path,
    spec: SamplerSpec,
    *,
    device: str | None = None,
    num_threads: int | None = None,
) -> Backend:
    """Open one artifact with one backend, without a bundle or a plan.

    Raises:
        ConfigError: If no backend has this name.
        BackendUnavailable: If its library or the device is not here.
        BundleError: If the artifact is missing, damaged or not what ``spec`` says.
    """
    module = import_module(backend_info(name).module)
    backend: Backend = module.open_backend(artifact_path, spec, device=device, num_threads=num_threads)
    return backend


def backend_info(name: str) -> BackendInfo:
    """Look up a backend, or raise ``ConfigError`` with the names there are."""
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}, expected 'auto' or one of {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[name]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One artifact held against one backend.

    Attributes:
        backend: Name in ``BACKENDS``.
        artifact: Path inside the bundle.
        precision: The precision that lies in the artifact.
        num_inference_steps: Its steps; 0 means any.
        accepted: Whether it may run.
        reason: Why, or why not.
        measured_ms: Median latency at batch 1 remembered from this machine, if there is one.
        chosen: Whether it is the one that runs.
    """

    backend: str
    artifact: str
    precision: str
    num_inference_steps: int
    accepted: bool
    reason: str
    measured_ms: float | None = None
    chosen: bool = False


class Plan(Sequence[PlanRow]):
    """Every row, the accepted ones first and best first. ``str()`` is a table."""

    def __init__(self, rows: Sequence[PlanRow]) -> None:
        self.rows = tuple(rows)

    @property
    def accepted(self) -> tuple[PlanRow, ...]:
        """The rows that may run, best first."""
        return tuple(row for row in self.rows if row.accepted)

    @property
    def rejected(self) -> tuple[PlanRow, ...]:
        """The rows that may not, with their reasons."""
        return tuple(row for row in self.rows if not row.accepted)

    @property
    def chosen(self) -> PlanRow | None:
        """The row that runs, or None when nothing can."""
        return next((row for row in self.rows if row.chosen), None)

    def choose(self, chosen: PlanRow) -> Plan:
        """Return this plan with another row as the chosen one."""
        rows = [replace(row, chosen=False) for row in self.rows]
        at = self.rows.index(chosen)
        rows[at] = replace(rows[at], chosen=True)
        return Plan(rows)

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
        for row in self.rows:
            mark, verdict = "*" if row.chosen else "", "accepted" if row.accepted else "rejected"
            steps = str(row.num_inference_steps or "any")
            table.append((mark, row.backend, row.artifact, row.precision, steps, verdict, row.reason))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain data for JSON."""
        return [asdict(row) for row in self.rows]


def make_plan(
    artifacts: Sequence[Artifact],
    *,
    num_inference_steps: int,
    backend: str = "auto",
    precision: str = "auto",
    parity: Sequence[ParityRecord] = (),
    measured_ms: Mapping[tuple[str, str], float] | None = None,
) -> Plan:
    """Hold every artifact against every backend.

    Args:
        artifacts: What can be run.
        num_inference_steps: The steps that are asked for.
        backend: ``"auto"`` or a name in ``BACKENDS``. ``"auto"`` takes only what is the fp32
            reference or has a recorded parity that passed; a name also takes what was never compared or
            failed, and the reason says so.
        precision: ``"auto"`` or the only precision that is taken.
        parity: The recorded comparisons.
        measured_ms: Medians remembered from this machine by (backend, artifact path).

    Returns:
        The plan, with the best accepted row chosen.

    Raises:
        ConfigError: If no backend has this name.
    """
    if backend != "auto":
        backend_info(backend)
    rows = [
        _judge(name, artifact, num_inference_steps, backend, precision, parity, measured_ms or {})
        for name in BACKENDS
        for artifact in artifacts
    ]
    accepted = [row for row in rows if row.accepted]
    times = [row.measured_ms for row in accepted if row.measured_ms is not None]
    # Half a measurement decides nothing: a row without a time could be faster or slower than all.
    if len(times) == len(accepted):
        accepted.sort(key=lambda row: row.measured_ms or 0.0)
    else:
        accepted.sort(key=lambda row: row.precision != "fp32")  # stable: within a precision the order of BACKENDS
    plan = Plan(accepted + [row for row in rows if not row.accepted])
    return plan.choose(accepted[0]) if accepted else plan


def _judge(
    name: str,
    artifact: Artifact,
    steps: int,
    wanted: str,
    precision: str,
    parity: Sequence[ParityRecord],
    measured_ms: Mapping[tuple[str, str], float],
) -> PlanRow:
    """One row: the first thing that speaks against the pair, or what speaks for it."""
    info = BACKENDS[name]
    records = [r for r in parity if r.artifact == artifact.path and r.backend == name]
    failed = [r for r in records if not r.passed]
    against = None
    if artifact.format not in info.opens:
        against = f"opens {' or '.join(info.opens)}, not {artifact.format}"
    elif wanted not in ("auto", name):
        against = f"backend={wanted!r} was asked for"
    elif precision not in ("auto", artifact.precision):
        against = f"precision={precision!r} was asked for"
    elif artifact.num_inference_steps not in (0, steps):
        against = f"is a {artifact.num_inference_steps}-step graph, {steps} asked for"
    elif find_spec(info.library) is None:
        against = f"{info.library} is not installed: pip install 'scm-sdk[{info.extra}]'"
    elif failed and wanted == "auto":
        against = _failure(failed[0])
    elif not records and not _is_reference(artifact) and wanted == "auto":
        against = "no recorded parity; compare it (scm-export validate) or ask for the backend by name"
    if against is None:
        reason = _why(artifact, records, measured_ms.get((name, artifact.path)))
    return PlanRow(
        backend=name,
        artifact=artifact.path,
        precision=artifact.precision,
        num_inference_steps=artifact.num_inference_steps,
        accepted=against is None,
        reason=reason if against is None else against,
        measured_ms=measured_ms.get((name, artifact.path)),
    )


def _why(artifact: Artifact, records: Sequence[ParityRecord], measured: float | None) -> str:
    if _is_reference(artifact):
        reason = "the fp32 reference"
    elif failed := [record for record in records if not record.passed]:
        reason = f"asked for by name, although {_failure(failed[0])}"
    elif records:
        worst = max(records, key=lambda record: record.max_abs)
        reason = f"parity passed: {worst.finding}"
    else:
        reason = "asked for by name; no recorded parity"
    return reason if measured is None else f"{reason}; measured here: {measured:.2f} ms at batch 1"


def _failure(record: ParityRecord) -> str:
    return f"recorded parity failed: {record.finding}"


def _is_reference(artifact: Artifact) -> bool:
    return artifact.format == "safetensors" and artifact.precision == "fp32"
