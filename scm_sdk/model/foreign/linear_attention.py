"""SANA's linear attention in a form that the ONNX exporter preserves.

diffusers protects the division by ``+ 1e-15``, which torch's ONNX exporter treats as ``+ 0`` and drops: a position
whose queries are all negative then divides 0 by 0. A lower bound has the same effect and is exported. The sums are
computed without the row of ones that diffusers appends to the values.

Source: arXiv 2410.10629, section 2.2: ``relu(Q) (relu(K)^T V) / relu(Q) sum(relu(K))``.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1e-15
"""Lower bound of the denominator, which is 0 or far larger."""


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the mixed values, (B, heads, d, T), in the dtype of the inputs.

    Args:
        query: Not negative, (B, heads, d, T).
        key: The same.
        value: (B, heads, d, T).
    """
    mixed = (value @ key.transpose(-1, -2)) @ query
    total = (query * key.sum(dim=-1, keepdim=True)).sum(dim=-2, keepdim=True)
    return mixed / total.clamp_min(LEAST)


def quadratic_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the same as ``linear_attention``, computed over all pairs: cheaper for few positions."""
    scores = key.transpose(-1, -2) @ query
    return value @ (scores / scores.sum(dim=-2, keepdim=True).clamp_min(LEAST))


class LinearAttention:
    """A diffusers attention processor for the transformer's self-attention."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Return the attention's output, (B, T, C).

        Args:
            attn: The module whose processor this is.
            hidden_states: (B, T, C).
        """
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query, key, value = (each.transpose(1, 2).unflatten(1, (attn.heads, -1)) for each in (query, key, value))
        mixed = linear_attention(torch.relu(query), torch.relu(key), value)
        out: Tensor = attn.to_out[0](mixed.flatten(1, 2).transpose(1, 2))
        return out


def guard_transformer(transformer: nn.Module) -> None:
    """Set ``LinearAttention`` as the processor of each self-attention of a SANA transformer."""
    for name, module in transformer.named_modules():
        if name.endswith(".attn1"):
            module.processor = LinearAttention()  # pyright: ignore[reportArgumentType]


def guard_autoencoder(decoder: nn.Module) -> None:
    """Give each multi-scale attention of a DC-AE the functions above."""
    for module in decoder.modules():
        if hasattr(module, "apply_linear_attention"):
            for name, function in (
                ("apply_linear_attention", linear_attention),
                ("apply_quadratic_attention", quadratic_attention),
            ):
                setattr(module, name, MethodType(_without_self(function), module))


def _without_self(function: Any) -> Any:
    return lambda _, query, key, value: function(query, key, value)
