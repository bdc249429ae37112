"""Mixed precision: network trunks in half precision, everything else in float32.

Weights, optimizer, times and their embedding, norms, losses and tangents stay float32; convolutions and matrix products
run in half. It is the rearranged tangent that makes this possible under a JVP: its directions carry cos(t) sin(t), so
that the trunk's tangents are of the size of its activations at every time, near t = 0 and t = pi/2 too, where those of
the plain dF/dt grow without bound.

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
"""Factor of the loss before its gradient is taken in fp16, whose smallest number is 6e-8. The loss is a mean over
elements and samples; this makes of it about the sum over a sample."""


def in_precision(network: Callable[..., Tensor], precision: Precision) -> Callable[..., Tensor]:
    """Return the network such that its calls run in a precision and return float32."""
    if precision == "fp32":
        return network

    def mixed(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype=_DTYPES[precision], cache_enabled=False):
            F = network(x, t, *args, **kwargs)
        return F.to(x.dtype)

    return mixed


def loss_scale(precision: Precision) -> float:
    """Return the factor that the loss has in the backward pass."""
    return FP16_LOSS_SCALE if precision == "fp16" else 1.0


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], precision: Precision) -> None:
    """Take the factor out of the gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if precision == "fp16" and gradients:
        torch._foreach_mul_(gradients, 1.0 / FP16_LOSS_SCALE)
