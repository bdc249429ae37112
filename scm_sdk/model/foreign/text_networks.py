"""Text encoders in a form that exports: any batch size, masks made from the tokens' own, no unused layers.

Each takes ``input_ids`` and ``attention_mask``, (B, T) int64, padded on the right, and returns embeddings, (B, L, D).
The masks of transformers index by the batch, whose shape ONNX does not infer, so that they are made here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError


class _TextNetwork(nn.Module):
    """A model of transformers, float32, for one number of tokens.

    Args:
        model: The model.
        length: Number of tokens, T.
    """

    network: Any
    positions: Tensor
    past: Tensor

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.network = model.float().eval()
        self.network.set_attn_implementation("eager")
        at = torch.arange(length)
        self.register_buffer("positions", at[None], persistent=False)
        self.register_buffer("past", (at[:, None] - at[None, :])[None, None], persistent=False)  # key behind query by

    def causal(self, attention_mask: Tensor, window: int | None = None) -> Tensor:
        """Return what is added to the scores so that a token attends to those before it, (B, 1, T, T)."""
        seen = self.past >= 0 if window is None else (self.past >= 0) & (self.past < window)
        return _added(seen & (attention_mask[:, None, None, :] > 0))


def _added(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


class Gemma2(_TextNetwork):
    """The text encoder of SANA-Sprint.

    Args:
        model: A ``Gemma2Model``.
        length: Tokens of instruction and prompt.
        kept: Positions of the states that are embeddings.
    """

    kept: Tensor

    def __init__(self, model: nn.Module, length: int, kept: list[int]) -> None:
        super().__init__(model, length)
        self.register_buffer("kept", torch.tensor(kept), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last states at the kept positions."""
        window = self.network.config.sliding_window
        masks = {
            "full_attention": self.causal(attention_mask),
            "sliding_attention": self.causal(attention_mask, window),
        }
        states = self.network(
            input_ids=input_ids, attention_mask=masks, position_ids=self.positions, use_cache=False
        )  # fmt: skip
        chosen: Tensor = states.last_hidden_state[:, self.kept]
        return chosen


class Qwen3(_TextNetwork):
    """The text encoder of FLUX.2-klein and Z-Image; layers after the last one that is read are left out.

    Args:
        model: A ``Qwen3Model`` or ``Qwen3ForCausalLM``.
        length: Tokens.
        layers: Numbers of the hidden states that are joined; 0 is the input of the first layer.
        zero_padding: Whether embeddings of padding are 0.

    Raises:
        ConfigError: If the model has fewer layers.
    """

    def __init__(self, model: nn.Module, length: int, layers: tuple[int, ...], *, zero_padding: bool) -> None:
        super().__init__(getattr(model, "model", model), length)
        count = len(self.network.layers)
        if not all(-count - 1 <= layer <= count for layer in layers):
            raise ConfigError(
                f"the text encoder has {count} layers, expected {max(layers)}: it belongs to another model."
            )
        self.chosen = [layer % (count + 1) for layer in layers]
        self.zero_padding = zero_padding
        self.network.layers = self.network.layers[: max(self.chosen)]
        if max(self.chosen) < count:
            self.network.norm = nn.Identity()  # of the last layer's output alone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the joined states, (B, T, layers * D)."""
        network = self.network
        config = network.config
        masks = {
            "full_attention": self.causal(attention_mask),
            "sliding_attention": self.causal(attention_mask, config.sliding_window),
        }
        states = [network.embed_tokens(input_ids)]
        angles = network.rotary_emb(states[0], self.positions)
        for layer, kind in zip(network.layers, config.layer_types, strict=False):
            states.append(layer(states[-1], attention_mask=masks[kind], position_embeddings=angles, use_cache=False))
        states[-1] = network.norm(states[-1])
        embeds = torch.cat([states[i] for i in self.chosen], dim=-1)
        return embeds * attention_mask[:, :, None] if self.zero_padding else embeds


class UMT5(_TextNetwork):
    """The text encoder of Wan and AnyFlow; embeddings of padding are 0.

    Args:
        model: A ``UMT5EncoderModel``.
        length: Tokens.
    """

    buckets: Tensor

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__(model, length)
        attentions = [block.layer[0].SelfAttention for block in self.network.encoder.block]
        # Distances are constants of the length: one table of buckets for all layers.
        self.register_buffer("buckets", attentions[0]._relative_position_bucket(-self.past[0, 0]), persistent=False)
        for attention in attentions:
            attention._relative_position_bucket = lambda _: self.buckets

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last states, (B, T, D)."""
        seen = _added(attention_mask[:, None, None, :] > 0)
        stack: Any = self.network.encoder
        states: Tensor = stack.embed_tokens(input_ids)
        for block in stack.block:
            attention, feed_forward = block.layer  # transformers 5.0 has other masks around them than 5.24
            states = feed_forward(attention(states, attention_mask=seen)[0])
        normed: Tensor = stack.final_layer_norm(states)
        return normed * attention_mask[:, :, None]
