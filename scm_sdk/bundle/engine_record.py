"""``build.json``: the record of an engine, written by its builder and read before the engine is loaded.

An engine is executable code, which its library does not check. The record holds everything that can be checked before
the engine is deserialized.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .._util.json_struct import JsonFile
from ..errors import SchemaError
from ..spec import Precision, SamplerSpec
from .manifest import EngineFacts

BUILD_RECORD_NAME = "build.json"
ENGINE_NAME = "model.engine"
SCHEMA_VERSION = 1

Flavor = Literal["tensorrt", "tensorrt_rtx"]


class EngineTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input or output of an engine.

    Attributes:
        name: Its name.
        dtype: ``float32`` or ``int64``.
        shape: Its shape, axis 0 the batch, -1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class BuildRecord(JsonFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Build and properties of an engine.

    Attributes:
        schema_version: Version of this schema.
        flavor: The library that built it and must run it.
        facts: GPUs, platform and library version that it runs on.
        engine_sha256: Digest of the engine file.
        engine_bytes: Size of the engine file.
        onnx_sha256: Digest of the source graph, including external data.
        spec: The sampler.
        precision: Precision of the graph.
        inputs: Its inputs in the graph's order.
        outputs: Its outputs.
        options: Options of the builder, JSON values.
        census: Fused kernels by kind and type from the build log, with the expected counts, the differences
            (``mismatches``) and the parts that the log does not show (``doubts``).
        seconds: Wall time of each stage.
        peak_memory_bytes: Peak resident memory of the process during the build, including earlier allocations; 0 if
            the system does not report it.
        warnings: Warnings of the builder, each text once.
    """

    TITLE = BUILD_RECORD_NAME
    REMEDY = "Build the engine again: scm-export engine"

    schema_version: int = SCHEMA_VERSION
    flavor: Flavor = msgspec.field(name="flavour")  # as records spell it
    facts: EngineFacts
    engine_sha256: str
    engine_bytes: int
    onnx_sha256: str
    spec: SamplerSpec
    precision: Precision
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    census: dict[str, Any] = msgspec.field(default_factory=dict)
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    peak_memory_bytes: int = 0
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: bytes) -> BuildRecord:
        """Parse a record.

        Raises:
            SchemaError: If it cannot be read or has a newer schema.
        """
        record = super().from_json(data)
        if record.schema_version != SCHEMA_VERSION:
            raise SchemaError(
                f"{BUILD_RECORD_NAME} has schema version {record.schema_version}, this scm-sdk reads "
                f"{SCHEMA_VERSION}. {cls.REMEDY}"
            )
        return record
