"""``generate``: pictures from a bundle or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, progress_bar, say
from .located import model_argument


@click.command()
@model_argument("bundle")
@click.option("-o", "--out", default=Path("images.png"), type=click.Path(path_type=Path), help="PNG, or a folder.")
@click.option("--num-images", type=int, default=16, help="How many.")
@click.option("--class-labels", default="", metavar="A,B,…", help="Names or numbers; one for all, or one each.")
@click.option("--steps", type=int, help="Network calls; 2 where the bundle has it.")
@click.option("--seed", type=int, help="First seed; fresh when absent.")
@click.option("--backend", default="auto", help="auto, or a name: onnxruntime, openvino, tensorrt, torch.")
@click.option("--prompt", "prompts", multiple=True, help="Of a model of texts; one for all, or one each, repeated.")
@click.option("--guidance-scale", type=float, help="Where the model takes one; its default when absent.")
@click.option("--scale", type=click.IntRange(1, 64), default=4, help="Enlarge pixels in the grid.")
@click.option("--plan", is_flag=True, help="Print what can run here and why, and stop.")
@json_option
def generate(
    bundle: Path, out: Path, num_images: int, class_labels: str, steps: int | None, seed: int | None, backend: str,
    prompts: tuple[str, ...], guidance_scale: float | None, scale: int, plan: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate images from BUNDLE into one PNG grid, or one file each if OUT is a folder.

    \b
    scm-export generate avatars -o red.png --class-labels red --seed 7
    scm-export generate sana -o fox.png --num-images 1 --prompt "a red fox" --scale 1
    """
    import numpy as np

    from scm_sdk.generator import Generator
    from scm_sdk.images import make_grid, save_png

    with Generator.from_pretrained(bundle, backend=backend, num_inference_steps=steps) as gen:
        if plan:
            rows = gen.plan()
            print_json(rows.to_dict()) if as_json else click.echo(str(rows))
            return
        labels: list[int | str] = [int(part) if part.lstrip("-").isdigit() else part for part in _split(class_labels)]
        with progress_bar("generate", num_images) as update:
            result = gen(
                num_images,
                class_labels=None if not labels else labels[0] if len(labels) == 1 else labels,
                num_inference_steps=steps,
                seed=seed,
                prompt=None if not prompts else prompts[0] if len(prompts) == 1 else list(prompts),
                guidance_scale=guidance_scale,
                output_type="uint8",
                progress=lambda done, _total: update(done),
            )
    pixels = np.asarray(result.images)
    if out.suffix.lower() == ".png":
        save_png(make_grid(pixels, max(1, round(num_images**0.5)), scale=scale), out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        for image, name in zip(pixels, result.seeds, strict=True):
            save_png(image, out / f"{name}.png")
    info = result.info
    for text in info.model.training_warnings:
        say(f"warning: {text}")
    if as_json:
        print_json({"out": str(out), "seeds": list(result.seeds), "info": info.to_dict()})
    else:
        say(f"{out}: {num_images} images, seeds {result.seeds[0]}… by {info.backend} {info.precision}, "
            f"{info.num_inference_steps} steps.")  # fmt: skip


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
