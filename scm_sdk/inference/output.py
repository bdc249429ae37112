"""Convert raw backend output to ``output_type``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._util.lazy import require
from ..bundle.status import ModelStatus
from ..errors import BackendFailure, ConfigError
from ..images import clips_to_pil, save_clip, to_pil, to_uint8
from .request import OutputType, Request
from .selection import PlanRow

Images = Any
"""A list of PIL images, a list of them for each clip, an array or a PyTorch tensor, depending on ``output_type``."""
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class GenerationInfo:
    """Description of a run.

    Attributes:
        backend: Name of the backend.
        device: Device of the backend.
        precision: Precision of the artifact.
        artifact: Path of the artifact inside the bundle.
        sha256: Digest of the artifact's main file; "" for a checkpoint opened with ``verify="none"``.
        build_id: Digest of everything that decides the images.
        model: State of the model: its kind, the length of its training, whether its quality was measured.
        num_inference_steps: Network calls for each image.
        batches: Size of each batch.
        timings: Milliseconds: ``load_ms`` (when it was opened), ``noise_ms``, ``sample_ms``, ``total_ms``; and
            ``decode_ms`` where the decoder is a graph of its own.
        rejected: Rejected rows of the plan with their reasons.
        fallback: The requested backend that could not run, if another one ran.
    """

    backend: str
    device: str
    precision: str
    artifact: str
    sha256: str
    build_id: str
    model: ModelStatus
    num_inference_steps: int
    batches: tuple[int, ...]
    timings: dict[str, float]
    rejected: tuple[PlanRow, ...]
    fallback: str | None = None

    def with_total(self, total_ms: float) -> GenerationInfo:
        """Return this info with the time of the whole call."""
        return replace(self, timings={**self.timings, "total_ms": total_ms})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "model": self.model.to_dict()}


@dataclass(frozen=True, kw_only=True)
class GeneratorOutput:
    """Images of a call with their seeds and labels.

    Attributes:
        images: Images in the form of ``output_type``.
        seeds: The seed of each image; () if the noise was given.
        class_labels: The label of each image; None for an unconditional model.
        info: Description of the run.
    """

    images: Images
    seeds: tuple[int, ...]
    class_labels: tuple[int, ...] | None
    info: GenerationInfo

    def save(self, path: str | os.PathLike[str], *, fps: float = 16.0) -> tuple[Path, ...]:
        """Write the clips of a video model; several get their number in the name: ``clip-0.mp4``, ``clip-1.mp4``.

        Args:
            path: The file: ``.gif``, ``.webp`` or ``.mp4``, which needs the extra ``video``.
            fps: Frames per second; Wan and its students make 16.

        Returns:
            The files.

        Raises:
            ConfigError: If this output holds no clips: ``output_type`` was not ``"frames"`` or ``"np"``.
            ScmError: As ``images.save_clip``.
        """
        clips = self._clips()
        path = Path(path)
        files = [path] if len(clips) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(clips))]
        for clip, file in zip(clips, files, strict=True):
            save_clip(clip, file, fps=fps)
        return tuple(files)

    def _clips(self) -> list[np.ndarray]:
        images = self.images
        if isinstance(images, list) and images and isinstance(images[0], list):
            pictures = [np.stack([np.asarray(frame) for frame in clip]) for clip in images]
            return [clip if clip.ndim == 4 else clip[..., None] for clip in pictures]
        if isinstance(images, np.ndarray) and images.ndim == 5 and images.shape[-1] in (1, 3):
            return [np.rint(clip * 255).astype(np.uint8) for clip in images]
        raise ConfigError(
            "this output holds no clips, expected those of a video model with output_type 'frames' or 'np'. Save an "
            "image with out.images[0].save(path)."
        )

    def __str__(self) -> str:
        info = self.info
        lines = [
            f"{_count(len(self.images), 'image')} by {info.backend} {info.precision} on {info.device}, "
            f"{_count(info.num_inference_steps, 'step')}, {info.timings.get('total_ms', 0.0):.1f} ms"
        ]
        lines += [f"seeds {_shown(self.seeds)}"] if self.seeds else []
        lines += [f"class labels {_shown(self.class_labels)}"] if self.class_labels else []
        return "\n".join(lines + ([f"instead of what was asked for: {info.fallback}"] if info.fallback else []))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _shown(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN])) + (f", ... ({len(numbers)})" if len(numbers) > _SHOWN else "")


def make_output(request: Request, raw: np.ndarray, output_type: OutputType, info: GenerationInfo) -> GeneratorOutput:
    """Convert raw backend output, ``(N, *image_shape)`` float32 in data units, to the output of a request.

    Raises:
        BackendFailure: If it is not finite and ``output_type`` is not ``"raw"``.
        BackendUnavailable: If ``output_type`` is ``"pt"`` and torch is not installed.
    """
    finite = np.isfinite(raw).reshape(len(raw), -1).all(axis=1)
    if output_type != "raw" and not finite.all():
        bad = int(np.flatnonzero(~finite)[0])
        which = f"seed {request.seeds[bad]}" if request.seeds else f"image {bad}"
        raise BackendFailure(
            f"{info.backend} ({info.artifact}) returned NaN or infinity for {which}, expected finite "
            "images. Compare it with the reference: scm-export validate"
        )
    images = convert(raw, request.spec.value_range, output_type)
    return GeneratorOutput(images=images, seeds=request.seeds, class_labels=request.class_labels, info=info)


def convert(raw: np.ndarray, value_range: tuple[float, float], output_type: OutputType) -> Images:
    """Convert (N, C, ...) float32 in data units to ``output_type``.

    Samples may have any rank for ``raw``, ``np`` (channels last) and ``pt``.

    Raises:
        BackendUnavailable: If ``output_type`` is ``"pt"`` and torch is not installed.
    """
    if output_type == "raw":
        return raw
    if output_type == "pil":
        return to_pil(raw, value_range)
    if output_type == "frames":
        return clips_to_pil(raw, value_range)
    if output_type == "uint8":
        return to_uint8(raw, value_range)
    low, high = value_range
    unit = np.clip((raw - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    if output_type == "np":
        return np.ascontiguousarray(np.moveaxis(unit, 1, -1))
    return require("torch", extra="torch", purpose="output_type 'pt'").from_numpy(unit)
