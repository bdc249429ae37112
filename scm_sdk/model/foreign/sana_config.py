"""Allowed content of the JSON files of a SANA-Sprint folder; unknown settings are refused."""

from __future__ import annotations

import msgspec


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``transformer/config.json``: the arguments of ``SanaTransformer2DModel``."""

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int | None = 20
    cross_attention_head_dim: int | None = 112
    cross_attention_dim: int | None = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``scheduler/scheduler_config.json``."""

    num_train_timesteps: int = 1000
    prediction_type: str = "trigflow"
    sigma_data: float = 0.5


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an import that the pipeline takes per call; ``scm_import.json`` next to the index.

    Attributes:
        height: Image height, pixels; 0 is the native size of the transformer.
        width: Image width, pixels; 0 is the native size of the transformer.
        max_sequence_length: Tokens of a prompt.
    """

    height: int = 0
    width: int = 0
    max_sequence_length: int = 300
