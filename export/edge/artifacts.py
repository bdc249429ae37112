"""Add artifacts of edge runtimes to a bundle, each with the record of what made it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.lazy import installed_version, require
from scm_sdk._version import __version__
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle, open_to_extend, recipe_of
from scm_sdk.bundle.manifest import Artifact, files_of
from scm_sdk.errors import ConfigError
from scm_sdk.spec import Precision

from ..graph.io import data_path_of
from .converters import quiet
from .runtimes import BATCH, EdgeRuntime, EdgeSource, edge_runtime

_DOUBLED = 1.5
"""Size of an artifact, as a multiple of its graph's, from which on weights are said to be stored more than once."""
_STRUCTURE = 2**20
"""Bytes. What an artifact holds in addition to weights is not larger."""


@dataclass(frozen=True, kw_only=True)
class EdgeArtifact:
    """One artifact of an edge runtime.

    Attributes:
        path: Its path inside the bundle.
        runtime: Which runtime.
        precision: Its precision.
        num_inference_steps: Its steps.
        bytes: Size of its files.
        unchanged: Whether it was there already and would come out the same.
        notes: What else a person should know.
    """

    path: str
    runtime: str
    precision: Precision
    num_inference_steps: int
    bytes: int
    unchanged: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        unchanged = ", unchanged" if self.unchanged else ""
        return "\n    ".join([f"{self.path}: {self.bytes / 1e6:.1f} MB{unchanged}", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dict(vars(self))


def add_edge(
    path: str | os.PathLike[str],
    runtime: str,
    *,
    precisions: Sequence[Precision] = (),
    steps: Sequence[int] = (),
    events: Events = SILENT,
) -> list[EdgeArtifact]:
    """Convert a bundle's samplers for an edge runtime and add them to the bundle.

    Each artifact is added as soon as it is made: what was done before an interruption stays. One that is there and
    would come out the same is left unchanged.

    Args:
        path: The bundle.
        runtime: A name in ``runtimes.RUNTIMES``.
        precisions: Precisions of the artifacts; () is fp32.
        steps: Only these numbers of steps; () is all.
        events: Receives each conversion as a stage, and each artifact as a result.

    Raises:
        BackendUnavailable: If a library of the runtime is not installed.
        ConfigError: If the runtime has no such precision, or the bundle nothing to convert.
        ExportError: If the runtime's converter fails, or what it wrote does not compute the recorded samples.
        BundleError: If the bundle is damaged or cannot be written.
    """
    info = edge_runtime(runtime)
    with quiet():
        for library in info.libraries:
            require(library, extra=info.extra, purpose=f"exporting to {info.title}")
    bundle = open_to_extend(path)
    bundle.check_not_split(f"an export to {info.title}")
    sources = [
        _source(bundle, info, precision, count)
        for precision in precisions or ("fp32",)
        for count in _steps(bundle, steps)
    ]
    made = []
    for source in sources:
        made.append(_add(Bundle.open(path), info, source, events))
        events.result(made[-1])
    return made


def _add(bundle: Bundle, info: EdgeRuntime, source: EdgeSource, events: Events) -> EdgeArtifact:
    steps, precision = source.spec.num_inference_steps, source.precision
    relative = info.path(precision, steps)
    recipe = _recipe(bundle, info, source)
    if recipe_of(bundle, relative) == recipe:
        size = sum(entry.size for entry in files_of(bundle.manifest, _folder(relative)))
        return _described(info, source, relative, size, unchanged=True)
    events.stage(f"convert the {steps}-step sampler to {info.title} in {precision}")
    with extend_bundle(bundle) as draft:
        folder = draft.path(_folder(relative))
        folder.mkdir(parents=True)
        notes = info.exporter.export(source, folder / Path(relative).name)
        files = [each.relative_to(draft.folder).as_posix() for each in sorted(folder.rglob("*")) if each.is_file()]
        size = sum(
            (draft.folder / each).stat().st_size for each in files if each.startswith(relative.rpartition(".")[0])
        )
        artifact = Artifact(
            path=relative, format=info.format, precision=precision, num_inference_steps=steps, recipe=recipe
        )
        draft.add(artifact, _made_from(bundle, source), files=files)
        draft.versions = {library: installed_version(library) for library in info.libraries}
    return _described(info, source, relative, size, notes=(*notes, *_doubled(bundle, source, size)))


def _described(
    info: EdgeRuntime, source: EdgeSource, path: str, size: int, *, unchanged: bool = False, notes: Sequence[str] = ()
) -> EdgeArtifact:
    return EdgeArtifact(
        path=path,
        runtime=info.format,
        precision=source.precision,
        num_inference_steps=source.spec.num_inference_steps,
        bytes=size,
        unchanged=unchanged,
        notes=tuple(notes),
    )


def _steps(bundle: Bundle, asked: Sequence[int]) -> list[int]:
    there = [spec.num_inference_steps for spec in bundle.manifest.samplers]
    if wrong := set(asked) - set(there):
        raise ConfigError(
            f"{bundle.path} has samplers of {there} steps, expected {sorted(wrong)} among them. Export them first: "
            "scm-export onnx"
        )
    return sorted(asked or there)


def _source(bundle: Bundle, info: EdgeRuntime, precision: Precision, steps: int) -> EdgeSource:
    if precision not in info.precisions:
        raise ConfigError(f"precision is {precision!r}, expected one of {', '.join(info.precisions)} for {info.title}.")
    if info.reads == "checkpoint":
        found = list(bundle.artifacts(format="safetensors"))
        missing = "checkpoint"
    else:  # converters round weights by themselves
        found = [a for a in bundle.artifacts(format="onnx", precision="fp32") if a.num_inference_steps == steps]
        missing = f"fp32 graph of {steps} steps"
    if not found:
        raise ConfigError(
            f"{bundle.path} holds no {missing}, expected one to convert to {info.title}."
            f"{bundle.manifest.cut_note or ' Export it first: scm-export onnx'}"
        )
    return EdgeSource(bundle=bundle, spec=bundle.spec(steps), precision=precision, artifact=found[0])


def _made_from(bundle: Bundle, source: EdgeSource) -> list[str]:
    """Return the files of the bundle that an artifact is made from."""
    if source.artifact.format == "onnx":
        listed = {entry.path for entry in bundle.manifest.files}
        data = data_path_of(Path(source.artifact.path)).as_posix()
        return [source.artifact.path, *([data] if data in listed else [])]
    kept = (entry for entry in files_of(bundle.manifest, source.artifact.path) if entry.role in ("weights", "config"))
    return [entry.path for entry in kept]


def _recipe(bundle: Bundle, info: EdgeRuntime, source: EdgeSource) -> dict[str, Any]:
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    return {
        "runtime": info.format,
        "libraries": {library: installed_version(library) for library in info.libraries},
        "batch": BATCH,
        "source": {path: digests[path] for path in _made_from(bundle, source)},
        "scm_sdk": __version__,
    }


def _folder(relative: str) -> str:
    return relative.rpartition("/")[0]


def _doubled(bundle: Bundle, source: EdgeSource, size: int) -> list[str]:
    """Return a note if an artifact is so large that it must hold its weights more than once."""
    graphs = bundle.artifacts(format="onnx", precision="fp32")
    paths = [a.path for a in graphs if a.num_inference_steps == source.spec.num_inference_steps]
    once = sum(entry.size for entry in bundle.manifest.files if entry.path.removesuffix("_data") in paths)
    weights = once / (2 if source.precision == "fp16" else 1)
    if not once or size < _DOUBLED * weights + _STRUCTURE:
        return []
    times = size / weights
    return [f"stores its weights {times:.1f} times: {size / 1e6:.1f} MB, the graph has {once / 1e6:.1f} MB"]
