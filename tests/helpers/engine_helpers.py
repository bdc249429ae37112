"""What tests of engines share: the graph and options to build one from, and the record of one that was built."""

from pathlib import Path
from typing import Any

import msgspec

from scm_sdk.bundle.engine_record import BuildRecord
from scm_sdk.export.engines.options import EngineOptions


def graph(bundle: Path, precision: str) -> Path:
    """Return the 1-step graph of a bundle."""
    return bundle / f"onnx/{precision}/1step/model.onnx"


def options(*capabilities: str, **changes: Any) -> EngineOptions:
    """Return options that fit the U-Net's graphs; TensorRT-RTX for an A10 unless said otherwise."""
    return EngineOptions(**({"compute_capabilities": capabilities or ("8.6",), "batch": (1, 2, 5)} | changes))


def record_of(engine: Path) -> BuildRecord:
    return BuildRecord.from_json(engine.with_name("build.json").read_bytes())


def rewrite(engine: Path, **changes: Any) -> None:
    record = msgspec.structs.replace(record_of(engine), **changes)
    engine.with_name("build.json").write_bytes(record.to_json())
