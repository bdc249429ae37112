"""``generate``: images from a bundle or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import TerminalEvents, json_option, plural, print_json, say
from .located import model_argument
from .names import BACKEND_OR_AUTO, PRECISION_OR_AUTO, STEPS, OutputPath

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from scm_sdk.inference.output import GeneratorOutput


@click.command()
@model_argument("bundle")
@click.option("-o", "--out", default=Path("images.png"), type=OutputPath(),
              help="Image file (.png, .jpg, .jpeg, .webp), clip of a video model (.gif, .webp, .mp4), or a folder for "
              "one file per image or clip.")  # fmt: skip
@click.option("--num-images", type=click.IntRange(1), default=16, help="Number of images.")
@click.option("--class-labels", default="", metavar="A,B,…",
              help="Class names or numbers, comma-separated: one for all images, or one for each. Put a name that "
              "holds a comma in double quotes, as in '\"dark, curly\",red'.")  # fmt: skip
@click.option("--steps", type=STEPS, help="Number of network calls; default: 2 if the bundle has it.")
@click.option("--seed", type=int, help="Seed of the first image; default: random.")
@click.option("--backend", type=BACKEND_OR_AUTO, default="auto", help="Library that runs the model.")
@click.option("--precision", type=PRECISION_OR_AUTO, default="auto", help="Precision of the artifact that runs.")
@click.option(
    "--device", metavar="NAME", help="Device: cpu, cuda or cuda:N; default: the CPU, for engines the first GPU."
)
@click.option(
    "--threads", type=click.IntRange(1), help="Number of CPU threads of one call; default: chosen by the library."
)
@click.option("--batch-size", type=click.IntRange(1), help="Batch size, images; default: the largest of the bundle.")
@click.option("--prompt", "prompts", multiple=True,
              help="Prompt of a text-to-image model: one for all images, or one for each, repeated.")  # fmt: skip
@click.option("--size", default="", metavar="HxW",
              help="Image size, pixels: one of a bundle of several sizes; default: its first.")  # fmt: skip
@click.option("--image", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Image to start from, of the model's size; transparent pixels become white.")  # fmt: skip
@click.option("--start-time", type=float, help="Start time of a sampler of the bundle, with --image, radians.")
@click.option(
    "--guidance-scale", type=float, help="Guidance scale of a model with this input; default: that of the model."
)
@click.option("--scale", type=click.IntRange(1, 64), default=4, help="Screen pixels per image pixel in the grid.")
@click.option("--fps", type=click.FloatRange(0, 240, min_open=True), default=16, help="Frames per second of a clip.")
@click.option("--offload", is_flag=True,
              help="Hold one part in memory at a time: text encoder, sampler, decoder of a split bundle.")  # fmt: skip
@click.option("--plan", is_flag=True, help="Print what can run here, with reasons, and stop.")
@json_option
def generate(
    bundle: Path, out: Path, num_images: int, class_labels: str, steps: int | None, seed: int | None, backend: str,
    precision: str, device: str | None, threads: int | None, batch_size: int | None, prompts: tuple[str, ...],
    size: str, image: Path | None, start_time: float | None, guidance_scale: float | None, scale: int, fps: float,
    offload: bool, plan: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate images from a bundle or a checkpoint.

    The images are written as one grid, or as one file each if OUT is a folder. PNG metadata hold build id, seeds and
    labels.

    \b
    scm-export generate avatars -o red.png --class-labels red --seed 7
    scm-export generate sana -o fox.jpg --num-images 1 --prompt "a red fox" --scale 1
    scm-export generate sana -o wide.jpg --num-images 1 --prompt "a red fox" --size 768x1344 --scale 1
    scm-export generate sana -o fox2.jpg --num-images 1 --prompt "a blue fox" --image fox.jpg --start-time 1.1 --scale 1
    """
    import numpy as np

    from scm_sdk._util.files import check_writable
    from scm_sdk.images import make_grid, save_clip, save_picture
    from scm_sdk.inference.generator import Generator
    from scm_sdk.inference.sources import open_source
    from scm_sdk.inference.start import StartImages

    from ..sana import parse_size

    asked = parse_size(size) if size else None
    height, width = asked or (None, None)
    in_one_file = _is_file(out)
    if not plan:
        check_writable(out if in_one_file else out / "0.png")
    wanted = _split_labels(class_labels, num_images)
    if len(prompts) not in (0, 1, num_images):
        raise click.BadParameter(_count_problem(len(prompts), "prompt", num_images), param_hint="--prompt")
    pixels = None if image is None else _read_image(image)
    if pixels is not None or start_time is not None:  # its sampler alone is to be loaded
        source = open_source(bundle) if asked is None else open_source(bundle).at_size(asked)
        steps = StartImages(source, device=device, num_threads=threads).steps(pixels, start_time, steps)
        source.release()
    with Generator.from_pretrained(
        bundle,
        backend=backend,
        precision=precision,
        device=device,
        num_threads=threads,
        num_inference_steps=steps,
        height=height,
        width=width,
        offload=offload,
    ) as gen:
        if plan:
            rows = gen.plan()
            print_json(rows.to_dict()) if as_json else click.echo(str(rows))
            return
        shape = gen.opened().spec.image_shape
        is_clip = len(shape) == 4 and shape[0] in (1, 3)
        _check_kind(out, in_one_file, is_clip, num_images)
        if pixels is not None and gen.opened().spec.image_shape[0] == 1 and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., :1]
        labels = [_number_or_name(label, gen.opened().spec.class_names) for label in wanted]
        with TerminalEvents("", title="generate", total=num_images) as events:
            result = gen(
                num_images,
                class_labels=None if not labels else labels[0] if len(labels) == 1 else labels,
                num_inference_steps=steps,
                seed=seed,
                prompt=None if not prompts else prompts[0] if len(prompts) == 1 else list(prompts),
                image=pixels,
                start_time=start_time,
                guidance_scale=guidance_scale,
                batch_size=batch_size,
                output_type="np" if is_clip else "uint8",
                events=events,
            )
    made = np.asarray(result.images)
    if is_clip:
        digits = len(str(max(result.seeds)))
        files = [out] if in_one_file else [out / f"{seed:0{digits}d}.webp" for seed in result.seeds]
        for each, file in zip(made, files, strict=True):
            save_clip(np.rint(each * 255).astype(np.uint8), file, fps=fps)
    elif in_one_file:
        files = [out]
        grid = make_grid(made, max(1, round(num_images**0.5)), scale=scale)
        save_picture(grid, out, texts={"scm": _describe(result, range(num_images))})
    else:
        digits = len(str(max(result.seeds)))  # so that a listing is in the order of the seeds
        files = [out / f"{seed:0{digits}d}.png" for seed in result.seeds]
        for i, (each, file) in enumerate(zip(made, files, strict=True)):
            save_picture(each, file, texts={"scm": _describe(result, [i])})
    info = result.info
    for text in info.model.training_warnings:
        say(f"warning: {text}")
    if as_json:
        print_json({"out": str(out), "files": [str(file) for file in files], "seeds": list(result.seeds),
                    "info": info.to_dict()})  # fmt: skip
    else:
        first, last = result.seeds[0], result.seeds[-1]
        seeds = f"seed {first}" if num_images == 1 else f"seeds {first} to {last}"
        made_of = plural(num_images, "clip" if is_clip else "image")
        say(f"{out}: {made_of}, {seeds}, by {info.backend} {info.precision}, "
            f"{plural(info.num_inference_steps, 'step')}.")  # fmt: skip


def _describe(result: GeneratorOutput, indices: Sequence[int]) -> str:
    """Return the JSON description that a PNG file stores; the page of ``scm-export web`` writes the same."""
    import json

    info, labels = result.info, result.class_labels
    told = {
        "build_id": info.build_id,
        "seeds": [str(result.seeds[i]) for i in indices],  # text, since JSON readers lose digits of large numbers
        "class_labels": None if labels is None else [labels[i] for i in indices],
        "num_inference_steps": info.num_inference_steps,
        "precision": info.precision,
        "backend": info.backend,
    }
    return json.dumps(told, separators=(",", ":"))


def _read_image(file: Path) -> NDArray[np.uint8]:
    """Return the pixels of an image file, (H, W, 3), or fail with the reason."""
    from scm_sdk.train.data.pictures import decode_picture

    try:
        return decode_picture(file)
    except (ValueError, OSError) as exc:
        raise click.BadParameter(f"{file} is no image that can be read: {exc}.", param_hint="--image") from exc


def _check_kind(out: Path, in_one_file: bool, is_clip: bool, num_images: int) -> None:
    """Refuse a file type that cannot store the output of the model."""
    from scm_sdk.images import CLIP_FORMATS, PICTURE_FORMATS

    known, found = (CLIP_FORMATS, "clips") if is_clip else (tuple(PICTURE_FORMATS), "images")
    if in_one_file and out.suffix.lower() not in known:
        raise click.BadParameter(
            f"{out} ends in {out.suffix}, but this model makes {found}, expected {', '.join(known)}, or a folder.",
            param_hint="--out",
        )
    if in_one_file and is_clip and num_images > 1:
        raise click.BadParameter(
            f"{out} is one file for {num_images} clips, expected a folder, or --num-images 1.", param_hint="--out"
        )


def _is_file(out: Path) -> bool:
    """Return whether OUT names one file of images or a clip; refuse other file names."""
    from scm_sdk.images import CLIP_FORMATS, PICTURE_FORMATS

    if out.is_dir():
        return False
    suffixes = tuple(dict.fromkeys((*PICTURE_FORMATS, *CLIP_FORMATS)))
    known = ", ".join(suffixes)
    if str(out) == "-":
        raise click.BadParameter(f"'-' is not a file name, expected a name that ends in {known}, or a folder.",
                                 param_hint="--out")  # fmt: skip
    if out.suffix.lower() in suffixes:
        return True
    if out.suffix:
        raise click.BadParameter(
            f"{out} ends in {out.suffix}, expected {known}, a name without an ending for a new folder, or a folder "
            "that exists.",
            param_hint="--out",
        )
    return False


def _split_labels(text: str, num_images: int) -> list[str]:
    """Return the labels of a CSV line; double quotes protect a comma inside a name."""
    import csv

    rows = list(csv.reader([text], skipinitialspace=True))
    parts = [part.strip() for part in (rows[0] if rows else ()) if part.strip()]
    if len(parts) not in (0, 1, num_images):
        raise click.BadParameter(_count_problem(len(parts), "label", num_images), param_hint="--class-labels")
    return parts


def _number_or_name(label: str, names: Sequence[str]) -> int | str:
    """Return a label as a number unless a class has that name."""
    return int(label) if label not in names and label.lstrip("-").isdigit() else label


def _count_problem(count: int, noun: str, num_images: int) -> str:
    return (
        f"{plural(count, noun)} for {plural(num_images, 'image')}, expected one for all images or one for each. Give "
        f"{num_images}, or --num-images {count}."
    )
