"""Generate the images for scoring in cached blocks, so that an interrupted run resumes.

Seed i has label i modulo the number of classes, so an image does not depend on the number of images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..._util.events import SILENT, Events
from ...images import to_uint8
from ...inference.generator import Generator
from ...inference.sources import open_source
from ...noise import draw_noise
from ...spec import SamplerSpec
from .cached import cached

BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Generated images and their sampler.

    Attributes:
        images: (N, H, W, C), uint8.
        class_labels: (N,), int64, or None.
        sampler: Description of the sampler.
        network_calls: Network evaluations for each picture.
    """

    images: NDArray[np.uint8]
    class_labels: NDArray[np.int64] | None
    sampler: str
    network_calls: int


def cycle_labels(num_images: int, num_classes: int) -> NDArray[np.int64] | None:
    """Return labels 0, 1, …, 0, 1, …, (N,), or None without classes."""
    return np.arange(num_images, dtype=np.int64) % num_classes if num_classes else None


def sample_student(
    path: str | Path,
    num_images: int,
    *,
    num_inference_steps: int,
    backend: str = "auto",
    precision: str = "auto",
    guidance_scale: float | None = None,
    cache: Path | None = None,
    events: Events = SILENT,
) -> Samples:
    """Draw seeds 0..N-1 from a bundle or a checkpoint.

    Args:
        path: The bundle or checkpoint.
        num_images: N.
        num_inference_steps: Network calls for each picture.
        backend: As for ``Generator``.
        precision: As for ``Generator``.
        guidance_scale: For models with this input; None is the default of the model.
        cache: Folder for finished blocks, keyed by their sampler; None caches nothing.
        events: Receives a step for each block of images.

    Raises:
        BackendError: If the backend cannot run.
        IntegrityError: If a cached block is damaged.
    """
    with Generator.from_pretrained(
        path, backend=backend, precision=precision, num_inference_steps=num_inference_steps
    ) as gen:
        opened = gen.opened()
        row, spec = opened.row, opened.spec

        def draw(seeds: range, labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
            chosen = None if labels is None else [int(label) for label in labels]
            images: NDArray[np.uint8] = gen(
                len(seeds), class_labels=chosen, guidance_scale=guidance_scale, seed=list(seeds), output_type="uint8"
            ).images
            return images

        maker = [gen.source.build_id, row.backend, row.artifact, row.precision, opened.device, spec.to_json()]
        maker += [] if guidance_scale is None else [f"guidance {guidance_scale}"]
        images = _in_blocks(draw, num_images, spec, maker, cache, events)
    return Samples(
        images=images,
        class_labels=cycle_labels(num_images, spec.num_classes),
        sampler=f"sCM, {num_inference_steps} step{'' if num_inference_steps == 1 else 's'}, "
        f"{row.backend} {row.precision}" + ("" if guidance_scale is None else f", guidance {guidance_scale:g}"),
        network_calls=num_inference_steps,
    )


def sample_diffusion(
    path: str | Path,
    num_images: int,
    *,
    num_steps: int = 18,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    cache: Path | None = None,
    events: Events = SILENT,
) -> Samples:
    """Draw seeds 0..N-1 from a teacher with the second-order solver, ``2 num_steps - 1`` calls each, twice if guided.

    Raises:
        TrainError: If guidance is requested for a model without label dropout.
        BundleError: If there is no checkpoint.
        IntegrityError: If a cached block is damaged.
    """
    import torch

    from ...model.consistency import ConsistencyModel
    from ...train.data.samples import sample_teacher
    from ...train.objectives.guidance import require_guidable

    build_id = open_source(path).build_id
    model = ConsistencyModel.from_pretrained(path)
    guided = guidance_scale != 1.0
    if guided:
        require_guidable(model, path)
    spec = model.spec(1)

    def draw(seeds: range, labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        parts = []
        for at in range(0, len(seeds), batch_size):
            some = seeds[at : at + batch_size]
            noise = torch.from_numpy(draw_noise(spec, list(some))[0])
            chosen = None if labels is None else torch.from_numpy(labels[at : at + batch_size])
            raw = sample_teacher(model, noise, chosen, num_steps=num_steps, guidance_scale=guidance_scale).numpy()
            parts.append(to_uint8(raw, spec.value_range))
        return np.concatenate(parts)

    calls = (2 * num_steps - 1) * (2 if guided else 1)
    maker = [build_id, "teacher", str(calls), spec.to_json(), *([f"guidance {guidance_scale}"] if guided else [])]
    return Samples(
        images=_in_blocks(draw, num_images, spec, maker, cache, events),
        class_labels=cycle_labels(num_images, spec.num_classes),
        sampler=f"teacher, {calls} calls" + (f", guidance {guidance_scale:g}" if guided else ""),
        network_calls=calls,
    )


def _in_blocks(
    draw: Callable[[range, NDArray[np.int64] | None], NDArray[np.uint8]],
    num_images: int,
    spec: SamplerSpec,
    maker: list[str],
    cache: Path | None,
    events: Events,
) -> NDArray[np.uint8]:
    channels, height, width = spec.image_shape
    labels, parts = cycle_labels(num_images, spec.num_classes), []
    for start in range(0, num_images, BLOCK):
        seeds = range(start, min(start + BLOCK, num_images))
        chosen = None if labels is None else labels[seeds.start : seeds.stop]
        key = hashlib.sha256(json.dumps([*maker, seeds.start, seeds.stop]).encode()).hexdigest()
        shape = (len(seeds), height, width, channels)

        def make(seeds: range = seeds, chosen: NDArray[np.int64] | None = chosen) -> NDArray[np.uint8]:
            return draw(seeds, chosen)

        parts.append(cached(cache, "pictures", key, shape, np.uint8, make))
        events.step("images", seeds.stop, num_images)
    return np.concatenate(parts)
