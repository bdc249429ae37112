"""Measure time and memory of importing a SANA-Sprint of real size, with random weights.

    python benchmarks/engines/import_sana.py 0.6B --work runs/sana --json benchmarks/results/import-sana.json

The released layouts (0.6B, 1.6B) with their DC-AE are made from their configs and saved by diffusers, bfloat16, as they
are on the hub. Nothing is downloaded. Each stage is a process of its own, whose peak memory the system reports:
``weights`` saves the pipeline, ``import`` makes the bundle with one graph, from noise to 1024x1024 pixels, and in it
PyTorch's own picture, ``run`` draws that picture again with ONNX Runtime, ``diffusers`` with ``SanaSprintPipeline`` in
float32 from the same noise and embeddings, ``fp16`` adds the FP16 graph, and ``engine`` an engine for the A100 from it.
A stage that is done is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from stages import Stages, add_engine, add_fp16, describe_graph, difference, recorded, run_graph, walk

LAYOUTS: dict[str, dict[str, Any]] = {
    "0.6B": {
        "num_attention_heads": 36, "attention_head_dim": 32, "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72, "cross_attention_dim": 1152, "num_layers": 28,
    },
    "1.6B": {
        "num_attention_heads": 70, "attention_head_dim": 32, "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "num_layers": 20,
    },
}  # fmt: skip
SHARED = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "caption_channels": 2304, "sample_size": 32}
DC_AE: dict[str, Any] = {  # dc-ae-f32c32-sana-1.1
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}


def weights(layout: str, steps: int, folder: Path) -> dict[str, Any]:
    """Save a pipeline without a text encoder: that part is copied and never exported."""
    import torch
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    parts = SanaTransformer2DModel(**LAYOUTS[layout], **SHARED), AutoencoderDC(**DC_AE)
    pipeline = SanaSprintPipeline(
        transformer=parts[0],
        vae=parts[1],
        scheduler=SCMScheduler(),  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return {"parameters": [sum(p.numel() for p in part.parameters()) for part in parts]}


def import_(layout: str, steps: int, folder: Path) -> dict[str, Any]:
    """Make the bundle."""
    from scm_sdk.export.sana import import_sana

    report = import_sana(
        folder / "pipeline", folder / "bundle", steps=(steps,), max_batch=1, overwrite=True, events=Stages()
    )
    return describe_graph(report)


def run(layout: str, steps: int, folder: Path) -> dict[str, Any]:
    """Draw the recorded picture with ONNX Runtime and hold it to PyTorch's."""
    return run_graph(folder / "bundle", steps)


def diffusers(layout: str, steps: int, folder: Path) -> dict[str, Any]:
    """Draw it with diffusers, which takes fresh noise after each step and multiplies the last by 0."""
    import torch
    from diffusers import SanaSprintPipeline
    from diffusers.schedulers import scheduling_scm

    from scm_sdk.inference.request import make_example

    golden, spec = recorded(folder / "bundle", steps)
    noise, given = make_example(spec, golden.seeds.tolist()).inputs(0, len(golden.seeds))
    waiting = iter([*noise[1:], noise[0] * 0])
    scheduling_scm.randn_tensor = lambda *_, **__: torch.tensor(next(waiting))
    pipeline = SanaSprintPipeline.from_pretrained(
        folder / "pipeline", text_encoder=None, tokenizer=None, torch_dtype=torch.float32
    )
    start = time.perf_counter()
    images = pipeline(
        prompt_embeds=torch.tensor(given["prompt_embeds"]), num_inference_steps=steps,
        prompt_attention_mask=torch.tensor(given["prompt_attention_mask"]), latents=torch.tensor(noise[0]),
        intermediate_timesteps=1.3 if steps == 2 else None, guidance_scale=float(given["guidance_scale"][0]),  # pyright: ignore[reportArgumentType]
        height=spec.image_shape[1], width=spec.image_shape[2], use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip  # pyright: ignore[reportAttributeAccessIssue]
    with torch.inference_mode():
        decoded = pipeline.vae.decode(images / pipeline.vae.config.scaling_factor).sample.numpy()
    return {"seconds_of_call": round(time.perf_counter() - start, 1), **difference(decoded, golden.images)}


def fp16(layout: str, steps: int, folder: Path) -> dict[str, Any]:
    """Add the FP16 graph; its pictures take minutes each."""
    return add_fp16(folder / "bundle")


def engine(layout: str, steps: int, folder: Path) -> dict[str, Any]:
    """Add an engine for the A100."""
    return add_engine(folder / "bundle")


STAGES: dict[str, Callable[[str, int, Path], dict[str, Any]]] = {
    "weights": weights,
    "import": import_,
    "run": run,
    "diffusers": diffusers,
    "fp16": fp16,
    "engine": engine,
}


@click.command()
@click.argument("layout", type=click.Choice(list(LAYOUTS)))
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Fewer than the layout has, to see what one costs.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/sana"), show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File that keeps the table; it is added to.")
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True, help="Run this one here, for its parent.")
def main(layout: str, steps: int, layers: int | None, work: Path, out: Path | None, stage: str | None) -> None:
    """Measure each stage for LAYOUT."""
    name = layout if layers is None else f"{layout}, {layers} layers"
    folder = work / name.replace(", ", "-").replace(" ", "-")
    if layers is not None:
        LAYOUTS[layout]["num_layers"] = layers
    if stage is not None:
        found = STAGES[stage](layout, steps, folder)
        (folder / f"{stage}.partial.json").write_text(json.dumps(found), encoding="utf-8")
        return
    walk(name, STAGES, folder, out)


if __name__ == "__main__":
    main()
