"""Few-step flow pipelines of diffusers with random weights, all of them tiny, made offline."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOKENS = 12
KL = {
    "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4, "latent_channels": 4,
}  # fmt: skip
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
    "text_dim": 8, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip
SIZES = {
    "Flux2KleinPipeline": {"height": 16, "width": 24},
    "ZImagePipeline": {"height": 16, "width": 24},
    "WanPipeline": {"height": 32, "width": 48, "num_frames": 5},
    "AnyFlowPipeline": {"height": 32, "width": 48, "num_frames": 5},
}
"""Image sizes, pixels, and frames of the tests."""
STEPS = {"Flux2KleinPipeline": 4, "ZImagePipeline": 4, "WanPipeline": 2, "AnyFlowPipeline": 3}
"""Numbers of steps of the tests."""


@pytest.fixture(scope="session")
def flow_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where diffusers saved the pipeline of a class; read only."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("flow") / "pipeline"
        make_pipeline(name).save_pretrained(path)
        return path

    return folder


@cache
def make_pipeline(name: str) -> Any:
    """The pipeline of a class, without text encoder, in evaluation mode."""
    import diffusers
    import torch

    torch.manual_seed(0)
    parts = {"text_encoder": None, "tokenizer": None}
    if name == "Flux2KleinPipeline":
        vae = diffusers.AutoencoderKLFlux2(**KL, sample_size=16)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        )  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        made = diffusers.Flux2KleinPipeline(
            scheduler=scheduler, vae=vae.eval(), transformer=transformer.eval(), is_distilled=True, **parts
        )
    elif name == "ZImagePipeline":
        vae = diffusers.AutoencoderKL(**KL, sample_size=16, scaling_factor=0.36, shift_factor=0.12)
        transformer = diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
            axes_dims=[4, 2, 2], axes_lens=[128, 32, 32],
        )  # fmt: skip
        torch.nn.init.normal_(transformer.x_pad_token)
        torch.nn.init.normal_(transformer.cap_pad_token)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        made = diffusers.ZImagePipeline(scheduler=scheduler, vae=vae.eval(), transformer=transformer.eval(), **parts)
    else:
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        if name == "WanPipeline":
            transformer, scheduler = diffusers.WanTransformer3DModel(**WAN), diffusers.FlowMatchEulerDiscreteScheduler()
        else:
            transformer = diffusers.AnyFlowTransformer3DModel(**WAN)
            scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
        made = getattr(diffusers, name)(scheduler=scheduler, vae=vae.eval(), transformer=transformer.eval(), **parts)
    made.set_progress_bar_config(disable=True)
    return made


CHAT = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
"""A chat template of the form that Qwen3's has."""


@cache
def make_text(name: str) -> dict[str, Any]:
    """The tokenizer and the random text encoder of a pipeline's class, which fit ``make_pipeline``'s."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    if name in ("WanPipeline", "AnyFlowPipeline"):
        words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), ("▁", -2.0)]
        words += [(letter, -3.0) for letter in "abcdefghijklmnopqrst&"]
        umt5 = transformers.UMT5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        return {
            "tokenizer": transformers.T5TokenizerFast(vocab=words, extra_ids=0),
            "text_encoder": transformers.UMT5EncoderModel(umt5).eval(),
        }
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "ca"])}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[("c", "a")], additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    qwen3 = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, num_hidden_layers=28 if name == "Flux2KleinPipeline" else 3, max_position_embeddings=256,
    )  # fmt: skip
    kind = transformers.Qwen3ForCausalLM if name == "Flux2KleinPipeline" else transformers.Qwen3Model
    return {"tokenizer": tokenizer, "text_encoder": kind(qwen3).eval()}


def draw_prompts(width: int, count: int = 2) -> np.ndarray:
    """Embeddings of prompts, (count, TOKENS, width), float32."""
    return np.random.default_rng(1).standard_normal((count, TOKENS, width)).astype(np.float32)


def pictures_of(name: str, feeds: dict[str, np.ndarray], steps: int) -> np.ndarray:
    """What an image pipeline makes of a sampler's inputs, (B, 3, H, W) in [0, 1]."""
    import torch

    pipeline, noise, embeds = make_pipeline(name), *(torch.from_numpy(feeds[k]) for k in ("noise_0", "prompt_embeds"))
    given: dict[str, Any] = {"prompt_embeds": embeds, "latents": noise}
    if name == "ZImagePipeline":
        kept = [e[m > 0] for e, m in zip(embeds, torch.from_numpy(feeds["prompt_attention_mask"]), strict=True)]
        given = {"prompt_embeds": kept, "latents": noise, "guidance_scale": 0.0}
    images = pipeline(num_inference_steps=steps, output_type="np", **SIZES[name], **given).images
    return np.moveaxis(images, -1, 1)
