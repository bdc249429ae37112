"""``sample`` and ``merge``: many images in shards, and the shards as one file."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalEvents, json_option, plural, print_json, say
from .located import model_argument
from .names import BACKEND_OR_AUTO, PRECISION_OR_AUTO, STEPS, OutputPath, one_of


@click.command()
@model_argument("bundle", one_size=True)
@click.option("-o", "--out", required=True, metavar="FOLDER|URL",
              help="Folder, or URL of fsspec such as s3://bucket/samples, for the shards.")  # fmt: skip
@click.option("--num-images", required=True, type=click.IntRange(1), help="Number of images of all shards.")
@click.option("--shard-size", type=click.IntRange(1), help="Images of a shard; 1000 when absent.")
@click.option("--num-shards", type=click.IntRange(1), help="Number of shards, instead of --shard-size.")
@click.option("--shard-index", "shards", multiple=True, type=click.IntRange(0),
              help="Write this shard only, for a job of an array; may be repeated.")  # fmt: skip
@click.option("--format", "format_", type=one_of("format", "tar", "parquet", "npz"), default="tar",
              help="Format of a shard: PNG files in a tar file or a Parquet table, or arrays.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the first image.")
@click.option("--class-label", "labels", multiple=True, metavar="NAME|NUMBER",
              help="Class label; several are repeated in order. Each seed draws its own when absent.")  # fmt: skip
@click.option("--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="File of prompts, one per line, repeated in order, for a text-to-image model.")  # fmt: skip
@click.option("--guidance-scale", type=float, help="Guidance scale of a model that takes one; its default when absent.")
@click.option("--steps", type=STEPS, help="Number of network calls; 2 where the bundle has it.")
@click.option("--backend", type=BACKEND_OR_AUTO, default="auto", help="Library that runs the model.")
@click.option("--precision", type=PRECISION_OR_AUTO, default="auto", help="Precision of the artifact that runs.")
@click.option("--batch-size", type=click.IntRange(1), help="Images of one call; the bundle's largest when absent.")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N; the CPU when absent, for engines the first GPU.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of a worker; the cores are shared when absent.")
@click.option("--executor", type=one_of("executor", "local", "ray"), default="local",
              help="Processes of this machine, or actors of a Ray cluster.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=1, help="Number of processes or actors.")
@click.option("--ray-address", metavar="ADDRESS", help="Address of a Ray cluster; a new local one when absent.")
@click.option("--cpus-per-worker", type=click.FloatRange(0, min_open=True), default=1.0,
              help="Logical CPUs of a Ray actor.")  # fmt: skip
@click.option("--gpus-per-worker", type=click.FloatRange(0), default=0.0, help="Logical GPUs of a Ray actor.")
@click.option("--stall-timeout", type=click.FloatRange(0, min_open=True), default=3600.0,
              help="Seconds without a finished shard after which several workers are given up.")  # fmt: skip
@json_option
def sample(
    bundle: Path, out: str, num_images: int, shard_size: int | None, num_shards: int | None, shards: tuple[int, ...],
    format_: str, seed: int, labels: tuple[str, ...], prompts: Path | None, guidance_scale: float | None,
    steps: int | None, backend: str, precision: str, batch_size: int | None, device: str | None, threads: int | None,
    executor: str, workers: int, ray_address: str | None, cpus_per_worker: float, gpus_per_worker: float,
    stall_timeout: float, as_json: bool,
) -> None:  # fmt: skip
    """Generate many images in shards that any rerun reproduces.

    Image i has the seed SEED + i. A shard is complete when its .json file is there; shards that are complete are left
    unchanged, so the same command resumes a run that was killed. Jobs of an array write one shard each.

    \b
    scm-export sample avatars -o samples --num-images 50000 --workers 4
    scm-export sample avatars -o s3://bucket/x --num-images 50000 --num-shards 50 --shard-index $SLURM_ARRAY_TASK_ID
    scm-export merge samples -o samples.npz
    """
    from scm_sdk.inference.conditioning import read_prompts
    from scm_sdk.inference.generator import Generator
    from scm_sdk.scale.plan import DEFAULT_SHARD_SIZE, make_plan, start_or_resume
    from scm_sdk.scale.run import Worker, run_local, run_ray
    from scm_sdk.scale.shards import missing_shards
    from scm_sdk.scale.store import Store

    if shard_size is not None and num_shards is not None:
        raise click.UsageError("--shard-size and --num-shards are both given, expected one of them.")
    if num_shards is not None:
        if num_shards > num_images:
            text = f"{num_shards} shards for {plural(num_images, 'image')}."
            raise click.BadParameter(text, param_hint="--num-shards")
        shard_size = -(-num_images // num_shards)
    texts = read_prompts(prompts) if prompts is not None else []
    with Generator.from_pretrained(
        bundle, backend=backend, precision=precision, device=device, num_threads=threads, num_inference_steps=steps
    ) as gen:
        plan = make_plan(
            gen,
            num_images=num_images,
            shard_size=shard_size or DEFAULT_SHARD_SIZE,
            seed=seed,
            class_labels=labels,
            prompts=texts,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            format=format_,  # type: ignore[arg-type]
        )
        warnings = gen.source.status.warnings
    if wrong := [shard for shard in shards if shard >= plan.num_shards]:
        text = f"shard {wrong[0]} is given, expected 0..{plan.num_shards - 1}."
        raise click.BadParameter(text, param_hint="--shard-index")
    for text in warnings:
        say(f"warning: {text}")
    store = Store(out)
    start_or_resume(store, plan, texts)
    chosen = sorted(set(shards)) or range(plan.num_shards)
    total = sum(len(plan.images_of(shard)) for shard in chosen)
    missing = missing_shards(store, plan, chosen)
    worker = Worker(bundle=str(bundle), out=out, plan=plan, device=device, num_threads=threads)
    with TerminalEvents("", title="sample shards", total=len(missing)) as events:
        if executor == "ray":
            written = run_ray(
                worker, missing, workers=workers, address=ray_address, cpus_per_worker=cpus_per_worker,
                gpus_per_worker=gpus_per_worker, events=events, stall_seconds=stall_timeout,
            )  # fmt: skip
        else:
            written = run_local(worker, missing, workers=workers, events=events, stall_seconds=stall_timeout)
    if as_json:
        print_json({
            "out": out, "plan": plan.fingerprint, "num_images": num_images, "num_shards": plan.num_shards,
            "written": written, "complete": len(chosen), "backend": plan.backend, "precision": plan.precision,
        })  # fmt: skip
        return
    say(
        f"{out}: {plural(total, 'image')} in {plural(len(chosen), 'shard')}, {written} of them written now, by "
        f"{plan.backend} {plan.precision}, {plural(plan.num_inference_steps, 'step')}. Next: scm-export merge {out}"
    )


@click.command()
@click.argument("samples", metavar="FOLDER|URL")
@click.option("-o", "--out", type=OutputPath(), help="File to write, .npz; the shards are only checked when absent.")
@json_option
def merge(samples: str, out: Path | None, as_json: bool) -> None:
    """Check the shards of sample and join them into one .npz file.

    Every hash is checked. The file holds arr_0, the images (N, H, W, C) uint8, and arr_1, the labels, as the evaluators
    of guided diffusion read them.

    \b
    scm-export merge samples -o samples.npz
    """
    from scm_sdk.scale.shards import merge
    from scm_sdk.scale.store import Store

    store = Store(samples)
    with TerminalEvents("", title="merge") as events:
        plan = merge(store, out, events=events)
    if as_json:
        print_json({"out": None if out is None else str(out), "num_images": plan.num_images, "plan": plan.fingerprint})
        return
    say(f"{samples}: {plural(plan.num_images, 'image')}, every hash is right." + (f" {out} is written." if out else ""))
