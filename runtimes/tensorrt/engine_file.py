"""Checks of an engine file before its library reads it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from scm_sdk._util.files import sha256_bytes
from scm_sdk._util.lazy import install_command
from scm_sdk.bundle.engine_record import BUILD_RECORD_NAME, BuildRecord
from scm_sdk.engines.compatibility import EngineHost, incompatibility_reason, rebuild_command
from scm_sdk.engines.tensorrt import EXTRAS
from scm_sdk.errors import BackendUnavailable, IncompatibleEngineError, IntegrityError
from scm_sdk.spec import SamplerSpec

from ..base import check_artifact


def read_engine(path: Path, spec: SamplerSpec, host: EngineHost) -> tuple[BuildRecord, bytes]:
    """Return the record and the bytes of an engine after all checks that do not need its library.

    Args:
        path: The engine; its record is in the same folder.
        spec: The sampler in the manifest.
        host: This machine.

    Raises:
        IntegrityError: If a file is missing, altered or truncated, or belongs to another sampler.
        SchemaError: If the record cannot be read.
        BackendUnavailable: If its library or a GPU is missing.
        IncompatibleEngineError: If it was built for another system, version or GPU.
    """
    check_artifact(path)
    record = _read_record(path)
    if (size := path.stat().st_size) != record.engine_bytes:
        raise IntegrityError(
            f"{path} has {size} bytes, expected {record.engine_bytes}: it was cut short. {rebuild(record)}"
        )
    _check_spec(path, record, spec)
    if (reason := incompatibility_reason(record.flavor, record.facts, host)) is not None:
        if host.versions.get(record.flavor) is None:
            hint = install_command(EXTRAS[record.flavor])
            raise BackendUnavailable(f"{path}: {reason}, expected {record.facts.library_version}. Install it: {hint}")
        if host.gpu is None and reason == host.no_gpu:
            raise BackendUnavailable(
                f"{path}: {reason}, expected one of compute capability {', '.join(record.facts.compute_capabilities)}. "
                "Use backend='onnxruntime' or 'torch' here; see: scm-export doctor"
            )
        raise IncompatibleEngineError(f"{path} was {reason}")
    engine = path.read_bytes()
    if sha256_bytes(engine) != record.engine_sha256:
        raise IntegrityError(
            f"{path} is not the engine that {BUILD_RECORD_NAME} describes: it was altered. {rebuild(record)}"
        )
    return record, engine


def rebuild(record: BuildRecord | None = None) -> str:
    """Return the advice for errors about a wrong engine."""
    return f"Build it again: {rebuild_command(record.flavor)}" if record else "Build it again: scm-export engine"


def _read_record(path: Path) -> BuildRecord:
    beside = path.with_name(BUILD_RECORD_NAME)
    try:
        return BuildRecord.from_json(beside.read_bytes())
    except OSError as exc:
        raise IntegrityError(
            f"{beside} cannot be read: {exc.strerror}. Expected it next to the engine. {rebuild()}"
        ) from exc


def _check_spec(path: Path, record: BuildRecord, spec: SamplerSpec) -> None:
    own, wanted = (msgspec.structs.replace(s, max_batch=1) for s in (record.spec, spec))
    if own != wanted:
        names = [name for name in own.__struct_fields__ if getattr(own, name) != getattr(wanted, name)]
        raise IntegrityError(
            f"{path} is an engine of another sampler: {', '.join(names)} differ from the manifest's. {rebuild(record)}"
        )
