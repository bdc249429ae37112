"""Validate a bundle: images by ``evaluate.parity``, the structure of its graphs by ``diagnose``.

A reduced precision may change images, which can hide the effect of a small fault. The structure has no such tolerance,
so both checks must pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from scm_sdk._util.arguments import checked_names
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import ExportError, UnsupportedGraphError
from scm_sdk.evaluate.parity.compare import Parity
from scm_sdk.evaluate.parity.validate import ValidateOptions, validate_bundle
from scm_sdk.inference.conditioning import Examples

from ..graph.io import read_model
from .diagnose import Diagnosis, diagnose

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from scm_sdk.model.consistency import ConsistencyModel


@checked_names("validate", ValidateOptions)
def validate(
    path: str | os.PathLike[str],
    *,
    examples: Examples | None = None,
    on_note: Callable[[str], object] = lambda _: None,
    **options: Unpack[ValidateOptions],
) -> list[Parity]:
    """Compare everything that can run here with the checkpoint, diagnose each graph, and record both.

    Args:
        path: The bundle.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.
        on_note: Called with a line for each graph that could not be diagnosed, for each correct graph with the
            performed checks, and for each result that was not recorded.
        **options: More arguments of ``scm_sdk.evaluate.parity.validate.validate_bundle``.

    Returns:
        One comparison for each number of steps, backend and precision.

    Raises:
        ScmError: As ``validate_bundle``.
    """
    bundle = Bundle.open(path, verify="none")

    def examine(artifact: Artifact) -> tuple[str, tuple[float, ...]]:
        if artifact.format != "onnx":
            return "", ()
        try:
            found = examine_graph(bundle, artifact, examples)
        except (ExportError, UnsupportedGraphError) as exc:
            on_note(f"{artifact.path} was not inspected: {exc}")
            return "", ()
        if not found.findings:
            on_note(f"{artifact.path} {found}")
        return found.fault, found.psnr_by_step

    return validate_bundle(path, examine=examine, examples=examples, on_note=on_note, **options)


def examine_graph(bundle: Bundle, artifact: Artifact, examples: Examples | None = None) -> Diagnosis:
    """Diagnose one graph of a bundle.

    Raises:
        ExportError: If it lacks the names of scm-export, for example a graph of another tool.
        UnsupportedGraphError: If ONNX Runtime cannot run it on a CPU.
    """
    from scm_sdk.model.consistency import ConsistencyModel

    (checkpoint, *_) = bundle.artifacts(format="safetensors")
    model: ConsistencyModel = ConsistencyModel.from_pretrained(bundle.file(checkpoint.path)).eval()
    steps = artifact.num_inference_steps
    graphs = bundle.artifacts(format="onnx", precision="fp32")
    exact = next((a for a in graphs if a.num_inference_steps == steps and a.path != artifact.path), None)
    return diagnose(
        read_model(bundle.file(artifact.path)),
        model,
        bundle.spec(steps),
        exact=None if exact is None else read_model(bundle.file(exact.path)),
        examples=examples,
    )
