"""Measure time and memory of importing a video model of real size: Wan 2.1 text-to-video 1.3B, with random weights.

    python benchmarks/engines/import_wan.py --frames 17 --work runs/wan --json benchmarks/results/import-wan.json

The transformer (30 layers of width 1536, 512 tokens of width 4096) and ``AutoencoderKLWan`` in its full size are made
from their configs and saved by diffusers, bfloat16, without a text encoder. Nothing is downloaded. Each stage is a
process of its own, whose peak memory the system reports: ``weights`` saves the pipeline, ``import`` makes the bundle
with one graph and in it PyTorch's own clip, ``run`` draws that clip again with ONNX Runtime, ``fp16`` adds the FP16
graph, and ``engine`` an engine for the A100 from it. A stage that is done is not done again; sizes share the weights.

``--frame-decoder`` imports with that option, for clips too long to be drawn on a CPU: none is recorded, and ``decode``
runs the frame decoder on two latent frames in place of ``run``.

``import`` and ``run`` each take the time of one clip on one core, whose attention grows with the square of its tokens:
latent frames x height x width / 256. ``run`` also holds the scores of one attention twice, 12 x tokens^2 x 4 bytes.
``--skip run`` leaves a stage out where these do not fit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from stages import Stages, add_engine, add_fp16, describe_graph, run_graph, walk

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960, "text_dim": 4096,
}  # fmt: skip
"""The others of Wan 2.1 1.3B, and all of its autoencoder's, are diffusers' defaults."""
TOKENS = 512


class Walk:
    """One size: its settings and folders.

    Args:
        frames: Frames of a clip.
        size: Height and width, pixels.
        steps: Network calls.
        layers: Layers of the transformer.
        frame_decoder: Whether the clip is decoded frame by frame.
        work: Folder of all sizes.
    """

    def __init__(
        self, frames: int, size: tuple[int, int], steps: int, layers: int, frame_decoder: bool, work: Path
    ) -> None:
        self.frames, self.size, self.steps, self.layers, self.frame_decoder = frames, size, steps, layers, frame_decoder
        less = "" if layers == TRANSFORMER["num_layers"] else f", {layers} layers"
        self.name = f"{size[0]}x{size[1]}, {frames} frames, {steps} steps{less}" + ", frame decoder" * frame_decoder
        self.folder = work / self.name.replace(", ", "-").replace(" ", "-")
        self.pipeline = work / f"pipeline-{layers}-layers"
        self.bundle = self.folder / "bundle"


def weights(walk: Walk) -> dict[str, Any]:
    """Save the pipeline, unless another size has."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    layout: dict[str, Any] = {**TRANSFORMER, "num_layers": walk.layers}
    there = (walk.pipeline / "model_index.json").exists()
    with torch.device("meta" if there else "cpu"):
        parts = WanTransformer3DModel(**layout), AutoencoderKLWan()
    if not there:
        pipeline = WanPipeline(
            tokenizer=None,  # pyright: ignore[reportArgumentType]
            text_encoder=None,  # pyright: ignore[reportArgumentType]
            transformer=parts[0],
            vae=parts[1],
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),  # pyright: ignore[reportArgumentType]
        )
        pipeline.save_pretrained(walk.pipeline)
    return {"parameters": [sum(p.numel() for p in part.parameters()) for part in parts]}


def import_(walk: Walk) -> dict[str, Any]:
    """Make the bundle."""
    from scm_sdk.export.flow_pipeline import import_flow_pipeline

    report = import_flow_pipeline(
        walk.pipeline, walk.bundle, steps=(walk.steps,), size=walk.size, num_frames=walk.frames,
        max_sequence_length=TOKENS, max_batch=1, distilled=True, frame_decoder=walk.frame_decoder,
        goldens=not walk.frame_decoder, overwrite=True, events=Stages(),
    )  # fmt: skip
    return describe_graph(report)


def decode(walk: Walk) -> dict[str, Any]:
    """Decode the first two latent frames of a clip of noise with ONNX Runtime, one thread; more take no more memory."""
    import numpy as np

    from scm_sdk.inference.sources import open_source

    source = open_source(walk.bundle, verify="none")
    spec = source.spec(walk.steps, unrolled=False)
    decoder = source.open_decoder(spec, backend="onnxruntime", device=None, num_threads=1)
    channels, _, height, width = spec.sample_shape
    latents = np.random.default_rng(0).standard_normal((1, channels, 2, height, width), np.float32)
    start = time.perf_counter()
    decoder.run({"latents": latents})
    return {"seconds_of_call": round(time.perf_counter() - start, 1)}


STAGES: dict[str, Callable[[Walk], dict[str, Any]]] = {
    "weights": weights,
    "import": import_,
    "run": lambda walk: run_graph(walk.bundle, walk.steps),
    "decode": decode,
    "fp16": lambda walk: add_fp16(walk.bundle),
    "engine": lambda walk: add_engine(walk.bundle),
}


@click.command()
@click.option("--frames", type=click.IntRange(1), default=17, show_default=True, help="Frames of a clip, 4 n + 1.")
@click.option("--size", type=(int, int), default=(480, 832), show_default=True, help="Height and width, pixels.")
@click.option("--steps", type=click.IntRange(1, 4), default=2, show_default=True)
@click.option("--layers", type=click.IntRange(1), default=TRANSFORMER["num_layers"], show_default=True)
@click.option("--frame-decoder", is_flag=True, help="Decode the clip frame by frame.")
@click.option("--skip", type=click.Choice(list(STAGES)), multiple=True, help="A stage to leave out.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/wan"), show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File that keeps the table; it is added to.")
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True, help="Run this one here, for its parent.")
def main(
    frames: int, size: tuple[int, int], steps: int, layers: int, frame_decoder: bool, skip: tuple[str, ...], work: Path,
    out: Path | None, stage: str | None,
) -> None:  # fmt: skip
    """Measure each stage for one size."""
    one = Walk(frames, size, steps, layers, frame_decoder, work)
    if stage is not None:
        (one.folder / f"{stage}.partial.json").write_text(json.dumps(STAGES[stage](one)), encoding="utf-8")
        return
    skipped = {*skip, "run" if frame_decoder else "decode"}
    walk(one.name, [each for each in STAGES if each not in skipped], one.folder, out)


if __name__ == "__main__":
    main()
