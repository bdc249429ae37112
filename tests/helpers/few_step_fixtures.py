"""Few-step flow pipelines of diffusers with random weights, all of them tiny, made offline."""

from __future__ import annotations

import math
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
    "text_dim": 8, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 64,
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
RCM_TIMES = (math.atan(80), 1.5, 1.4, 1.0)
"""Times of rCM's sampler, radians."""


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


def feeds_of(spec: Any) -> dict[str, np.ndarray]:
    """Noise, embeddings of two prompts, and a mask that keeps all of the first and 7 tokens of the second."""
    noise = np.random.default_rng(0).standard_normal((len(spec.noise_inputs), 2, *spec.sample_shape))
    feeds = {tensor.name: one for tensor, one in zip(spec.noise_inputs, noise.astype(np.float32), strict=True)}
    feeds["prompt_embeds"] = draw_prompts(spec.conditioning[0].shape[1])
    if len(spec.conditioning) > 1:
        mask = np.ones((2, TOKENS), np.int64)
        mask[1, 7:] = 0
        feeds["prompt_attention_mask"] = mask
    return feeds


def pictures_of(name: str, feeds: dict[str, np.ndarray], steps: int, size: dict[str, int] | None = None) -> np.ndarray:
    """What an image pipeline makes of a sampler's inputs, (B, 3, H, W) in [0, 1]; ``size`` is that of ``SIZES``."""
    import torch

    pipeline, noise, embeds = make_pipeline(name), *(torch.from_numpy(feeds[k]) for k in ("noise_0", "prompt_embeds"))
    given: dict[str, Any] = {"prompt_embeds": embeds, "latents": noise}
    if name == "ZImagePipeline":
        kept = [e[m > 0] for e, m in zip(embeds, torch.from_numpy(feeds["prompt_attention_mask"]), strict=True)]
        given = {"prompt_embeds": kept, "latents": noise, "guidance_scale": 0.0}
    images = pipeline(num_inference_steps=steps, output_type="np", **(size or SIZES[name]), **given).images
    return np.moveaxis(images, -1, 1)


def frames_by_rcm(noise: np.ndarray, steps: int) -> np.ndarray:
    """``x = u0 eps``, then ``x = (1 - u') (x - u v) + u' z`` for each step, in float64; decoded by diffusers itself."""
    import torch

    pipeline = make_pipeline("WanPipeline")
    network, vae = pipeline.transformer.double(), pipeline.vae.double()
    embeds = torch.from_numpy(draw_prompts(8)).double()
    levels = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in RCM_TIMES[:steps]]
    try:
        with torch.no_grad():
            x = levels[0] * torch.from_numpy(noise[0]).double()
            for i, (u, after) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True)):
                v = network(x, torch.full((2,), 1000 * u, dtype=torch.float64), embeds, return_dict=False)[0]
                fresh = torch.from_numpy(noise[i + 1]).double() if after else torch.zeros_like(x)
                x = (1 - after) * (x - u * v) + after * fresh
            mean, std = (
                torch.tensor(getattr(vae.config, name)).double().reshape(1, -1, 1, 1, 1)
                for name in ("latents_mean", "latents_std")
            )
            frames: np.ndarray = vae.decode(x * std + mean, return_dict=False)[0].numpy()
    finally:
        network.float()
        vae.float()
    return frames


def frames_of_any_flow(feeds: dict[str, np.ndarray], steps: int) -> np.ndarray:
    """What AnyFlowPipeline makes of a sampler's inputs, (B, T, H, W, 3) in [0, 1]."""
    import torch

    noise, embeds = (torch.from_numpy(feeds[key]) for key in ("noise_0", "prompt_embeds"))
    frames: np.ndarray = make_pipeline("AnyFlowPipeline")(
        prompt_embeds=embeds, latents=noise, num_inference_steps=steps, output_type="np", **SIZES["AnyFlowPipeline"]
    ).frames
    return frames


def save_with_text(name: str, path: Path) -> Path:
    """Save a pipeline with its text encoder; return the folder."""
    pipeline = make_pipeline(name)
    kept = {part: getattr(pipeline, part) for part in ("transformer", "vae", "scheduler")}
    said = {"is_distilled": True} if name == "Flux2KleinPipeline" else {}
    type(pipeline)(**kept, **make_text(name), **said).save_pretrained(path)
    return path


def encode_by_diffusers(name: str, prompts: list[str], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and mask of the pipeline's own ``encode_prompt``; those without padding are filled up with 0."""
    import diffusers
    import torch

    own = getattr(diffusers, name)(vae=None, transformer=None, scheduler=None, **make_text(name))
    with torch.no_grad():
        if name == "Flux2KleinPipeline":
            embeds, _ = own.encode_prompt(prompts, max_sequence_length=tokens)
        else:
            embeds, _ = own.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=tokens)
    lengths = np.array([len(each) for each in embeds])
    rows = [np.pad(each.numpy(), ((0, tokens - len(each)), (0, 0))) for each in embeds]
    return np.stack(rows), (np.arange(tokens) < lengths[:, None]).astype(np.int64)
