"""Recognize the label of a pixel-art image from its colors, without a network.

If a class label is a color (hair, skin, clothing or background of the avatars), generated images can be checked
exactly: the color is a palette entry, and its position in the image is known from real images. ``fit_label_reader``
learns the positions, ``label_accuracy`` compares requested with read labels, ``palette_share`` measures the share of
palette colors.

The model of one pixel x at position p under label k, with the pixels taken as independent:

    L_k(x, p) = prior_p * Normal(x; color_k, NOISE^2) + (1 - prior_p) * other(x)

``prior_p`` is how often the labeled part covers p in real pictures, ``other`` a coarse histogram of
all other colors, ``NOISE`` allows for color noise of a generator: two of the brown hair colors
differ by 10 of 255 in one channel, but an image shows dozens of such pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, ShapeError
from .features import check_images

NOISE = 6.0
"""Assumed standard deviation of a generated pixel around its palette color, of 255."""
MIN_MARGIN = 3.0
"""Minimum natural-log odds between the best label and the next; below, an image is undecided."""
UNDECIDED = -1

_BINS = 64  # cells per channel of the histogram of other colors,
_LEVELS = 256 // _BINS  # width of a cell
_STRAY = 1e-2  # share of pixels with arbitrary colors: limits the influence of one pixel
_CHUNK = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelReader:
    """Label reader fitted to real images.

    Attributes:
        names: Label names in order, each ``#rrggbb``.
        colors: (K, 3), float64, 0..255.
        prior: (H, W), float64: how often the labeled part covers a pixel.
        other: (64, 64, 64), float64: density of all other colors, blurred by NOISE, per level cubed.
    """

    names: tuple[str, ...]
    colors: NDArray[np.float64]
    prior: NDArray[np.float64]
    other: NDArray[np.float64]

    def read(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the label of each picture, (N,), or ``UNDECIDED`` where the part cannot be seen.

        Args:
            images: (N, H, W, 3), uint8, of the size that was fitted.

        Raises:
            ShapeError: If the pictures have another size or dtype.
        """
        check_images(images, name="the")
        if images.shape[1:] != (*self.prior.shape, 3):
            raise ShapeError(
                f"the images are {images.shape[1:]}, expected {(*self.prior.shape, 3)}, "
                "the size of the pictures that this reader was fitted on."
            )
        labels = np.full(len(images), UNDECIDED, np.int64)
        for start in range(0, len(images), _CHUNK):
            scores = self._log_likelihood(images[start : start + _CHUNK])
            second, best = np.partition(scores, -2, axis=1)[:, -2:].T
            decided = best - second >= MIN_MARGIN
            labels[start : start + _CHUNK][decided] = scores.argmax(axis=1)[decided]
        return labels

    def _log_likelihood(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        red, green, blue = np.moveaxis(images // _LEVELS, -1, 0)
        rest = (1 - self.prior) * self.other[red, green, blue]
        pixels = images.astype(np.float64)
        peak = self.prior / (2 * math.pi * NOISE**2) ** 1.5
        scores = np.empty((len(images), len(self.colors)))
        for label, color in enumerate(self.colors):
            distance = ((pixels - color) ** 2).sum(axis=-1)
            scores[:, label] = np.log(peak * np.exp(distance / (-2 * NOISE**2)) + rest).sum(axis=(1, 2))
        return scores


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelAccuracy:
    """Agreement of generated images with their requested labels.

    Attributes:
        accuracy: Share of pictures whose read label is the requested one; undecided ones count as wrong.
        undecided: Share of pictures in which the labeled part cannot be seen (a hat hides the hair).
        per_class: Accuracy by label name, for the labels that were requested.
        confusion: (K, K + 1), int64: requested label by read label, the last column undecided.
        count: Number of pictures.
    """

    accuracy: float
    undecided: float
    per_class: dict[str, float]
    confusion: NDArray[np.int64]
    count: int


def parse_colors(names: Sequence[str]) -> NDArray[np.uint8]:
    """Parse names like ``#603a14`` to (K, 3) uint8.

    Raises:
        ConfigError: If a name is not ``#rrggbb``, or there are fewer than two.
    """
    wrong = [name for name in names if not re.fullmatch(r"#[0-9a-fA-F]{6}", name)]
    if wrong or len(names) < 2:
        raise ConfigError(
            f"label names are {list(names)[:4]}…, expected two or more colors like '#603a14'. "
            "Only labels that are colors can be read without a network."
        )
    return np.array([list(bytes.fromhex(name[1:])) for name in names], np.uint8)


def fit_label_reader(images: NDArray[np.uint8], labels: NDArray[np.integer], names: Sequence[str]) -> LabelReader:
    """Learn the position of the labeled color and the other colors from real images.

    Args:
        images: (N, H, W, 3), uint8, real pictures; a few thousand suffice.
        labels: (N,), integers in [0, K).
        names: K label names, each the part's exact color as ``#rrggbb``.

    Raises:
        ShapeError: If ``images`` are not color pictures or ``labels`` are not one per picture.
        ConfigError: If the names are not colors, or the images do not show the colors of their labels.
    """
    check_images(images, name="the")
    if images.shape[3] != 3:
        raise ShapeError(f"the images are {images.shape}, expected (N, H, W, 3): labels are read from colors.")
    colors = parse_colors(names)
    labels = _check_labels(labels, len(images), len(names))
    own = (images == colors[labels][:, None, None]).all(axis=-1)
    shown = own.any(axis=(1, 2)).mean()
    if shown < 0.5:
        raise ConfigError(
            f"{shown:.0%} of the images show the exact color of their label, expected most. "
            "Give pictures as they are in the data set: not resized, not compressed, labels in order."
        )
    cells = np.zeros((_BINS,) * 3)
    np.add.at(cells, tuple((images[~own] // _LEVELS).T), 1.0)
    share = _blur(cells / cells.sum()) / _LEVELS**3
    return LabelReader(
        names=tuple(names),
        colors=colors.astype(np.float64),
        prior=own.mean(axis=0).clip(1e-3, 1 - 1e-3),
        other=(1 - _STRAY) * share + _STRAY / 256**3,
    )


def label_accuracy(images: NDArray[np.uint8], labels: NDArray[np.integer], reader: LabelReader) -> LabelAccuracy:
    """Compare the requested labels with those that the images show.

    Args:
        images: (N, H, W, 3), uint8, generated.
        labels: (N,), integers: the requested labels.
        reader: From ``fit_label_reader`` on real pictures. Score held-out real pictures too: their
            accuracy is the ceiling.

    Raises:
        ShapeError: If the pictures or labels do not fit.
        ConfigError: If a label is out of range.
    """
    read, num = reader.read(images), len(reader.names)
    labels = _check_labels(labels, len(images), num)
    confusion = np.zeros((num, num + 1), np.int64)
    np.add.at(confusion, (labels, np.where(read == UNDECIDED, num, read)), 1)
    asked = confusion.sum(axis=1)
    return LabelAccuracy(
        accuracy=float((read == labels).mean()),
        undecided=float((read == UNDECIDED).mean()),
        per_class={n: float(confusion[k, k] / asked[k]) for k, n in enumerate(reader.names) if asked[k]},
        confusion=confusion,
        count=len(images),
    )


def palette_share(images: NDArray[np.uint8], real: NDArray[np.uint8], *, distance: int = 8) -> float:
    """Return the share of pixels that are near a color of the real pictures.

    Args:
        images: (N, H, W, 3), uint8, generated.
        real: (M, H', W', 3), uint8; every distinct color of theirs counts as palette.
        distance: Largest difference in any channel, of 255.

    Returns:
        Share in [0, 1]. For reference, report it with the share for uniformly random colors, the volume of the palette.

    Raises:
        ShapeError: If a set is not 8-bit color pictures.
        ConfigError: If ``distance`` is out of 0..255.
    """
    if not 0 <= distance <= 255:
        raise ConfigError(f"distance is {distance}, expected 0..255; 8 is the default.")
    for name, stack in (("generated", images), ("real", real)):
        check_images(stack, name=name)
        if stack.shape[3] != 3:
            raise ShapeError(f"{name} images are {stack.shape}, expected (N, H, W, 3): color pictures.")
    seen, near = np.zeros((2, 256, 256, 256), np.bool_)
    seen[tuple(np.moveaxis(real, -1, 0))] = True
    for red, green, blue in np.argwhere(seen):
        low = [max(value - distance, 0) for value in (red, green, blue)]
        near[low[0] : red + distance + 1, low[1] : green + distance + 1, low[2] : blue + distance + 1] = True
    return float(near[tuple(np.moveaxis(images, -1, 0))].mean())


def _blur(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blur color cells by NOISE like the labeled colors; otherwise noisy pixels would favor the labels."""
    center = np.arange(_BINS) * _LEVELS
    kernel = np.exp(((center[:, None] - center) / NOISE) ** 2 / -2)
    kernel /= kernel.sum(axis=0)  # columns sum to 1: no mass is lost at the edges
    for _ in range(3):  # one axis per round; the axes end in their original order
        cells = np.tensordot(cells, kernel, axes=(0, 1))  # pyright: ignore[reportAssignmentType]
    return cells


def _check_labels(labels: NDArray[np.integer], count: int, num_classes: int) -> NDArray[np.int64]:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ShapeError(f"labels are {labels.shape} {labels.dtype}, expected ({count},) integers: one per image.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ConfigError(
            f"labels are in {labels.min()}..{labels.max()}, expected 0..{num_classes - 1}: "
            "the position of each name in the reader's names."
        )
    return labels.astype(np.int64)
