"""Subset of a bundle: the manifest of some of its artifacts. Data only, without file access."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import msgspec

from ..errors import ConfigError
from ..spec import SamplerSpec
from .manifest import FOLDER_FORMATS, Artifact, FileEntry, Format, Manifest, describe_size, files_of

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


def artifact_names(manifest: Manifest) -> dict[str, str]:
    """Return the name of each artifact by its path; at further image sizes, whose folder is the first's, the path."""
    further = {artifact.path: artifact.path for size in manifest.sizes for artifact in size.artifacts}
    return {artifact.path: artifact_name(artifact) for artifact in manifest.artifacts} | further


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
    kept = _named(manifest, manifest.artifacts, only)
    sizes = tuple(
        msgspec.structs.replace(size, samplers=_of_steps(size.samplers, artifacts), artifacts=artifacts)
        for size in manifest.sizes
        if (artifacts := tuple(a for a in size.artifacts if any(_has_name(a, name) for name in only)))
    )
    further = {artifact.path for size in sizes for artifact in size.artifacts}
    dropped = [a for a in manifest.all_artifacts if a not in kept and a.path not in further]
    # Graphs of several sizes share a folder, and its weights.
    alone = {
        f"{a.path}{end}" for size in manifest.sizes for a in size.artifacts if a in dropped for end in ("", "_data")
    }
    ours = {entry.path for artifact in kept for entry in files_of(manifest, artifact.path)} - alone
    theirs = {entry.path for artifact in dropped for entry in files_of(manifest, artifact.path)} - ours
    files = [e for e in manifest.files if e.path not in theirs and e.role not in ("plan", "calibration")]
    paths = {entry.path for entry in files}
    return msgspec.structs.replace(
        manifest,
        cut_from=manifest.cut_from or manifest.build_id,
        artifacts=kept,
        samplers=_of_steps(manifest.samplers, kept),
        files=tuple(_without_sources(entry, paths) for entry in files),
        parity=tuple(record for record in manifest.parity if record.artifact in {a.path for a in kept} | further),
        budgets=tuple(text for text in manifest.budgets if _binds(text, kept)),
        sizes=sizes,
    )


def _of_steps(samplers: Sequence[SamplerSpec], artifacts: Sequence[Artifact]) -> tuple[SamplerSpec, ...]:
    steps = {artifact.num_inference_steps for artifact in artifacts}
    return tuple(s for s in samplers if 0 in steps or s.num_inference_steps in steps)


def _named(manifest: Manifest, artifacts: Sequence[Artifact], only: Sequence[str]) -> tuple[Artifact, ...]:
    names = list(dict.fromkeys(artifact_name(artifact) for artifact in artifacts))
    for name in only or [""]:
        if not any(_has_name(artifact, name) for artifact in manifest.all_artifacts):
            raise ConfigError(
                f"{manifest.name} has no artifact {name!r}, expected some of {', '.join(names)}. Choose among them: "
                "scm-export inspect shows what they are."
            )
    found = tuple(a for a in artifacts if any(_has_name(a, name) for name in only))
    if not found:
        raise ConfigError(
            f"{', '.join(only)} of {manifest.name} are of further image sizes, expected one of the first size, "
            f"{describe_size(manifest.image_sizes[0])}, with them: {', '.join(names)}. For another size alone, import "
            "the pipeline with that --size."
        )
    return found


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
