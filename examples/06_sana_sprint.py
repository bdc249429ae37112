"""A SANA-Sprint pipeline, as diffusers saves it, from its folder to pictures of a prompt in one ONNX graph.

    python examples/06_sana_sprint.py sana

runs offline: it first makes a pipeline of the released kind, tiny and with random weights. For a real one leave that
out and give its folder to ``import_sana``, or to the command: scm-export import FOLDER -o sana --steps 2
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from scm_sdk import Generator, import_sana

WORDS = {name: i for i, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"])}


def save_tiny_pipeline(folder: Path) -> None:
    """Write what ``SanaSprintPipeline.save_pretrained`` writes of a real one, in a tenth of a megabyte."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32, qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip
    autoencoder = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),  # pyright: ignore[reportArgumentType]
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),  # pyright: ignore[reportArgumentType]
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), upsample_block_type="interpolate",
        downsample_block_type="conv", scaling_factor=0.41407,
    )  # fmt: skip
    text_encoder = Gemma2Config(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    SanaSprintPipeline(
        transformer=transformer, vae=autoencoder, scheduler=SCMScheduler(), text_encoder=Gemma2Model(text_encoder),  # pyright: ignore[reportArgumentType]
        tokenizer=GemmaTokenizer(vocab=WORDS, merges=[]),
    ).save_pretrained(folder)  # fmt: skip


def main(folder: Path) -> None:
    """Make, import, generate."""
    save_tiny_pipeline(folder / "pipeline")
    report = import_sana(folder / "pipeline", folder / "bundle", steps=(2,), overwrite=True)
    print(f"one graph of {report.graphs[0].num_nodes} nodes: 2 steps and the decoder, {report.bytes / 1e6:.1f} MB")
    with Generator.from_pretrained(folder / "bundle", backend="onnxruntime") as gen:
        out = gen(2, prompt=["a red fox", "a blue bird"], seed=7, guidance_scale=4.5)
        out.images[0].save(folder / "fox.png")
        alone = gen(prompt="a blue bird", seed=8)
    # Batches of another size may differ in the last bit of a float32: one level of 255.
    same = np.abs(np.asarray(alone.images[0], int) - np.asarray(out.images[1], int)).max() <= 1
    print(f"the bird alone equals the bird with the fox: {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the pipeline, the bundle and a picture")
    main(parser.parse_args().folder)
