"""Score a model: distance to held-out images, and agreement of images with requested labels.

Combines sampling, real images and metrics for ``scm-export evaluate`` and the quality gates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..._util.events import SILENT, Events
from ...errors import ConfigError, ParityError
from .distances import FeatureStats
from .held_out import HeldOut
from .nets import FeatureNet
from .palette import LabelAccuracy, fit_label_reader, label_accuracy, palette_share
from .quality import Quality, evaluate_images
from .sampling import Samples


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of a sampler.

    Attributes:
        sampler: Description of the sampler.
        network_calls: Network evaluations for each picture.
        quality: Distances to held-out images.
        against: Description of the data and rows of the comparison.
        labels: Share of images that show the requested label; None if labels are not colors.
        labels_real: The same share for real images, an upper bound.
        palette: Share of pixels near a palette color; None for data without a palette.
    """

    sampler: str
    network_calls: int
    quality: Quality
    against: str = ""
    labels: LabelAccuracy | None = None
    labels_real: float | None = None
    palette: float | None = None

    def raise_if_worse(self, max_kid_delta: float) -> None:
        """Raise unless the interval of the KID increase over the first precision is within a limit.

        The first precision itself passes.

        Raises:
            ParityError: If the increase is above the limit, or too few images leave it undecided.
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


def score(
    samples: Samples, real: HeldOut, *, net: FeatureNet, beside: Samples | None = None, cache: Path | None = None,
    events: Events = SILENT,
) -> Score:  # fmt: skip
    """Score samples against real images.

    Args:
        samples: From ``sample_student`` or ``sample_diffusion``.
        real: From ``load_held_out`` for the same model.
        net: The feature network.
        beside: Samples of the same seeds from another sampler, for the KID increase.
        cache: Folder for features of real images.
        events: Receives the stages, and a step for each batch of images.

    Raises:
        ConfigError: If ``beside`` has another number of images.
    """
    count = len(samples.images)
    if beside is not None and len(beside.images) != count:
        raise ConfigError(f"beside holds {len(beside.images)} pictures, expected {count}: the same seeds.")
    quality = evaluate_images(
        samples.images,
        real.reference,
        net=net,
        other_real=real.other[:count] if len(real.other) >= count else None,
        beside=None if beside is None else beside.images,
        cache=cache,
        events=events,
    )
    result = Score(sampler=samples.sampler, network_calls=samples.network_calls, quality=quality, against=real.about)
    if not real.colors or real.other_labels is None or samples.class_labels is None:
        return result
    reader = fit_label_reader(real.other, real.other_labels, real.colors)
    ceiling: float | None = None
    if real.labels is not None and not isinstance(real.reference, FeatureStats):
        ceiling = label_accuracy(real.reference, real.labels, reader).accuracy
    return replace(
        result,
        labels=label_accuracy(samples.images, samples.class_labels, reader),
        labels_real=ceiling,
        palette=palette_share(samples.images, real.other),
    )
