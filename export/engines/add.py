"""Add engines to a bundle: one per target, precision and number of steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from scm_sdk._util.arguments import checked_names
from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.gpu import current_gpu
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import recipe_of
from scm_sdk.bundle.engine_record import BUILD_RECORD_NAME, ENGINE_NAME, BuildRecord, Flavor
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.engines.compatibility import is_trusted
from scm_sdk.engines.targets import Target, resolve_target, resolve_targets
from scm_sdk.engines.tensorrt import load_flavor
from scm_sdk.errors import BackendUnavailable, ConfigError, IncompatibleEngineError, UnsupportedGraphError
from scm_sdk.spec import CPU_PRECISIONS, Precision

from ..workspace import Workspace, sha256_of
from .cache import cached_engine
from .census import Census
from .options import BuilderOptions, EngineOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, kw_only=True)
class EngineVariant:
    """One engine of a bundle.

    Attributes:
        path: Path inside the bundle.
        precision: Precision of its graph.
        num_inference_steps: Number of steps.
        unchanged: Whether an identical engine existed already.
        cached: Whether it came from the cache.
        record: Build record.
    """

    path: str
    precision: Precision
    num_inference_steps: int
    unchanged: bool
    cached: bool
    record: BuildRecord

    def __str__(self) -> str:
        record = self.record
        built = record.census.get("built")
        census = str(Census(**built)) if built else "kernels unknown"
        how = "unchanged" if self.unchanged else "from the cache" if self.cached else f"{record.seconds['build']:.1f} s"
        odd = "".join(f"; MISMATCH: {text}" for text in record.census.get("mismatches", []))
        odd += "".join(f"; not seen: {text}" for text in record.census.get("doubts", []))
        return (
            f"{self.path}: {record.engine_bytes / 1e6:.1f} MB, {how}, {', '.join(record.facts.compute_capabilities)}, "
            f"batch {'/'.join(map(str, record.facts.batch))}; {census}{odd}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "record": msgspec.to_builtins(self.record)}


class AddOptions(BuilderOptions, total=False):
    """Keywords of ``add_engines`` that ``build_all`` takes, too; ``add_engines`` says what each means."""

    one_for_all: bool
    batch: tuple[int, int, int] | None
    allow_mismatch: bool


@checked_names("add_engines", BuilderOptions)
def add_engines(
    path: str | os.PathLike[str] | Workspace,
    targets: Sequence[Target | str],
    *,
    flavor: Flavor = "tensorrt_rtx",
    precisions: Sequence[Precision] = (),
    steps: Sequence[int] = (),
    one_for_all: bool = False,
    batch: tuple[int, int, int] | None = None,
    allow_mismatch: bool = False,
    skip_unbuildable: bool = False,
    events: Events = SILENT,
    **options: Unpack[BuilderOptions],
) -> list[EngineVariant]:
    """Build engines from the graphs of a bundle and add them to it.

    Each engine is added as soon as it is built, so that an interruption loses at most one build.

    Args:
        path: The bundle, or the workspace that it is open in.
        targets: GPUs, also by name, such as ``"l4"`` or ``"sm_89"``; () with TensorRT is the GPU of this machine.
        flavor: Which library.
        precisions: Graphs to build from; () is all but those for CPUs.
        steps: Only these numbers of steps; () is all.
        one_for_all: One engine that holds all targets, instead of one each; TensorRT-RTX alone.
        batch: Smallest, best and largest; None is 1, 8 at most, and the sampler's largest.
        allow_mismatch: See ``build_engine``.
        skip_unbuildable: Whether to skip an engine that no such GPU could run, or that only another GPU can build, and
            to build the others; else such an engine raises.
        events: Receives each engine, what is skipped, and the steps of each build.
        **options: For the builder; see ``EngineOptions``.

    Raises:
        ConfigError: If the bundle has no such graph, or a target is not the flavor's to build.
        UnsupportedGraphError: If a target cannot compute a precision.
        ExportError: If an engine cannot be built, or is not what its graph asks for.
        BundleError: If the bundle is damaged or cannot be written.
    """
    workspace = Workspace.of(path)
    bundle = workspace.open_to_extend()
    library = load_flavor(flavor, purpose=f"building a {flavor} engine")
    gpus = resolve_targets(targets) if targets else _this_machine(flavor)
    _check_buildable(gpus, flavor)
    groups = _groups(gpus, one_for_all)
    if skip_unbuildable:
        groups = [group for group in groups if not _is_elsewhere(group, flavor, events)]
    jobs = []  # all checks precede the first build
    for graph in _graphs(bundle, precisions, steps):
        for group in groups:
            lacking = [lack for target in group if (lack := target.lacks(graph.precision, flavor))]
            if lacking and not allow_mismatch:
                if not skip_unbuildable:
                    raise UnsupportedGraphError(f"{lacking[0]}. Choose another --precision, or leave this target out.")
                events.skip(f"{graph.precision}, {graph.num_inference_steps} steps: {lacking[0]}")
                continue
            largest = bundle.spec(graph.num_inference_steps).max_batch
            chosen = EngineOptions(
                flavor=flavor,
                compute_capabilities=tuple(target.compute_capability for target in group),
                batch=batch or (1, min(8, largest), largest),
                **options,
            )
            jobs.append((graph, engine_path(flavor, group, graph), chosen))
    made = []
    for graph, engine, chosen in jobs:
        made.append(_add(workspace, graph, engine, chosen, library.__version__, allow_mismatch, events))
        events.result(made[-1])
    return made


def engine_path(flavor: Flavor, group: Sequence[Target], graph: Artifact) -> str:
    """Return the path of an engine in a bundle."""
    sm = "-".join(target.sm for target in group)
    return f"engines/{flavor}-{sm}-{graph.precision}-{graph.num_inference_steps}step/{ENGINE_NAME}"


def _add(
    workspace: Workspace,
    graph: Artifact,
    engine: str,
    options: EngineOptions,
    version: str,
    allow_mismatch: bool,
    events: Events,
) -> EngineVariant:
    bundle = workspace.bundle
    folder = engine.rpartition("/")[0]
    record_path = f"{folder}/{BUILD_RECORD_NAME}"
    recipe = {
        "options": msgspec.to_builtins(options), "source": sha256_of(bundle, graph.path), "library_version": version,
    }  # fmt: skip
    found = None
    if recipe_of(bundle, engine) == msgspec.json.decode(msgspec.json.encode(recipe)):
        found = _acceptable(bundle.file(record_path).read_bytes(), allow_mismatch)
    if found is not None:
        record, cached = found, False
    else:
        # Built before the bundle is changed, so that a killed build leaves no files.
        events.stage(f"build {engine}")
        entry, cached = cached_engine(bundle.file(graph.path), options, allow_mismatch=allow_mismatch, events=events)
        assert entry.record is not None, "cached_engine hashed it against its record"
        record = entry.record
        with workspace.extend(bundle) as draft:
            entry.copy_to(draft.path(folder))
            draft.digests[engine] = record.engine_sha256
            draft.roles[record_path] = "engine"
            draft.add(
                Artifact(
                    path=engine,
                    format=options.flavor,
                    precision=graph.precision,
                    num_inference_steps=graph.num_inference_steps,
                    engine=record.facts,
                    recipe=recipe,
                ),
                [graph.path],
                files=[record_path],
            )
            draft.versions[options.flavor] = version
    return EngineVariant(
        path=engine,
        precision=graph.precision,
        num_inference_steps=graph.num_inference_steps,
        unchanged=found is not None,
        cached=cached,
        record=record,
    )


def _acceptable(data: bytes, allow_mismatch: bool) -> BuildRecord | None:
    """Return the record of an existing engine that was built here and matches its graph, unless that is waived."""
    record = BuildRecord.from_json(data)
    fits = allow_mismatch or not record.census.get("mismatches")
    return record if fits and is_trusted(record.engine_sha256) else None


def check_targets(targets: Sequence[Target], flavor: Flavor) -> None:
    """Refuse what cannot be built before anything long begins.

    Raises:
        ConfigError: If a flavor does not build for a target.
        BackendUnavailable: If its library is not here, or it needs a GPU and there is none.
    """
    _check_buildable(targets, flavor)
    load_flavor(flavor, purpose=f"building {flavor} engines")
    if flavor == "tensorrt" and targets and current_gpu() is None:
        raise BackendUnavailable(
            f"engines for {targets[0].name} were asked of TensorRT, expected its GPU: it builds where the engine runs, "
            "and no GPU is here. Build there, or use --flavor tensorrt_rtx."
        )


def _check_buildable(targets: Sequence[Target], flavor: Flavor) -> None:
    for target in targets:
        if reason := target.unbuildable(flavor):
            raise ConfigError(f"{reason}. Build with --flavor tensorrt on such a GPU, or leave this target out.")


def _is_elsewhere(group: Sequence[Target], flavor: Flavor, events: Events) -> bool:
    """Return and report whether TensorRT would need another GPU than that of this machine."""
    gpu = current_gpu()
    if flavor != "tensorrt" or gpu is None or any(t.compute_capability == gpu.compute_capability for t in group):
        return False
    names = ", ".join(f"{target.name} ({target.compute_capability})" for target in group)
    events.skip(
        f"{names}: TensorRT builds on the GPU that runs the engine, this {gpu.name} is {gpu.compute_capability}"
    )
    return True


def _graphs(bundle: Bundle, precisions: Sequence[Precision], steps: Sequence[int]) -> list[Artifact]:
    graphs = [a for a in bundle.artifacts(format="onnx") if a.precision not in CPU_PRECISIONS]
    found = [
        a
        for a in graphs
        if (not precisions or a.precision in precisions) and (not steps or a.num_inference_steps in steps)
    ]
    missing = set(precisions) - {a.precision for a in found}
    if missing or not found:
        there = ", ".join(sorted({f"{a.precision} with {a.num_inference_steps} steps" for a in graphs})) or "none"
        wanted = ", ".join(sorted(missing)) or f"{list(steps)} steps"
        raise ConfigError(
            f"{bundle.path} has these graphs: {there}; expected {wanted}. Make them first: scm-export precision, "
            f"scm-export quantize.{bundle.manifest.cut_note}"
        )
    return found


def _groups(targets: Sequence[Target], one_for_all: bool) -> list[tuple[Target, ...]]:
    return [tuple(targets)] if one_for_all else [(target,) for target in targets]


def _this_machine(flavor: Flavor) -> tuple[Target, ...]:
    gpu = current_gpu()
    if gpu is None:
        raise IncompatibleEngineError(
            f"no target was given and this machine has no GPU, expected one of them for {flavor}. Name targets, for "
            "example --target l4; see: scm-export targets"
        )
    return (resolve_target(gpu.compute_capability),)
