"""Explain a failed gate: the fault, the first differing value, and images of the difference."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import image_size
from scm_sdk.errors import ConfigError
from scm_sdk.evaluate.validate import open_candidate
from scm_sdk.images import make_grid, save_png, to_uint8
from scm_sdk.inference.parity.compare import Parity
from scm_sdk.spec import Precision, SamplerSpec

from ..workspace import Workspace
from .bisect import Bisection, bisect
from .diagnose import Diagnosis
from .validate import examine_graph

_AMPLIFY = 10.0
_LARGEST_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class Localized:
    """Location of a graph's fault.

    Attributes:
        artifact: The graph.
        diagnosis: The faults and the performed checks.
        bisection: First difference from the bundle's fp32 graph; None for the fp32 graph, which ``diagnose`` compares
            with the checkpoint.
        picture: Image file of the worst seed: reference, candidate, and their difference amplified ten times; None for
            samples that are not images.
    """

    artifact: str
    diagnosis: Diagnosis
    bisection: Bisection | None
    picture: Path | None


def localize(path: str | os.PathLike[str] | Workspace, parity: Parity, folder: Path) -> Localized:
    """Diagnose a failed graph.

    Args:
        path: The bundle, or the workspace that it is open in.
        parity: The failed comparison; only graphs can be diagnosed.
        folder: Output folder of the image.

    Raises:
        ConfigError: If the candidate is not a graph.
        ExportError: If it lacks the names of scm-export.
        UnsupportedGraphError: If ONNX Runtime cannot run it on a CPU.
    """
    workspace = Workspace.of(path)
    bundle = workspace.bundle.holding(parity.candidate)
    artifact = next((a for a in bundle.artifacts(format="onnx") if a.path == parity.candidate), None)
    if artifact is None:
        raise ConfigError(
            f"{parity.candidate} is no graph of {bundle.path}, expected one: engines cannot be inspected. Validate the "
            "graph that it was built from."
        )
    from scm_sdk.model.consistency import ConsistencyModel

    steps = artifact.num_inference_steps
    spec = bundle.spec(steps)
    graph = workspace.graph(artifact.path)
    full = [a for a in bundle.artifacts(format="onnx", precision="fp32") if a.num_inference_steps == steps]
    (checkpoint, *_) = bundle.artifacts(format="safetensors")
    model = ConsistencyModel.from_pretrained(bundle.file(checkpoint.path)).eval()
    if model.config.sample_shape != spec.sample_shape:
        model = model.at_size(*image_size([spec])).eval()
    found = None
    if full and full[0].path != artifact.path:
        found = bisect(graph, workspace.graph(full[0].path), spec, seed=parity.worst_seed)
    return Localized(
        artifact=artifact.path,
        diagnosis=examine_graph(workspace, artifact, model),
        bisection=found,
        picture=_picture(bundle, parity, steps, folder),
    )


def _picture(bundle: Bundle, parity: Parity, steps: int, folder: Path) -> Path | None:
    spec = bundle.spec(steps)
    if spec.output != "pixels" or len(spec.image_shape) != 3 or spec.image_shape[0] not in (1, 3):
        return None
    precision = next(a.precision for a in bundle.manifest.artifacts if a.path == parity.candidate)
    images = []
    sides: tuple[tuple[str, Precision], ...]
    sides = ((parity.reference_backend, "fp32"), (parity.candidate_backend, precision))  # pyright: ignore[reportAssignmentType]
    for backend, wanted in sides:
        with open_candidate(bundle, backend, wanted, steps) as gen:
            images.append(gen(1, seed=parity.worst_seed, output_type="raw").images[0])
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{parity.candidate.replace('/', '-').removesuffix('.onnx')}-seed{parity.worst_seed}.png"
    save_png(side_by_side(images[0], images[1], spec), folder / name)
    return folder / name


def side_by_side(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], spec: SamplerSpec
) -> NDArray[np.uint8]:
    """Return reference, candidate and their difference amplified ten times around gray, as one image."""
    low, high = spec.value_range
    gap = np.clip((low + high) / 2 + _AMPLIFY * (candidate - reference), low, high)
    triple = np.nan_to_num(np.stack([reference, candidate, gap]), nan=low, posinf=high, neginf=low)
    scale = max(1, _LARGEST_SIDE // max(spec.image_shape[1:]))
    return make_grid(to_uint8(triple.astype(np.float32), spec.value_range), 3, scale, padding=8)
