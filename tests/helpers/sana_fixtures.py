"""A whole SANA-Sprint pipeline with random weights, all of it tiny, made offline: what the tests of it share."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from helpers.commands import run

SIZE, TOKENS = 32, 16
PROMPTS = ["a cat", "a dog on the moon"]
TRANSFORMER = {
    "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8,
    "caption_channels": 8, "sample_size": 32, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "in_channels": 3, "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.41407,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"], "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
    "encoder_qkv_multiscales": [[], [5]], "decoder_qkv_multiscales": [[], [5]],
    "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1], "downsample_block_type": "conv",
    "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
}  # fmt: skip


@pytest.fixture(scope="session")
def sana_pipeline() -> Any:
    """The pipeline."""
    for library in ("torch", "diffusers", "transformers"):
        pytest.importorskip(library)
    return make_sana()


@cache
def make_sana() -> Any:
    """The pipeline, in evaluation mode."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrst"])}
    encoder = transformers.Gemma2Config(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    made = diffusers.SanaSprintPipeline(
        transformer=diffusers.SanaTransformer2DModel(**TRANSFORMER).eval(),
        vae=diffusers.AutoencoderDC(**AUTOENCODER).eval(),
        scheduler=diffusers.SCMScheduler(),
        text_encoder=transformers.Gemma2Model(encoder).eval(),
        tokenizer=transformers.GemmaTokenizer(vocab=vocabulary, merges=[]),
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def sana_folder(sana_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where diffusers saved it; read only."""
    path = tmp_path_factory.mktemp("sana") / "pipeline"
    sana_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sana_bundle(sana_folder: Path, exports: Callable[[], AbstractContextManager[None]]) -> Path:
    """The bundle that the command makes of it, for 1, 2 and 4 steps; read only."""
    out = sana_folder.parent / "bundle"
    with exports():
        run("import", sana_folder, "-o", out, "--size", SIZE, "--tokens", TOKENS, "--max-batch", 3)
    return out


@pytest.fixture(scope="session")
def sana_image_bundle(sana_folder: Path, exports: Callable[[], AbstractContextManager[None]]) -> Path:
    """A bundle with the encoder, samplers of 2 steps from noise and of 1 step from 1.1 radians; read only."""
    from scm_sdk.export.sana import import_sana

    out = sana_folder.parent / "image-bundle"
    with exports():
        import_sana(
            sana_folder, out, steps=(2,), start_time=1.1, size=(SIZE, SIZE), max_sequence_length=TOKENS, max_batch=3,
            text_encoder=False, encoder=True,
        )  # fmt: skip
    return out


@pytest.fixture
def sana_copy(sana_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that the test may damage."""
    return Path(shutil.copytree(sana_folder, tmp_path / "pipeline"))


@pytest.fixture
def sana_bundle_copy(sana_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that the test may add to."""
    return Path(shutil.copytree(sana_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def sana_inputs(sana_pipeline: Any) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Embeddings and mask of two prompts by diffusers, and noise for four steps."""
    return make_sana_inputs()


def make_sana_inputs() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Embeddings and mask of two prompts by diffusers, and noise for four steps."""
    import torch

    with torch.no_grad():
        embeds, mask = make_sana().encode_prompt(PROMPTS, max_sequence_length=TOKENS, complex_human_instruction=None)
    noise = np.random.default_rng(0).standard_normal((4, 2, 4, SIZE // 2, SIZE // 2)).astype(np.float32)
    return embeds.numpy(), mask.numpy(), list(noise)


def encode_by_diffusers(prompts: list[str], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and mask as SanaSprintPipeline's own call makes them, after its instruction."""
    import inspect

    import torch

    pipe = make_sana()
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=tokens, complex_human_instruction=instruction)
    return embeds.numpy(), mask.numpy()


def pictures_of_sana(
    steps: int, guidance: float, size: tuple[int, int] = (SIZE, SIZE), noise: list[np.ndarray] | None = None
) -> np.ndarray:
    """What SanaSprintPipeline makes of the inputs: it draws a fresh noise after each step, the last is multiplied by 0.

    ``noise`` is that of ``size``, height and width; None is that of the inputs.

    Returns:
        (2, H, W, 3) in [0, 1].
    """
    import torch

    embeds, mask, drawn = make_sana_inputs()
    noise = drawn if noise is None else noise
    waiting = iter([*noise[1:steps], np.zeros_like(noise[0])])
    ours = patch("diffusers.schedulers.scheduling_scm.randn_tensor", lambda *_, **__: torch.from_numpy(next(waiting)))
    with torch.no_grad(), ours:
        images = make_sana()(
            prompt_embeds=torch.from_numpy(embeds), prompt_attention_mask=torch.from_numpy(mask), height=size[0],
            width=size[1], num_inference_steps=steps, intermediate_timesteps=1.3 if steps == 2 else None,
            latents=torch.from_numpy(noise[0]), guidance_scale=guidance, use_resolution_binning=False, output_type="np",
        ).images  # fmt: skip
    return np.asarray(images)


def source_pictures() -> np.ndarray:
    """Two pictures to start from, (2, H, W, 3), uint8."""
    return np.random.default_rng(5).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def pictures_from_pictures(images: np.ndarray, times: list[float]) -> np.ndarray:
    """What SanaSprintImg2ImgPipeline makes at one or two times, with our noise in place of its own.

    Returns:
        (2, H, W, 3) in [0, 1].
    """
    import diffusers
    import torch
    from PIL import Image

    embeds, mask, noise = make_sana_inputs()
    pipe = diffusers.SanaSprintImg2ImgPipeline(**make_sana().components)
    pipe.set_progress_bar_config(disable=True)
    waiting = iter([*noise[: len(times)], np.zeros_like(noise[0])])

    def ours(module: str) -> Any:
        return patch(f"diffusers.{module}.randn_tensor", lambda *_, **__: torch.from_numpy(next(waiting)))

    with (
        torch.no_grad(),
        ours("pipelines.sana.pipeline_sana_sprint_img2img"),
        ours("schedulers.scheduling_scm"),
    ):
        made = pipe(
            image=[Image.fromarray(image) for image in images], strength=1.0, num_inference_steps=len(times),
            max_timesteps=times[0], intermediate_timesteps=times[1] if len(times) > 1 else None,
            prompt_embeds=torch.from_numpy(embeds), prompt_attention_mask=torch.from_numpy(mask), height=SIZE,
            width=SIZE, guidance_scale=4.0, use_resolution_binning=False, output_type="np",
        ).images  # fmt: skip
    return np.asarray(made)
