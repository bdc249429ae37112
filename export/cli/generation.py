"""``generate``: pictures from a bundle or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, plural, print_json, progress_bar, say
from .located import model_argument
from .names import BACKEND_OR_AUTO, PRECISION_OR_AUTO, STEPS


@click.command()
@model_argument("bundle")
@click.option("-o", "--out", default=Path("images.png"), type=click.Path(path_type=Path),
              help="Picture file (.png, .jpg, .jpeg, .webp), or a folder for one PNG file per image.")  # fmt: skip
@click.option("--num-images", type=int, default=16, help="Number of images.")
@click.option("--class-labels", default="", metavar="A,B,…",
              help="Class names or numbers, comma-separated: one for all images, or one for each.")  # fmt: skip
@click.option("--steps", type=STEPS, help="Number of network calls; 2 where the bundle has it.")
@click.option("--seed", type=int, help="Seed of the first image; a new random one when absent.")
@click.option("--backend", type=BACKEND_OR_AUTO, default="auto", help="Library that runs the model.")
@click.option("--precision", type=PRECISION_OR_AUTO, default="auto", help="Precision of the artifact that runs.")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N; the CPU when absent, for engines the first GPU.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of one call; the library's choice when absent.")
@click.option("--batch-size", type=click.IntRange(1), help="Images of one call; the bundle's largest when absent.")
@click.option("--prompt", "prompts", multiple=True,
              help="Prompt of a text-to-image model: one for all images, or one for each, repeated.")  # fmt: skip
@click.option("--guidance-scale", type=float, help="Guidance scale of a model that takes one; its default when absent.")
@click.option("--scale", type=click.IntRange(1, 64), default=4, help="Screen pixels per image pixel in the grid.")
@click.option("--plan", is_flag=True, help="Print what can run here, with reasons, and stop.")
@json_option
def generate(
    bundle: Path, out: Path, num_images: int, class_labels: str, steps: int | None, seed: int | None, backend: str,
    precision: str, device: str | None, threads: int | None, batch_size: int | None, prompts: tuple[str, ...],
    guidance_scale: float | None, scale: int, plan: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate images into one grid, or into one file each if OUT is a folder.

    \b
    scm-export generate avatars -o red.png --class-labels red --seed 7
    scm-export generate sana -o fox.jpg --num-images 1 --prompt "a red fox" --scale 1
    """
    import numpy as np

    from scm_sdk.generator import Generator
    from scm_sdk.images import make_grid, save_picture

    in_one_file = _is_file(out)
    with Generator.from_pretrained(
        bundle, backend=backend, precision=precision, device=device, num_threads=threads, num_inference_steps=steps
    ) as gen:
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
                batch_size=batch_size,
                output_type="uint8",
                progress=lambda done, _total: update(done),
            )
    pixels = np.asarray(result.images)
    if in_one_file:
        files = [out]
        save_picture(make_grid(pixels, max(1, round(num_images**0.5)), scale=scale), out)
    else:
        digits = len(str(max(result.seeds)))  # so that a listing is in the order of the seeds
        files = [out / f"{seed:0{digits}d}.png" for seed in result.seeds]
        for image, file in zip(pixels, files, strict=True):
            save_picture(image, file)
    info = result.info
    for text in info.model.training_warnings:
        say(f"warning: {text}")
    if as_json:
        print_json({"out": str(out), "files": [str(file) for file in files], "seeds": list(result.seeds),
                    "info": info.to_dict()})  # fmt: skip
    else:
        first, last = result.seeds[0], result.seeds[-1]
        seeds = f"seed {first}" if num_images == 1 else f"seeds {first} to {last}"
        say(f"{out}: {plural(num_images, 'image')}, {seeds}, by {info.backend} {info.precision}, "
            f"{plural(info.num_inference_steps, 'step')}.")  # fmt: skip


def _is_file(out: Path) -> bool:
    """Return whether OUT names one picture; refuse a name that is neither a picture's nor a folder's."""
    from scm_sdk.images import PICTURE_FORMATS

    if out.is_dir():
        return False
    known = ", ".join(PICTURE_FORMATS)
    if str(out) == "-":
        raise click.BadParameter(f"'-' is no file, expected a name that ends in {known}, or a folder.",
                                 param_hint="--out")  # fmt: skip
    from PIL import Image

    suffix = out.suffix.lower()
    if suffix in PICTURE_FORMATS:
        return True
    if suffix in Image.registered_extensions() or suffix[1:] in ("svg", "pdf", "npz", "npy"):
        raise click.BadParameter(f"{out} ends in {suffix}, expected {known}, or a folder.", param_hint="--out")
    return False


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
