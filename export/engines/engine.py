"""Build an engine with its record from a graph, with TensorRT or TensorRT-RTX.

The precision is not chosen here. The network is strongly typed: each operator computes in the type of the graph, so
that results about the graph hold for the engine. The kernels are counted afterwards and must match the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.files import sha256_bytes, sha256_file
from scm_sdk._util.gpu import current_gpu
from scm_sdk._util.machine import PeakMemory
from scm_sdk._util.processor import platform_tag
from scm_sdk._util.publish import atomic_folder
from scm_sdk.bundle.engine_record import BUILD_RECORD_NAME, ENGINE_NAME, BuildRecord, EngineTensor
from scm_sdk.bundle.manifest import EngineFacts
from scm_sdk.engines.tensorrt import load_flavor
from scm_sdk.errors import ConfigError, ExportError, IncompatibleEngineError
from scm_sdk.spec import Precision, SamplerSpec

from ..graph.compose import SPEC_KEY
from ..graph.io import data_path_of, read_model
from ..precision.half import PRECISION_KEY
from .builder import Build
from .census import Census, doubts, mismatches, planned_census, take_census
from .options import EngineOptions

if TYPE_CHECKING:
    import onnx_ir as ir


def build_engine(
    graph: Path,
    folder: Path,
    options: EngineOptions,
    *,
    timing_cache: Path | None = None,
    allow_mismatch: bool = False,
    graph_sha256: str = "",
    events: Events = SILENT,
) -> BuildRecord:
    """Build an engine from a sampler graph into ``folder/model.engine`` and ``folder/build.json``.

    The build runs in memory and the folder appears at the end; an interrupted build leaves no files.

    Args:
        graph: A sampler graph of scm-export in any precision.
        folder: Output folder; an existing engine is replaced.
        options: Build options.
        timing_cache: File of measured kernel times; TensorRT only.
        allow_mismatch: Keep an engine whose kernels are not in the graph's precision; the record says so.
        graph_sha256: Digest of the graph, where it was hashed before; see ``graph_digest``.
        events: Receives the steps of the builder's phases; one that raises ends the build.

    Returns:
        The written record.

    Raises:
        BackendUnavailable: If the library is missing or too old, or needs a GPU that is missing.
        ConfigError: If the options do not match the graph.
        ExportError: If the graph cannot be read or built, or the kernels differ from the graph.
        IncompatibleEngineError: If TensorRT is requested for another GPU than that of this machine.
    """
    library = load_flavor(options.flavor, purpose=f"building a {options.flavor} engine")
    model = read_model(graph)
    spec, precision = _identity(model, graph)
    if options.batch[2] > spec.max_batch:
        raise ConfigError(
            f"batch is {options.batch}, but the sampler's largest is {spec.max_batch}. Export it with --max-batch."
        )
    gpu = _check_gpu(options)
    build = Build(library, graph, spec, options, timing_cache, events)
    with PeakMemory() as peak:
        engine = build.run()
    census, planned, odd, unsure = _census(library, build, model, engine)
    if odd and not allow_mismatch:
        raise ExportError(
            f"the engine is not what the graph asks for: {'; '.join(odd)}. Built: {census}. Do not ship it; or, if you "
            "know why, keep it with --allow-mismatch."
        )
    record = BuildRecord(
        flavor=options.flavor,
        facts=EngineFacts(
            library_version=library.__version__,
            compute_capabilities=options.compute_capabilities,
            platform=platform_tag(),
            batch=options.batch,
            hardware_compatibility=options.hardware_compatibility,
            version_compatible=options.version_compatible,
            gpu=gpu,
        ),
        engine_sha256=sha256_bytes(engine),
        engine_bytes=len(engine),
        onnx_sha256=graph_sha256 or graph_digest(graph),
        spec=spec,
        precision=precision,
        inputs=tuple(EngineTensor(name=t.name, dtype=t.dtype, shape=(-1, *t.shape)) for t in spec.inputs),
        outputs=(EngineTensor(name=spec.output_name, dtype="float32", shape=(-1, *spec.image_shape)),),
        options=_plain(options),
        census=_plain({"planned": planned, "built": census, "mismatches": odd, "doubts": unsure}),
        seconds={name: round(value, 3) for name, value in build.seconds.items()},
        peak_memory_bytes=peak.bytes,
        warnings=tuple(build.log.warnings()),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, overwrite=True, marker=BUILD_RECORD_NAME, error=ExportError) as staging:
        (staging / ENGINE_NAME).write_bytes(engine)
        (staging / BUILD_RECORD_NAME).write_bytes(record.to_json())
    return record


def graph_digest(graph: Path) -> str:
    """Return the sha256 of a graph including its external weights."""
    data = data_path_of(graph)
    parts = [sha256_file(graph)] + ([sha256_file(data)] if data.exists() else [])
    return parts[0] if len(parts) == 1 else sha256_bytes("".join(parts).encode())


def _plain(value: object) -> Any:
    """Return a value after a JSON round trip, so that a record equals itself after reading."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _identity(model: ir.Model, graph: Path) -> tuple[SamplerSpec, Precision]:
    text = model.metadata_props.get(SPEC_KEY)
    if text is None:
        raise ExportError(
            f"{graph} has no {SPEC_KEY} in its metadata, expected a sampler graph that scm-export wrote. Adopt a graph "
            "of another tool first: scm-export quantize --from"
        )
    precision: Any = model.metadata_props.get(PRECISION_KEY, "fp32")
    return SamplerSpec.from_json(text), precision


def _check_gpu(options: EngineOptions) -> str:
    """Return the name of the GPU of the build; "" ahead of time."""
    if options.flavor == "tensorrt_rtx":
        return ""
    gpu = current_gpu()
    if gpu is not None and gpu.compute_capability not in options.compute_capabilities:
        raise IncompatibleEngineError(
            f"an engine for compute capability {options.compute_capabilities[0]} was asked for on a {gpu.name} "
            f"({gpu.compute_capability}), expected the same: TensorRT builds on the GPU that runs the engine. Build "
            "there, or use --flavor tensorrt_rtx."
        )
    return gpu.name if gpu is not None else ""


def _census(
    library: Any, build: Build, model: ir.Model, engine: memoryview
) -> tuple[Census | None, Census, list[str], list[str]]:
    """Return the census, the plan, their differences, and the parts that the log does not show."""
    planned, _, _ = planned_census(model, batch_one=build.options.batch[2] == 1)
    census = take_census(model, build.log.kernels)
    tensorrt = build.options.flavor == "tensorrt"
    if census is None and tensorrt:  # with a GPU the engine can be inspected
        runtime = library.Runtime(build.log)  # an engine does not hold a reference to its runtime
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is not None:
            inspector = loaded.create_engine_inspector()
            census = take_census(model, [inspector.get_engine_information(library.LayerInformationFormat.ONELINE)])
    wrong = mismatches(planned, census) if census is not None else []
    unsure = doubts(planned, census) if census is not None else ["no kernel is named, so nothing is known about them"]
    return (census, planned, wrong, unsure) if tensorrt else (census, planned, wrong + unsure, [])
