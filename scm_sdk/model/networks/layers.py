"""Layers of the sCM networks; all support JVPs and export.

Of the paper's three changes the modulation is here, doubly normalized: ``y = norm(x) * pnorm(s(t)) + pnorm(b(t))``; the
time is embedded in ``conditioning``.

Attention is written as MatMul + Softmax: forward-mode differentiation supports it (the fused kernels
do not) and ONNX opset 20 carries it to engines that fuse it again.

Shape letters: B batch, C channels, H height, W width, E embedding, N tokens.
Source: arXiv 2410.11081, section 4.1.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

_HALF = (torch.float16, torch.bfloat16)


def pixel_norm(x: Tensor, *, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Divide by the root mean square over ``dim``, the channels: ``x / sqrt(mean_c(x^2) + eps)``.

    Computed in at least float32, because the squares would overflow in half precision.
    """
    if x.dtype in _HALF:
        return pixel_norm(x.float(), dim=dim, eps=eps).to(x.dtype)
    return x * torch.rsqrt(x.square().mean(dim=dim, keepdim=True) + eps)


class GroupNorm(nn.GroupNorm):
    """Group normalization that accepts any memory layout and can be compiled under a JVP.

    The native kernel's forward derivative needs a contiguous input and cannot be traced by
    ``torch.compile``; there the plain formula is used, which the compiler fuses.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...)."""
        if x.dtype in _HALF:  # the native kernel would return a tangent of another dtype
            return self.forward(x.float()).to(x.dtype)
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return super().forward(x.contiguous())
        groups = x.reshape(x.shape[0], self.num_groups, -1)
        mean = groups.mean(dim=2, keepdim=True)
        centered = groups - mean
        out = centered * torch.rsqrt(centered.square().mean(dim=2, keepdim=True) + self.eps)
        out = out.reshape(x.shape)
        if self.affine:
            shape = (1, -1, *([1] * (x.ndim - 2)))
            out = out * self.weight.reshape(shape) + self.bias.reshape(shape)
        return out


def group_norm(channels: int, *, affine: bool = True) -> GroupNorm:
    """Return a group normalization with up to 32 groups of at least 4 channels."""
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels, eps=1e-6, affine=affine)


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zero_(layer: Layer) -> Layer:
    """Zero the weights, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class AdaptiveDoubleNorm(nn.Module):
    """``norm(x) * pnorm(s) + pnorm(b)`` with ``s, b`` affine in the embedding.

    There is no "+1" on the scale: pixel normalization already gives it unit magnitude.
    ``double=False`` is plain AdaGN, ``norm(x) * (1 + s) + b``, which diverges in consistency
    training; it exists for ablations.
    """

    def __init__(self, channels: int, emb_channels: int, *, double: bool = True, norm_affine: bool = False) -> None:
        super().__init__()
        self.norm = group_norm(channels, affine=norm_affine)
        self.affine = nn.Linear(emb_channels, 2 * channels)
        self.normalize_affine = double
        with torch.no_grad():
            self.affine.bias[:channels].fill_(1.0 if double else 0.0)
            self.affine.bias[channels:].normal_(std=0.1 if double else 0.0)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        """Modulate (B, C, H, W) by embeddings (B, E)."""
        scale_BC, shift_BC = self.affine(emb_BE).chunk(2, dim=1)
        if self.normalize_affine:
            scale_BC, shift_BC = pixel_norm(scale_BC), pixel_norm(shift_BC)
        else:
            scale_BC = scale_BC + 1.0
        out: Tensor = self.norm(x_BCHW) * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]
        return out


class ResBlock(nn.Module):
    """Two 3x3 convolutions around an adaptive double normalization, with a residual connection."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, *, dropout: float, double_norm: bool
    ) -> None:
        super().__init__()
        self.norm = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = AdaptiveDoubleNorm(out_channels, emb_channels, double=double_norm)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        """Return (B, out_channels, H, W)."""
        h = self.conv0(functional.silu(self.norm(x_BCHW)))
        h = functional.silu(self.modulation(h, emb_BE))
        skip: Tensor = self.skip(x_BCHW)
        out: Tensor = (skip + self.conv1(self.dropout(h))) * math.sqrt(0.5)
        return out


def attention(qkv_BCHW: Tensor, num_heads: int) -> Tensor:
    """Attend between all places of a map.

    Args:
        qkv_BCHW: Queries, keys and values one after the other, (B, 3 C, H, W).
        num_heads: Heads that C is split into.

    Returns:
        (B, C, H, W).
    """
    B, _, H, W = qkv_BCHW.shape
    qkv = qkv_BCHW.reshape(B, 3, num_heads, -1, H * W)
    return attend(*qkv.transpose(-2, -1).unbind(1)).transpose(-2, -1).reshape(B, -1, H, W)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ``softmax(q k^T / sqrt(channels)) v``, like q.

    Args:
        q: Queries, (B, heads, N, channels).
        k: Keys, like q.
        v: Values, like q.
    """
    scale = q.shape[-1] ** -0.5
    # Written out, not scaled_dot_product_attention: the tangent needs it. Engines fuse this form.
    weights = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)
    return weights @ v


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, *, head_channels: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // head_channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        h = attention(self.qkv(self.norm(x_BCHW)), self.num_heads)
        out: Tensor = (x_BCHW + self.proj(h)) * math.sqrt(0.5)
        return out
