"""Magnitude-preserving layers: unit-variance inputs give unit-variance outputs for any weights.

The weight of a layer is normalized on every use. Training also normalizes the stored weights before each iteration
(``normalize_weights_``), so that the effective learning rate is that of the optimizer. For inference and export the
normalized weights permanently replace the stored ones (``bake_weights_``), which leaves plain convolutions.

Source: Karras et al. 2024, arXiv 2312.02696, section 2 and appendix B.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError

EPS = 1e-4
SILU_GAIN = 1 / 0.596
"""One over the root mean square of ``silu`` of a standard normal number."""


def normalize(x: Tensor, dim: int | tuple[int, ...] = 1) -> Tensor:
    """Divide by the root mean square over some axes: ``x / (eps + ||x|| / sqrt(n))``."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    share = math.sqrt(norm.numel() / x.numel()) if isinstance(dim, tuple) else x.shape[dim] ** -0.5
    out: Tensor = x / (norm * share + EPS)
    return out


def mp_silu(x: Tensor) -> Tensor:
    """Return ``silu(x)`` with the magnitude of x."""
    return functional.silu(x) * SILU_GAIN


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Blend two uncorrelated tensors with ``share`` of b; the result has their magnitude."""
    norm = math.hypot(1 - share, share)
    return a * ((1 - share) / norm) + b * (share / norm)


def mp_cat(a_BCHW: Tensor, b_BCHW: Tensor, share: float) -> Tensor:
    """Concatenate channels; b has ``share`` of the influence for any number of channels."""
    num_a, num_b = a_BCHW.shape[1], b_BCHW.shape[1]
    scale = math.sqrt((num_a + num_b) / ((1 - share) ** 2 + share**2))
    weight_a, weight_b = scale * (1 - share) / math.sqrt(num_a), scale * share / math.sqrt(num_b)
    return torch.cat([a_BCHW * weight_a, b_BCHW * weight_b], dim=1)


class MPConv(nn.Module):
    """A convolution, or a linear layer if ``kernel`` is 0, without bias and with normalized weights.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel: Kernel size, odd; 0 for a linear layer.
        learned_gain: Multiply the output by a learned scalar, initialized to 0.
        scale: Constant factor of the output.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, learned_gain: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel] * (2 if kernel else 0)))
        # Shape (1,), not (): FSDP2 splits parameters along their first axis.
        self.gain = nn.Parameter(torch.zeros(1)) if learned_gain else None
        self.scale, self.padding = scale, kernel // 2
        self.baked = False

    def plain_weight(self) -> Tensor:
        """Return the effective weight, like ``weight``."""
        return self.weight if self.baked else self.weight * self.factor()

    def factor(self) -> Tensor:
        """Return the factor of the weights of each output channel, (out_channels, 1, ...).

        It is ``gain * scale / sqrt(n) / (eps + ||w|| / sqrt(n))`` for n weights in a channel.
        """
        root = math.sqrt(self.weight[0].numel())
        norm = torch.linalg.vector_norm(self.weight, dim=tuple(range(1, self.weight.ndim)), keepdim=True)
        factor: Tensor = (self.scale / root) / (norm * (1 / root) + EPS)
        return factor if self.gain is None else factor * self.gain

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, H, W), or (B, out_channels)."""
        weight = self.plain_weight()
        if weight.ndim == 2:
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, padding=self.padding)


@torch.no_grad()
def normalize_weights_(network: nn.Module) -> None:
    """Normalize the stored weights in place, before each training iteration. The output of the network is unchanged.

    A separate step, because forward-mode differentiation does not allow in-place writes in ``forward``.
    """
    for layer in _mp_layers(network):
        layer.weight.copy_(normalize(layer.weight, tuple(range(1, layer.weight.ndim))))


@torch.no_grad()
def bake_weights_(network: nn.Module) -> None:
    """Replace each stored weight permanently by its effective value, including gains.

    The network computes the same with plain convolutions. No second copy of the weights is made. The network can
    neither be trained nor saved afterwards. Networks without such layers and baked networks are unchanged.
    """
    for layer in _mp_layers(network):
        if not layer.baked:
            layer.weight.mul_(layer.factor())
            layer.weight.requires_grad_(False)
            layer.baked = True


def baked(network: nn.Module) -> nn.Module:
    """Return a network with baked weights: the network itself if it is baked, else a copy."""
    if all(layer.baked for layer in _mp_layers(network)):
        return network
    network = copy.deepcopy(network)
    bake_weights_(network)
    return network


def require_unbaked(network: nn.Module) -> None:
    """Refuse a network whose weights were baked and differ from its checkpoint.

    Raises:
        ConfigError: If it is baked.
    """
    if any(layer.baked for layer in _mp_layers(network)):
        raise ConfigError(
            "the network's weights are baked for inference, expected those of the checkpoint. Load it again."
        )


def _mp_layers(network: nn.Module) -> list[MPConv]:
    return [module for module in network.modules() if isinstance(module, MPConv)]
