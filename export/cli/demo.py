"""``demo``: the whole street on the shipped model, in one command."""

from __future__ import annotations

from pathlib import Path

import click

from .common import say


@click.command()
@click.option("-o", "--out", default=Path("scm-demo"), type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--seed", type=click.IntRange(0), default=0, help="First seed of the pictures.")
def demo(out: Path, seed: int) -> None:
    """Export the shipped avatars model, prove two backends equal, draw pictures, time both.

    Leaves OUT/avatars, a bundle, and OUT/*.png. Takes about a minute on two cores.
    """
    from importlib.resources import as_file, files
    from time import perf_counter

    from scm_sdk.evaluate.gate import validate_bundle
    from scm_sdk.evaluate.latency import measure
    from scm_sdk.generator import Generator
    from scm_sdk.images import make_grid, save_png

    from ..pipeline import export_bundle
    from .validation import summary

    start, bundle = perf_counter(), out / "avatars"
    say("1. Export: PyTorch checkpoint → one ONNX graph for each number of steps → bundle")
    with as_file(files("scm_sdk.assets") / "avatars") as checkpoint:
        report = export_bundle(checkpoint, bundle, name="avatars", overwrite=True, progress=lambda s: say(f"   {s} …"))
    for graph in report.graphs:
        say(f"   {graph.path.parent.name}: {graph.num_nodes} nodes, {graph.bytes / 1e6:.1f} MB")

    say("2. Prove: ONNX Runtime against PyTorch, same noise, same labels")
    for parity in validate_bundle(bundle, on_result=lambda parity: say(f"   {summary(parity)}")):
        parity.raise_if_failed()

    say("3. Generate: a row for each hair colour, by what the plan chose among what passed")
    with Generator.from_pretrained(bundle) as gen:
        say("   " + str(gen.plan()).replace("\n", "\n   "))
        names = gen.opened().spec.class_names
        for steps in (1, 2):
            result = gen(
                8 * len(names), class_labels=[name for name in names for _ in range(8)], num_inference_steps=steps,
                seed=seed, output_type="uint8",
            )  # fmt: skip
            picture = out / f"avatars-{steps}step.png"
            save_png(make_grid(result.images, 8, scale=4), picture)
            say(f"   {picture}: {len(result.seeds)} images by {result.info.backend}, "
                f"{result.info.timings['sample_ms'] / len(result.seeds):.2f} ms each")  # fmt: skip

    say("4. Time: both backends in turn, 2 steps, batch 1")
    with (
        Generator.from_pretrained(bundle, backend="torch", verify="none") as torch_gen,
        Generator.from_pretrained(bundle, backend="onnxruntime", verify="none") as ort_gen,
    ):
        for timing in measure({"torch": torch_gen, "onnxruntime": ort_gen}, rounds=30):
            say(f"   {timing.name}: median {timing.median_ms:.2f} ms, {timing.speedup:.2f}x")
    say(f"Done in {perf_counter() - start:.0f} s. Look at {out}/avatars-2step.png. Next: scm-export --help")
