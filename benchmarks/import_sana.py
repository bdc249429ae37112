"""How long does it take, and how much memory, to import a SANA-Sprint of real size? With random weights.

    python benchmarks/import_sana.py 0.6B --steps 2 --json benchmarks/results/import-sana-0.6b.json

The released layouts (0.6B, 1.6B) with their DC-AE are made from their configs and saved by diffusers, bfloat16, as they
are on the hub; then a process of its own imports the folder. Nothing is downloaded. Peak memory is that process's
largest resident set.
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from scm_sdk import __version__
from scm_sdk.processor import cpu_name

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


@click.command()
@click.argument("layout", type=click.Choice(list(LAYOUTS)))
@click.option("--steps", type=click.IntRange(1), default=2)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where the figures go; stdout when absent.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Keep pipeline and bundle here.")
@click.option("--save-only", is_flag=True, hidden=True)
def main(layout: str, steps: int, out: Path | None, folder: Path | None, save_only: bool) -> None:
    """Make LAYOUT with random weights, import it, print what it took."""
    if save_only:
        assert folder is not None
        save(layout, folder)
        return
    workplace = folder or Path(tempfile.mkdtemp(prefix="import-sana-"))
    try:
        result = measure(layout, steps, workplace)
    finally:
        if folder is None:
            shutil.rmtree(workplace)
    text = json.dumps(result, indent=2) + "\n"
    out.write_text(text) if out else click.echo(text)


def save(layout: str, folder: Path) -> None:
    """Write a pipeline without a text encoder: that part is copied and never exported."""
    import torch
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    torch.set_default_dtype(torch.bfloat16)
    parts = SanaTransformer2DModel(**LAYOUTS[layout], **SHARED), AutoencoderDC(**DC_AE)
    pipeline = SanaSprintPipeline(
        transformer=parts[0], vae=parts[1], scheduler=SCMScheduler(), text_encoder=None, tokenizer=None
    )
    pipeline.save_pretrained(folder)


def measure(layout: str, steps: int, workplace: Path) -> dict[str, Any]:
    """Import in a process of its own and ask the system what it took."""
    source, bundle = workplace / "pipeline", workplace / "bundle"
    if not source.exists():
        command = [sys.executable, __file__, layout, "--save-only", "--folder", str(source)]
        subprocess.run(command, check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        str(Path(sys.executable).with_name("scm-export")), "import", str(source), "-o", str(bundle),
        "--steps", str(steps), "--max-batch", "1", "--overwrite", "--json",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (graph,) = json.loads(done.stdout)["graphs"]
    return {
        "command": f"python benchmarks/import_sana.py {layout} --steps {steps}",
        "layout": layout,
        "steps": steps,
        "images": "1024x1024",
        "weights": "random, bfloat16 on disk, float32 in the graph",
        "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_rss_gib": round(after.ru_maxrss / 2**20, 2),
        "stages": graph["seconds"],
        "num_parameters": graph["num_parameters"],
        "num_nodes": graph["num_nodes"],
        "graph_bytes": graph["bytes"] + graph["data_bytes"],
        "processor": cpu_name(),
        "python": platform.python_version(),
        "scm_sdk": __version__,
    }


if __name__ == "__main__":
    main()
