"""Validate a bundle: images by ``evaluate.validate``, the structure of its graphs by ``diagnose``.

A reduced precision may change images, which can hide the effect of a small fault. The structure has no such tolerance,
so both checks must pass.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from scm_sdk._util.arguments import checked_names
from scm_sdk._util.events import SILENT, Events
from scm_sdk.bundle.layout import DECODER_PATH
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import ExportError, UnsupportedGraphError
from scm_sdk.evaluate.validate import ValidateOptions, validate_bundle
from scm_sdk.inference.conditioning import Examples
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.parity.compare import Parity

from ..workspace import Workspace
from .diagnose import Diagnosis, diagnose

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from scm_sdk.model.consistency import ConsistencyModel


@checked_names("validate", ValidateOptions)
def validate(
    path: str | os.PathLike[str] | Workspace,
    *,
    examples: Examples | None = None,
    events: Events = SILENT,
    **options: Unpack[ValidateOptions],
) -> list[Parity]:
    """Compare everything that can run here with the checkpoint, diagnose each graph once, and record both.

    Args:
        path: The bundle, or the workspace that it is open in.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.
        events: As in ``validate_bundle``; and a note for each graph: what was checked, or why it could not be.
        **options: More arguments of ``scm_sdk.evaluate.validate.validate_bundle``.

    Returns:
        One comparison for each number of steps, backend and precision.

    Raises:
        ScmError: As ``validate_bundle``.
    """
    workspace = Workspace.of(path)
    seen: dict[str, tuple[str, tuple[float, ...]]] = {}

    def examine(artifact: Artifact, reference: Generator) -> tuple[str, tuple[float, ...]]:
        if artifact.path not in seen:
            seen[artifact.path] = look_into(artifact, reference) if artifact.format == "onnx" else ("", ())
        return seen[artifact.path]

    def look_into(artifact: Artifact, reference: Generator) -> tuple[str, tuple[float, ...]]:
        backend = reference.opened(artifact.num_inference_steps).backend
        model: ConsistencyModel = backend.model  # type: ignore[attr-defined]
        try:
            found = examine_graph(workspace, artifact, model, examples)
        except (ExportError, UnsupportedGraphError) as exc:
            events.note(f"{artifact.path} was not inspected: {exc}")
            return "", ()
        if not found.findings:
            events.note(f"{artifact.path} {found}")
        return found.fault, found.psnr_by_step

    return validate_bundle(workspace.bundle, examine=examine, examples=examples, events=events, **options)


def examine_graph(
    workspace: Workspace, artifact: Artifact, model: ConsistencyModel, examples: Examples | None = None
) -> Diagnosis:
    """Diagnose one graph of a bundle.

    Args:
        workspace: What the bundle is open in.
        artifact: The graph.
        model: The bundle's checkpoint.
        examples: Conditioning inputs; None draws them from the seed.

    Raises:
        ExportError: If it lacks the names of scm-export, for example a graph of another tool.
        UnsupportedGraphError: If ONNX Runtime cannot run it on a CPU.
    """
    bundle, steps = workspace.opened.holding(artifact.path), artifact.num_inference_steps
    graphs = bundle.artifacts(format="onnx", precision="fp32")
    exact = next((a for a in graphs if a.num_inference_steps == steps and a.path != artifact.path), None)
    return diagnose(
        workspace.graph(artifact.path),
        model,
        bundle.graph_spec(steps),
        exact=None if exact is None else workspace.graph(exact.path),
        decoder=workspace.graph(DECODER_PATH) if bundle.manifest.has_decoder_graph else None,
        examples=examples,
    )
