"""Which backend runs which artifact, and why: a plan that can be printed.

Every artifact of a bundle is held against every backend that opens its kind; each pair is one row, accepted
or rejected with its reason, and the accepted rows are ranked. ``Generator`` opens the first and shows the rest.

Rank: what was measured on this machine (``Generator.benchmark`` remembers it) when every accepted
row was measured; otherwise engines that fit this GPU, then fp32, then the order of ``BACKENDS``.
Nothing here imports a backend's library: its presence is looked up, not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ._lazy import install_command, is_installed
from .engine_fit import TRUST_VARIABLE, EngineHost, why_not
from .errors import ConfigError
from .forked import survive_fork
from .manifest import Artifact, ParityRecord
from .plan import Measured, Plan, PlanRow
from .spec import SamplerSpec

__all__ = ["BACKENDS", "Backend", "BackendInfo", "Plan", "PlanRow", "backend_info", "make_plan", "open_backend"]


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
        unfit: The precisions among them that it must not run, each with the reason.
        one_at_a_time: Whether calls from several threads wait for one another.
    """

    module: str
    library: str
    extra: str
    opens: tuple[str, ...]
    unfit: Mapping[str, str] = field(default_factory=dict)
    one_at_a_time: bool = False

    def takes(self, artifact: Artifact) -> bool:
        """Whether it can open an artifact, and may."""
        return artifact.format in self.opens and artifact.precision not in self.unfit

    @property
    def runs_engines(self) -> bool:
        """Whether it opens engines, which are code and fit some machines only."""
        return self.module == _TENSORRT


_TENSORRT = "scm_sdk.runtimes.trt_backend"
BACKENDS: dict[str, BackendInfo] = {  # in order of preference where nothing was measured
    "tensorrt": BackendInfo(module=_TENSORRT, library="tensorrt", extra="tensorrt", opens=("tensorrt",)),
    "tensorrt_rtx": BackendInfo(
        module=_TENSORRT, library="tensorrt_rtx", extra="tensorrt-rtx", opens=("tensorrt_rtx",)
    ),
    "onnxruntime": BackendInfo(
        module="scm_sdk.runtimes.ort_backend", library="onnxruntime", extra="onnxruntime", opens=("onnx",)
    ),
    "openvino": BackendInfo(
        module="scm_sdk.runtimes.openvino_backend",
        library="openvino",
        extra="openvino",
        opens=("onnx",),
        unfit={
            # It would fuse them into signed int8 kernels, which saturate on a CPU without VNNI: 10 dB measured.
            "int8": "int8 graphs are for engines; for a CPU: scm-export quantize --to int8-cpu",
            # In float32 all the same, and in 2026.4 a float16 product cast before it is added may come out wrong.
            **dict.fromkeys(("fp16", "bf16"), "half precision is for GPUs; OpenVINO computes in float32: take fp32"),
        },
    ),
    "torch": BackendInfo(
        module="scm_sdk.runtimes.torch_backend",
        library="torch",
        extra="torch",
        opens=("safetensors",),
        one_at_a_time=True,
    ),
}


def open_backend(
    name: str,
    artifact_path: Path,
    spec: SamplerSpec,
    *,
    device: str | None = None,
    num_threads: int | None = None,
    trust_engines: bool = False,
) -> Backend:
    """Open one artifact with one backend, without a bundle or a plan.

    ``trust_engines`` lets an engine run code on the host; see ``Generator.from_pretrained``.

    Raises:
        ConfigError: If no backend has this name.
        BackendUnavailable: If its library or the device is not here.
        BundleError: If the artifact is missing, damaged or not what ``spec`` says.
    """
    info = backend_info(name)
    options: dict[str, Any] = {"device": device, "num_threads": num_threads}
    if info.runs_engines:
        options["trust_engines"] = trust_engines
    backend: Backend = import_module(info.module).open_backend(artifact_path, spec, **options)
    survive_fork(backend)
    return backend


def backend_info(name: str) -> BackendInfo:
    """Look up a backend, or raise ``ConfigError`` with the names there are."""
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}, expected 'auto' or one of {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[name]


def make_plan(
    artifacts: Sequence[Artifact],
    *,
    num_inference_steps: int,
    backend: str = "auto",
    precision: str = "auto",
    parity: Sequence[ParityRecord] = (),
    measured: Mapping[tuple[str, str], Measured] | None = None,
    device: str | None = None,
    host: EngineHost | None = None,
    sha256: Callable[[str], str] = lambda path: "",
) -> Plan:
    """Hold every artifact against every backend that opens its kind.

    Args:
        artifacts: What can be run.
        num_inference_steps: The steps that are asked for.
        backend: ``"auto"`` or a name in ``BACKENDS``. ``"auto"`` takes only what is the fp32
            reference or has a recorded parity that passed; a name also takes what was never compared or
            failed, and the reason says so.
        precision: ``"auto"`` or the only precision that is taken.
        parity: The recorded comparisons.
        measured: Medians remembered from this machine by (backend, artifact path).
        device: The device that was asked for; engines run on GPUs alone.
        host: This machine, for engines; None looks at it where there are engines.
        sha256: Digest of an artifact's file, which says whether an engine is trusted.

    Returns:
        The plan, with the best accepted row chosen.

    Raises:
        ConfigError: If no backend has this name.
    """
    if backend != "auto":
        backend_info(backend)
    if host is None and any(artifact.engine is not None for artifact in artifacts):
        host = EngineHost.here(device=device)

    def engine_doubt(artifact: Artifact) -> str | None:
        return _engine_doubt(artifact, device, host, sha256(artifact.path))

    rows = [
        _judge(name, artifact, num_inference_steps, backend, precision, parity, measured or {}, engine_doubt)
        for name, info in BACKENDS.items()
        for artifact in artifacts
        if artifact.format in info.opens
    ]
    accepted = [row for row in rows if row.accepted]
    # Half a measurement decides nothing: a row without a time could be faster or slower than all, and times of two
    # batches cannot be compared.
    times = [row.measured for row in accepted if row.measured is not None]
    if len(times) == len(accepted) and len({time.batch for time in times}) == 1:
        accepted.sort(key=lambda row: row.measured or times[0])
    else:
        # Engines that fit and passed first: whoever built them wants them; those for one kind of GPU before those
        # for several. Then fp32; within that the order of BACKENDS.
        kinds = {a.path: a.engine for a in artifacts}
        accepted.sort(
            key=lambda row: (
                (0, len(facts.compute_capabilities)) if (facts := kinds[row.artifact]) else (1, row.precision != "fp32")
            )
        )
    plan = Plan(accepted + [row for row in rows if not row.accepted], num_inference_steps=num_inference_steps)
    return plan.choose(accepted[0]) if accepted else plan


def _judge(
    name: str,
    artifact: Artifact,
    steps: int,
    wanted: str,
    precision: str,
    parity: Sequence[ParityRecord],
    measured: Mapping[tuple[str, str], Measured],
    engine_doubt: Callable[[Artifact], str | None],
) -> PlanRow:
    """One row: the first thing that speaks against the pair, or what speaks for it."""
    info = BACKENDS[name]
    records = [r for r in parity if r.artifact == artifact.path and r.backend == name]
    failed = [r for r in records if not r.passed]
    against = None
    if wanted not in ("auto", name):
        against = f"backend={wanted!r} was asked for"
    elif precision not in ("auto", artifact.precision):
        against = f"precision={precision!r} was asked for"
    elif artifact.num_inference_steps not in (0, steps):
        against = f"is a {artifact.num_inference_steps}-step graph, {steps} asked for"
    elif artifact.precision in info.unfit:
        against = info.unfit[artifact.precision]
    elif not is_installed(info.library):
        against = f"{info.library} is not installed: {install_command(info.extra)}"
    elif info.runs_engines and (unfit := engine_doubt(artifact)) is not None:
        against = unfit
    elif failed and wanted == "auto":
        against = _failure(failed[0])
    elif not records and not _is_reference(artifact) and wanted == "auto":
        against = "no recorded parity; compare it (scm-export validate) or ask for the backend by name"
    if against is None:
        reason = _why(artifact, records, measured.get((name, artifact.path)))
    return PlanRow(
        backend=name,
        artifact=artifact.path,
        precision=artifact.precision,
        num_inference_steps=artifact.num_inference_steps,
        accepted=against is None,
        reason=reason if against is None else against,
        measured=measured.get((name, artifact.path)),
    )


def _engine_doubt(artifact: Artifact, device: str | None, host: EngineHost | None, sha256: str) -> str | None:
    """Return what speaks against running an engine here, or None."""
    if artifact.engine is None or host is None:
        return "the manifest does not say where this engine runs; build it again: scm-export engine"
    if device is not None and device.partition(":")[0] != "cuda":
        return f"device={device!r} was asked for, engines run on GPUs"
    unfit = why_not("tensorrt" if artifact.format == "tensorrt" else "tensorrt_rtx", artifact.engine, host)
    if unfit is None and not host.trusts(sha256):
        return (
            "an engine is executable code and this one was not built here; if you trust where it comes from: "
            f"trust_engines=True or {TRUST_VARIABLE}=1"
        )
    return unfit


def _why(artifact: Artifact, records: Sequence[ParityRecord], measured: Measured | None) -> str:
    if _is_reference(artifact):
        reason = "the fp32 reference"
    elif failed := [record for record in records if not record.passed]:
        reason = f"asked for by name, although {_failure(failed[0])}"
    elif records:
        worst = max(records, key=lambda record: record.max_abs)
        reason = f"parity passed: {worst.finding}"
    else:
        reason = "asked for by name; no recorded parity"
    return reason if measured is None else f"{reason}; measured here: {measured.ms:.2f} ms at batch {measured.batch}"


def _failure(record: ParityRecord) -> str:
    return f"recorded parity failed: {record.finding}"


def _is_reference(artifact: Artifact) -> bool:
    return artifact.format == "safetensors" and artifact.precision == "fp32"
