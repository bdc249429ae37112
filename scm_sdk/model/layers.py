"""Layers of the sCM networks: the three changes of the paper and nothing that breaks a JVP or an export.

1. The network sees the time ``t`` itself (identity), not a logarithm of a noise level.
2. ``t`` is embedded by slow sinusoids (positional), not by fast Fourier features.
3. Modulation is doubly normalized: ``y = norm(x) * pnorm(s(t)) + pnorm(b(t))``.

Attention is written as MatMul + Softmax: forward-mode differentiation supports it (the fused kernels
do not) and ONNX opset 20 carries it to engines that fuse it again.

Shape letters: B batch, C channels, H height, W width, E embedding, N tokens.
Source: arXiv 2410.11081, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError

_HALF = (torch.float16, torch.bfloat16)
Embed = TypeVar("Embed", bound=Callable[..., Tensor])


def float32_island(method: Embed) -> Embed:
    """Keep a method out of mixed precision: the time and its embedding are never rounded to half.

    bfloat16 would turn t = 1.5645, sigma 80, into 1.5625, sigma 60.
    """

    @wraps(method)
    def outside(self: nn.Module, t_B: Tensor, *args: Any) -> Tensor:
        device = t_B.device.type
        if not torch.is_autocast_enabled(device):
            return method(self, t_B, *args)
        with torch.autocast(device, enabled=False):
            return method(self, t_B, *args)

    return cast(Embed, outside)


def pixel_norm(x: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Divide by the root mean square over axis 1, the channels: ``x / sqrt(mean_c(x^2) + eps)``.

    Never computed in less than float32: in half precision the squares would overflow.
    """
    if x.dtype in _HALF:
        return pixel_norm(x.float(), eps=eps).to(x.dtype)
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)


class PositionalEmbedding(nn.Module):
    """Sinusoids of the raw time: ``[cos(t f), sin(t f)]`` with ``f_i = max_period^(-i / (E/2 - 1))``.

    Args:
        channels: Size E of the embedding; even, at least 4.
        max_period: Ratio between the fastest frequency, 1, and the slowest.
        fourier_scale: Standard deviation of normal frequencies, cycles per radian, in place of these; 0 for none. For
            ablations: a scale of 16, usual in diffusion models, makes consistency training unstable, since the
            embedding's derivative is as large; 0.02 comes near to the sinusoids. They are the normal distribution's
            quantiles and not drawn, so that no checkpoint need hold them.
    """

    frequencies: Tensor

    def __init__(self, channels: int, max_period: float = 10_000.0, fourier_scale: float = 0.0) -> None:
        super().__init__()
        self.channels, self.max_period, self.fourier_scale = channels, max_period, fourier_scale
        self.register_buffer("frequencies", torch.empty(0), persistent=False)
        self.make_frequencies()

    def make_frequencies(self) -> None:
        """Compute the frequencies, which no checkpoint holds."""
        half = self.channels // 2
        if self.fourier_scale:
            share = 0.5 + (torch.arange(half, dtype=torch.float64) + 0.5) / (2 * half)
            self.frequencies = (2 * math.pi * self.fourier_scale * torch.special.ndtri(share)).float()
            return
        exponent = torch.arange(half, dtype=torch.float64) / (half - 1)
        self.frequencies = torch.exp(-math.log(self.max_period) * exponent).float()

    def forward(self, t_B: Tensor) -> Tensor:
        """Embed times (B,), radians, as (B, E) in the dtype of ``t_B``, at least float32."""
        angle_BE = t_B[:, None] * self.frequencies.to(t_B.dtype)
        return torch.cat([angle_BE.cos(), angle_BE.sin()], dim=1)


class Conditioned(nn.Module):
    """A network's branch that embeds the time, the label and the guidance scale; networks derive from it.

    The guidance scale s is embedded like the time, by sinusoids and one linear layer, which starts at zero: a student
    begins as the teacher whose weights it is given (arXiv 2410.11081, section 5.2).

    Args:
        time_channels: Size of the sinusoidal embeddings.
        emb_channels: Size E of what ``embed`` returns.
        max_period: Of the sinusoids.
        fourier_scale: Of Fourier features in their place.
        num_classes: Class labels; 0 for none.
        guidance: Whether there is a guidance scale.
    """

    def __init__(
        self,
        *,
        time_channels: int,
        emb_channels: int,
        max_period: float,
        fourier_scale: float,
        num_classes: int,
        guidance: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.guidance = num_classes, guidance
        self.time_embedding = PositionalEmbedding(time_channels, max_period, fourier_scale)
        self.time_linear0 = nn.Linear(time_channels, emb_channels)
        self.time_linear1 = nn.Linear(emb_channels, emb_channels)
        # One row more than there are labels: the last is "no label".
        self.label_embedding = nn.Embedding(num_classes + 1, emb_channels) if num_classes else None
        self.guidance_linear = zero_(nn.Linear(time_channels, emb_channels)) if guidance else None

    @float32_island
    def embed(self, t_B: Tensor, class_labels_B: Tensor | None, guidance_scale_B: Tensor | None) -> Tensor:
        """Embed times, labels and guidance scales as (B, E); float32 whatever the dtype of the trunk.

        Raises:
            ShapeError: If labels or guidance are given to a network without them.
        """
        check_conditioning(self.num_classes, self.guidance, class_labels_B, guidance_scale_B)
        emb = self.time_linear1(functional.silu(self.time_linear0(self.time_embedding(t_B))))
        if self.label_embedding is not None:
            if class_labels_B is None:
                class_labels_B = torch.full_like(t_B, self.num_classes, dtype=torch.long)
            emb = emb + self.label_embedding(class_labels_B)
        if self.guidance_linear is not None:
            if guidance_scale_B is None:
                guidance_scale_B = torch.ones_like(t_B)
            emb = emb + self.guidance_linear(self.time_embedding(guidance_scale_B))
        return functional.silu(emb)


def check_conditioning(
    num_classes: int, guidance: bool, class_labels: Tensor | None, guidance_scale: Tensor | None
) -> None:
    """Refuse labels or guidance that a network would ignore.

    Raises:
        ShapeError: If there are any.
    """
    if class_labels is not None and not num_classes:
        raise ShapeError("class_labels were given, expected None: this network has num_classes = 0.")
    if guidance_scale is not None and not guidance:
        raise ShapeError("guidance_scale was given, expected None: this network has guidance = False.")


class GroupNorm(nn.GroupNorm):
    """Group normalization that accepts any memory layout and can be compiled under a JVP.

    The native kernel's forward derivative needs a contiguous input and cannot be traced by
    ``torch.compile``; there the plain formula is used, which the compiler fuses.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...)."""
        if x.dtype in _HALF:  # the native kernel would give its tangent another dtype
            return self.forward(x.float()).to(x.dtype)
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return super().forward(x.contiguous())
        groups = x.reshape(x.shape[0], self.num_groups, -1)
        mean = groups.mean(dim=2, keepdim=True)
        centred = groups - mean
        out = centred * torch.rsqrt(centred.square().mean(dim=2, keepdim=True) + self.eps)
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
    return attend(*qkv.transpose(-2, -1).unbind(1)).reshape(B, -1, H, W)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ``softmax(q k^T / sqrt(channels)) v``, channels before places.

    Args:
        q: Queries, (B, heads, N, channels).
        k: Keys, like q.
        v: Values, like q.

    Returns:
        (B, heads, channels, N).
    """
    scale = q.shape[-1] ** -0.5
    # Written out, not scaled_dot_product_attention: the tangent needs it. Engines fuse this form.
    weights = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)
    return (weights @ v).transpose(-2, -1)


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
