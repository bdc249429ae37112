"""Why nothing of a model may run here, as one error that names each reason."""

from __future__ import annotations

from collections.abc import Iterable

from ._lazy import install_command, is_installed
from .dispatch import BACKENDS
from .errors import BackendError, BackendUnavailable, ConfigError, IncompatibleEngineError
from .gpu import current_gpu
from .manifest import Artifact
from .plan import Plan
from .sources import Source


def nothing_accepted(
    source: Source, plan: Plan, steps: int, backend: str, precision: str
) -> BackendError | ConfigError:
    """Return the error that says why a plan accepts nothing.

    Args:
        source: The model on disk.
        plan: The plan.
        steps: The number of steps that was asked for.
        backend: The backend that was asked for, or ``"auto"``.
        precision: The precision that was asked for, or ``"auto"``.
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
    by_reason: dict[str, list[str]] = {}
    for row in fitting or rows:  # what was not asked for says nothing, unless there is nothing else
        by_reason.setdefault(row.reason, []).append(f"{row.backend} on {row.artifact}")
    reasons = "; ".join(f"{', '.join(what)}: {reason}" for reason, what in by_reason.items())
    asked = f"backend={backend!r}, precision={precision!r}"
    found = f"{source.path} has nothing that runs {steps} step{'' if steps == 1 else 's'} with {asked}"
    if info is not None and not formats & set(info.opens):
        return ConfigError(
            f"{found}: it holds {', '.join(sorted(formats))}, {backend} opens {', '.join(info.opens)}."
            + (source.cut_note or f" Make it first: scm-export {'engine' if info.runs_engines else 'onnx'}")
        )
    if precision not in ("auto", *(artifact.precision for artifact in source.artifacts)):
        return ConfigError(
            f"precision {precision!r} is not in {source.path}, expected {describe_precisions(source.artifacts)}. "
            "Choose one of them, or add it: scm-export precision, or scm-export quantize for int8." + source.cut_note
        )
    error: type[BackendError | ConfigError] = ConfigError
    if (backend, precision) == ("auto", "auto"):
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
