"""Score a model as people judge it: pictures against held-out pictures, labels against requests.

Sampling and metrics are elsewhere; this room only brings them together, for ``scm-export evaluate``
and for the quality gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ParityError
from ..generator import Generator
from .palette import LabelAccuracy, fit_label_reader, label_accuracy, palette_share
from .quality import Quality, evaluate_images

Progress = Callable[[int, int], object]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Generated pictures and how they were made.

    Attributes:
        images: (N, H, W, C), uint8.
        class_labels: (N,), int64, or None.
        sampler: What made them, for people.
        network_calls: Network evaluations for each picture.
    """

    images: NDArray[np.uint8]
    class_labels: NDArray[np.int64] | None
    sampler: str
    network_calls: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a sampler is.

    Attributes:
        sampler: What made the pictures.
        network_calls: Network evaluations for each picture.
        quality: Distances to held-out pictures, with floors.
        labels: Share of pictures that show the label asked for; None where labels are no colours.
        labels_real: The same reader on real pictures: the ceiling.
        palette: Share of pixels near a palette colour; None for data without a palette.
    """

    sampler: str
    network_calls: int
    quality: Quality
    labels: LabelAccuracy | None = None
    labels_real: float | None = None
    palette: float | None = None

    def raise_if_worse(self, max_kid_delta: float) -> None:
        """Raise unless the whole interval of the KID beside the first precision lies within a limit.

        What has nothing beside it passes.

        Raises:
            ParityError: If it is surely above the limit, or too few pictures leave it open.
        """
        delta, interval = self.quality.kid_delta, self.quality.kid_delta_interval
        if delta is None or interval is None or interval[1] <= max_kid_delta:
            return
        worse = interval[0] > max_kid_delta
        raise ParityError(
            f"{self.sampler} has KID {delta:.2g} above the first precision (95 % {interval[0]:.2g} to "
            f"{interval[1]:.2g}), expected surely at most {max_kid_delta:.2g}. "
            + ("Keep more of it in a higher precision." if worse else
               "That is undecided, not passed: give more pictures (--num-images), the interval narrows with them.")
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        labels = self.labels
        return {
            **asdict(replace(self, labels=None)),
            "labels": None if labels is None else {"accuracy": labels.accuracy, "per_class": labels.per_class},
        }


def cycle_labels(num_images: int, num_classes: int) -> NDArray[np.int64] | None:
    """Return labels 0, 1, …, 0, 1, …, (N,), or None without classes."""
    return np.arange(num_images, dtype=np.int64) % num_classes if num_classes else None


def sample_student(
    path: str | Path, num_images: int, *, num_inference_steps: int, backend: str = "auto", precision: str = "auto",
    progress: Progress | None = None,
) -> Samples:  # fmt: skip
    """Draw seeds 0..N-1 from a bundle or a checkpoint."""
    with Generator.from_pretrained(
        path, backend=backend, precision=precision, num_inference_steps=num_inference_steps
    ) as gen:
        spec = gen.opened().spec
        labels = cycle_labels(num_images, spec.num_classes)
        out = gen(
            num_images,
            class_labels=None if labels is None else [int(label) for label in labels],
            num_inference_steps=num_inference_steps,
            seed=0,
            output_type="uint8",
            progress=progress or False,
        )
    sampler = f"sCM, {num_inference_steps} steps, {out.info.backend} {out.info.precision}"
    return Samples(images=out.images, class_labels=labels, sampler=sampler, network_calls=num_inference_steps)


def sample_diffusion(
    path: str | Path,
    num_images: int,
    *,
    num_steps: int = 18,
    batch_size: int = 100,
    progress: Progress | None = None,
) -> Samples:
    """Draw seeds 0..N-1 from a teacher with the second-order solver, ``2 num_steps - 1`` calls each."""
    import torch

    from ..images import to_uint8
    from ..model.consistency import ConsistencyModel
    from ..noise import draw_noise
    from ..train.samples import sample_teacher

    model = ConsistencyModel.from_pretrained(path)
    spec = model.spec(1)
    labels = cycle_labels(num_images, spec.num_classes)
    parts = []
    for start in range(0, num_images, batch_size):
        seeds = range(start, min(start + batch_size, num_images))
        noise = torch.from_numpy(draw_noise(spec, list(seeds))[0])
        chosen = None if labels is None else torch.from_numpy(labels[seeds.start : seeds.stop])
        raw = sample_teacher(model, noise, chosen, num_steps=num_steps).numpy()
        parts.append(to_uint8(raw, spec.value_range))
        if progress:
            progress(seeds.stop, num_images)
    calls = 2 * num_steps - 1
    return Samples(
        images=np.concatenate(parts),
        class_labels=labels,
        sampler=f"teacher, {calls} calls",
        network_calls=calls,
    )


def score(
    samples: Samples, *, source: str, label: str, reference_rows: tuple[int, int], real_rows: tuple[int, int],
    beside: Samples | None = None, cache: Path | None = None, progress: Progress | None = None,
) -> Score:  # fmt: skip
    """Hold samples against real pictures.

    Args:
        samples: From ``sample_student`` or ``sample_diffusion``.
        source: Data source, as ``train`` takes it.
        label: Label column, or "".
        reference_rows: Held-out rows that pictures are compared with.
        real_rows: Other real rows, as many as samples, for the floor; also fits the label reader.
        beside: The same seeds made another way, to tell how much worse these are.
        cache: Folder for features of real pictures.
        progress: Called with (pictures done, pictures in all).

    Raises:
        ConfigError: If the rows overlap.
    """
    from ..train.config import DataConfig
    from ..train.data import load_data

    if max(reference_rows[0], real_rows[0]) < min(reference_rows[1], real_rows[1]):
        raise ConfigError(f"reference rows {reference_rows} and real rows {real_rows} overlap, expected disjoint ones.")
    reference = load_data(DataConfig(source=source, label=label, rows=reference_rows))
    real = load_data(DataConfig(source=source, label=label, rows=real_rows))
    if reference.images.dtype != np.uint8:
        raise ConfigError(f"data {source!r} holds floats, expected 8-bit pictures to compare with.")
    count = len(samples.images)
    quality = evaluate_images(
        samples.images,
        reference.images.astype(np.uint8),
        other_real=real.images[:count].astype(np.uint8) if len(real) >= count else None,
        beside=None if beside is None else beside.images,
        cache=cache,
        progress=progress,
    )
    result = Score(sampler=samples.sampler, network_calls=samples.network_calls, quality=quality)
    if not (reference.label_values and reference.labels is not None and real.labels is not None):
        return result
    reader = fit_label_reader(real.images.astype(np.uint8), real.labels, reference.label_values)
    assert samples.class_labels is not None
    return replace(
        result,
        labels=label_accuracy(samples.images, samples.class_labels, reader),
        labels_real=label_accuracy(reference.images.astype(np.uint8), reference.labels, reader).accuracy,
        palette=palette_share(samples.images, real.images.astype(np.uint8)),
    )
