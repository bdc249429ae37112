"""Mixed precision: network trunks in half precision, everything else in float32.

Weights, optimizer, times and their embedding, norms, losses and tangents stay float32; convolutions and matrix products
run in half precision. The rearranged tangent makes this possible under a JVP: its directions have the factor
cos(t) sin(t), so that the tangents of the trunk are as large as its activations at every time, also near t = 0 and
t = pi/2, where those of the plain dF/dt are unbounded.

Source: arXiv 2410.11081, section 4 and appendix F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP16_LOSS_SCALE = 2.0**13
"""Loss scale for fp16, whose smallest number is 6e-8. The loss is a mean over elements and samples; the scale makes it
about the sum over a sample."""


def in_precision(network: Callable[..., Tensor], precision: Precision) -> Callable[..., Tensor]:
    """Return the network with calls that run in a precision and return float32."""
    if precision == "fp32":
        return network

    def mixed(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype=_DTYPES[precision], cache_enabled=False):
            F = network(x, t, *args, **kwargs)
        return F.to(x.dtype)

    return mixed


def loss_scale(precision: Precision) -> float:
    """Return the loss scale of the backward pass."""
    return FP16_LOSS_SCALE if precision == "fp16" else 1.0


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], precision: Precision) -> None:
    """Divide the gradients by the loss scale."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if precision == "fp16" and gradients:
        torch._foreach_mul_(gradients, 1.0 / FP16_LOSS_SCALE)
