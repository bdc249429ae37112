"""Load and check the real images for the comparison with generated ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from ...inference.request import check_output_type
from ...spec import SamplerSpec
from .distances import FeatureStats
from .nets import FeatureNet
from .quality import MIN_IMAGES
from .reference_stats import read_stats

if TYPE_CHECKING:
    from ...train.config import DataConfig
    from ...train.data.images import ImageData

_DEFAULT_LABEL = {"avatars": "hairColor"}
MAX_ROWS = 10_000
"""Default maximum number of rows of each set."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Real images, uint8 (N, H, W, C), and their labels in the order of the model.

    Attributes:
        reference: Held-out images, or their statistics.
        labels: Labels of the held-out images, (N,) int64; None if labels are not scored.
        other: Other real images, for the real-vs-real distance and for fitting the label reader.
        other_labels: Labels of ``other``.
        colors: Exact color of each label of the model; () if labels are not colors.
        about: Description of data and rows.
    """

    reference: NDArray[np.uint8] | FeatureStats
    labels: NDArray[np.int64] | None
    other: NDArray[np.uint8]
    other_labels: NDArray[np.int64] | None
    colors: tuple[str, ...]
    about: str


def load_held_out(
    spec: SamplerSpec,
    net: FeatureNet,
    *,
    source: str | None = None,
    label: str | None = None,
    reference_rows: tuple[int, int] | None = None,
    real_rows: tuple[int, int] | None = None,
    stats: Path | None = None,
    trained_on: DataConfig | None = None,
) -> HeldOut:
    """Load the real images for a model, and raise errors before the sampling starts.

    Arguments that are None default to ``trained_on``: its source and label, its rows as the real ones, and the rows
    after them as the held-out ones, at most 10,000 each. If no rows were held out, halves of the data are compared.

    Args:
        spec: Sampler of the model: size, channels and labels of its images.
        net: The feature network, which statistics must match.
        source: Data source, as for ``train``.
        label: Label column, "" for none; if nothing is recorded, None is that of the shipped data for a model with
            labels.
        reference_rows: Held-out rows.
        real_rows: Other real rows.
        stats: File of statistics that replace the held-out rows.
        trained_on: Training data of the model, from ``recorded_data``.

    Raises:
        ConfigError: If images or labels of model and data do not match, the rows overlap or are too few, or the source
            is neither given nor recorded.
        TrainError: If the data cannot be read.
        IntegrityError: If the statistics cannot be read.
    """
    from ...train.config import DataConfig
    from ...train.data.images import load_data

    check_output_type(spec, "uint8")
    same = trained_on is not None and source in (None, trained_on.source)
    if source is None:
        if trained_on is None:
            raise ConfigError("the model does not say which data it was trained on. Give it: --data and --label.")
        source = trained_on.source
    if not spec.num_classes:
        if label:
            raise ConfigError(f"label is {label!r}, but this model has no labels, expected none. Leave --label out.")
        label = ""
    elif label is None:
        label = trained_on.label if trained_on is not None else _DEFAULT_LABEL.get(source, "")
    data = load_data(DataConfig(source=source, label=label))
    trained = trained_on.rows if same and trained_on is not None else (0, 0)
    default = _default_rows(len(data), trained)
    real_rows, reference_rows = real_rows or default[0], reference_rows or default[1]
    if stats is None and _overlap(reference_rows, real_rows):
        raise ConfigError(
            f"held-out rows {reference_rows} (--rows) and real rows {real_rows} (--real-rows) overlap, expected "
            "disjoint ones."
        )
    wanted = (*spec.image_shape[1:], spec.image_shape[0])
    if not isinstance(data.images, np.ndarray) or data.images.dtype != np.uint8:
        raise ConfigError(f"data {source!r} is shards or floats, expected 8-bit pictures to compare with.")
    if data.images.shape[1:] != wanted:
        raise ConfigError(
            f"data {source!r} has pictures {data.images.shape[1:]}, expected {wanted}, those of the model. "
            "Resize the data yourself: how it is done is part of the result."
        )
    real = data.part(*real_rows, what="real rows (--real-rows)")
    held = real if stats is not None else data.part(*reference_rows, what="held-out rows (--rows)")
    for name, part in (("real rows (--real-rows)", real), ("held-out rows (--rows)", held)):
        if len(part) < MIN_IMAGES:
            raise ConfigError(f"{name} are {len(part)}, expected at least {MIN_IMAGES}. Give more.")
    order = _order(spec, data.class_names) if label else None
    return HeldOut(
        reference=read_stats(stats, net, wanted) if stats is not None else _pictures(held),
        labels=None if order is None or stats is not None or held.labels is None else order[held.labels],
        other=_pictures(real),
        other_labels=None if order is None or real.labels is None else order[real.labels],
        colors=() if order is None or not data.label_values
        else tuple(data.label_values[i] for i in np.argsort(order)),
        about=f"{Path(source).name}, label {label or 'none'}: real rows {_rows(real_rows)}, "
        + (f"statistics of {stats}" if stats is not None else f"held-out rows {_rows(reference_rows)}")
        + (", which the model was trained on" if same and stats is None
           and (trained == (0, 0) or _overlap(reference_rows, trained)) else ""),
    )  # fmt: skip


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def _default_rows(count: int, trained: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return real and held-out rows for a model that was trained on some rows of the data, (0, 0) for all."""
    first, last = trained
    if trained == (0, 0) or last >= count:
        first, last = 0, count // 2
    return (first, min(last, first + MAX_ROWS)), (last, min(count, last + MAX_ROWS))


def _pictures(data: ImageData) -> NDArray[np.uint8]:
    pictures: NDArray[np.uint8] = data.images[:]
    return pictures


def _rows(rows: tuple[int, int]) -> str:
    return f"{rows[0]}..{rows[1] - 1}"


def _order(spec: SamplerSpec, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Return the number in the model of each label of the data, matched by name."""
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
