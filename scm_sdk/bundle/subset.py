"""Subset of a bundle: the manifest of some of its artifacts. Data only, without file access."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import msgspec

from ..errors import ConfigError
from .manifest import FOLDER_FORMATS, Artifact, FileEntry, Format, Manifest, files_of

BACKEND_FORMATS: dict[str, Format] = {
    "torch": "safetensors",
    "onnxruntime": "onnx",
    "openvino": "onnx",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
    "litert": "litert",
    "executorch": "executorch",
    "openvino_ir": "openvino_ir",
}
"""Artifact format of each backend."""


def artifact_name(artifact: Artifact) -> str:
    """Return the name of an artifact: its folder, or the file if it is next to the manifest."""
    folder = PurePosixPath(artifact.path).parent.as_posix()
    return artifact.path if artifact.format in FOLDER_FORMATS or folder == "." else folder


def cut(manifest: Manifest, only: Sequence[str]) -> Manifest:
    """Return the manifest of a bundle with only some artifacts.

    Samplers, files, parity records and budgets of other artifacts are dropped, as well as the inputs for building
    further artifacts (precision plans, calibrations). The rest is unchanged; the goldens are not cut yet.

    Args:
        manifest: Manifest of the full bundle or of a subset.
        only: Names of the artifacts as returned by ``artifact_name``, their paths, or folders of several.

    Raises:
        ConfigError: If ``only`` is empty or no artifact has one of the names.
    """
    kept = _named(manifest, only)
    dropped = [artifact for artifact in manifest.artifacts if artifact not in kept]
    ours = {entry.path for artifact in kept for entry in files_of(manifest, artifact.path)}
    theirs = {entry.path for artifact in dropped for entry in files_of(manifest, artifact.path)} - ours
    files = [e for e in manifest.files if e.path not in theirs and e.role not in ("plan", "calibration")]
    paths = {entry.path for entry in files}
    steps = {artifact.num_inference_steps for artifact in kept}
    return msgspec.structs.replace(
        manifest,
        cut_from=manifest.cut_from or manifest.build_id,
        artifacts=kept,
        samplers=tuple(s for s in manifest.samplers if 0 in steps or s.num_inference_steps in steps),
        files=tuple(_without_sources(entry, paths) for entry in files),
        parity=tuple(record for record in manifest.parity if record.artifact in {a.path for a in kept}),
        budgets=tuple(text for text in manifest.budgets if _binds(text, kept)),
    )


def _named(manifest: Manifest, only: Sequence[str]) -> tuple[Artifact, ...]:
    names = [artifact_name(artifact) for artifact in manifest.artifacts]
    for name in only or [""]:
        if not any(_has_name(artifact, name) for artifact in manifest.artifacts):
            raise ConfigError(
                f"{manifest.name} has no artifact {name!r}, expected some of {', '.join(names)}. Choose among them: "
                "scm-export inspect shows what they are."
            )
    return tuple(a for a in manifest.artifacts if any(_has_name(a, name) for name in only))


def _has_name(artifact: Artifact, name: str) -> bool:
    return bool(name) and PurePosixPath(artifact.path).is_relative_to(name)


def _without_sources(entry: FileEntry, paths: set[str]) -> FileEntry:
    """Return an entry without sources that the subset lacks; they are still in its recipe or record."""
    return msgspec.structs.replace(entry, built_from=tuple(path for path in entry.built_from if path in paths))


def _binds(budget: str, artifacts: Sequence[Artifact]) -> bool:
    """Return whether a budget, ``[BACKEND[:PRECISION]:]p95=25ms@b1``, applies to one of the artifacts."""
    backend, precision, *_ = [*budget.split(":")[:-1], "", ""]
    return any(
        (backend in ("", "auto") or BACKEND_FORMATS.get(backend) == artifact.format)
        and precision in ("", artifact.precision)
        for artifact in artifacts
    )
