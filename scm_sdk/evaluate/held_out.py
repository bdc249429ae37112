"""The real pictures that generated ones are judged by, loaded and checked before anything is generated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..request import check_output_type
from ..spec import SamplerSpec
from .distances import FeatureStats
from .nets import FeatureNet
from .quality import MIN_IMAGES
from .statistics import read_stats

_DEFAULT_LABEL = {"avatars": "hairColor"}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Real pictures, uint8 (N, H, W, C), and their labels in the model's own order.

    Attributes:
        reference: Held-out pictures, or their statistics.
        labels: Labels of the held-out pictures, (N,) int64; None where labels are not judged.
        other: Other real pictures, for the floor and to learn how labels look.
        other_labels: Labels of these.
        colours: Each label's exact colour by the model's number of it; () where labels are no colours.
    """

    reference: NDArray[np.uint8] | FeatureStats
    labels: NDArray[np.int64] | None
    other: NDArray[np.uint8]
    other_labels: NDArray[np.int64] | None
    colours: tuple[str, ...]


def load_held_out(
    spec: SamplerSpec,
    net: FeatureNet,
    *,
    source: str,
    label: str | None = None,
    reference_rows: tuple[int, int],
    real_rows: tuple[int, int],
    stats: Path | None = None,
) -> HeldOut:
    """Load what a model's pictures are compared with, and refuse what would fail after the sampling.

    Args:
        spec: The model's sampler: size, channels and labels of its pictures.
        net: The network that statistics must be of.
        source: Data source, as ``train`` takes it.
        label: Label column, "" for none; None takes the shipped data's where the model has labels.
        reference_rows: Held-out rows.
        real_rows: Other real rows.
        stats: File of statistics in place of the held-out rows.

    Raises:
        ConfigError: If the model makes no such pictures, its labels are not the data's, or the rows overlap or are few.
        TrainError: If the data cannot be read or has fewer rows.
        IntegrityError: If the statistics cannot be read.
    """
    from ..train.config import DataConfig
    from ..train.data import ImageData, load_data

    check_output_type(spec, "uint8")
    if label is None:
        label = _DEFAULT_LABEL.get(source, "") if spec.num_classes else ""
    if label and not spec.num_classes:
        raise ConfigError(f"label is {label!r}, but this model has no labels, expected none. Leave --label out.")
    if stats is None and max(reference_rows[0], real_rows[0]) < min(reference_rows[1], real_rows[1]):
        raise ConfigError(f"reference rows {reference_rows} and real rows {real_rows} overlap, expected disjoint ones.")
    wanted = (*spec.image_shape[1:], spec.image_shape[0])
    loaded: dict[str, ImageData] = {}
    pictures: dict[str, np.ndarray] = {}
    for name, rows in (("real", real_rows), ("reference", reference_rows)):
        if name == "reference" and stats is not None:
            continue
        data = loaded[name] = load_data(DataConfig(source=source, label=label, rows=rows))
        if not isinstance(data.images, np.ndarray) or data.images.dtype != np.uint8:
            raise ConfigError(f"data {source!r} is shards or floats, expected 8-bit pictures to compare with.")
        pictures[name] = data.images
        if data.images.shape[1:] != wanted:
            raise ConfigError(
                f"data {source!r} has pictures {data.images.shape[1:]}, expected {wanted}, those of the model. "
                "Resize the data yourself: how it is done is part of the result."
            )
        if len(data) < MIN_IMAGES:
            raise ConfigError(f"{name} rows are {len(data)}, expected at least {MIN_IMAGES}. Give more.")
    real, held = loaded["real"], loaded.get("reference")
    order = _order(spec, real.class_names) if label else None
    return HeldOut(
        reference=read_stats(stats, net, wanted) if stats is not None else pictures["reference"],
        labels=None if order is None or held is None or held.labels is None else order[held.labels],
        other=pictures["real"],
        other_labels=None if order is None or real.labels is None else order[real.labels],
        colours=() if order is None or not real.label_values
        else tuple(real.label_values[i] for i in np.argsort(order)),
    )  # fmt: skip


def _order(spec: SamplerSpec, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Return the model's number of each of the data's labels, matched by name."""
    own = spec.class_names
    if not own and spec.num_classes == len(names):
        return np.arange(len(names), dtype=np.int64)
    if set(own) != set(names):
        missing = sorted(set(names) ^ set(own))
        raise ConfigError(
            f"the data's labels are {', '.join(names)}, the model's {', '.join(own) or spec.num_classes}: expected the "
            f"same ({', '.join(missing[:3])} is in one alone). Choose the column it was trained on with --label."
        )
    return np.array([own.index(name) for name in names], np.int64)
