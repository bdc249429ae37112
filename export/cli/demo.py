"""``demo``: from the shipped model to a bundle and pictures, in one command."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalEvents, json_option, plural, print_json, say, say_warnings
from .libraries import EXPORT, requires
from .names import OutputPath


@click.command()
@requires(*EXPORT, "onnxruntime")
@click.option("-o", "--out", default=Path("scm-demo"), type=OutputPath(), help="Folder for the results.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the first image.")
@json_option
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Take the shipped model from its checkpoint to images.

    Exports the avatars model, adds FP16 and an engine for NVIDIA L4, validates, generates and times. Leaves a bundle in
    OUT/avatars and images in OUT. Takes about a minute on two cores.
    """
    from importlib.resources import as_file, files
    from time import perf_counter

    from scm_sdk._util.lazy import install_command, is_installed
    from scm_sdk.engines.targets import resolve_target
    from scm_sdk.images import make_grid, save_png
    from scm_sdk.inference.generator import Generator
    from scm_sdk.inference.latency import measure

    from ..bundle_export import export_bundle
    from ..diagnose.validate import validate
    from ..engines.add import add_engines
    from ..precision.half import default_plan
    from ..precision.variants import add_precision

    start, bundle, events = perf_counter(), out / "avatars", TerminalEvents("   ")
    say("1. Export: PyTorch checkpoint → one ONNX graph for each number of steps → bundle")
    with as_file(files("scm_sdk.assets") / "avatars") as checkpoint:
        report = export_bundle(checkpoint, bundle, name="avatars", overwrite=True, events=events)
    for graph in report.graphs:
        say(f"   {graph.path.parent.name}: {graph.num_nodes} nodes, {graph.bytes / 1e6:.1f} MB")

    say_warnings(report.status)
    say("2. Reduce precision: FP16 in the graph")
    add_precision(bundle, default_plan("fp16"), events=events)
    if is_installed("tensorrt_rtx"):
        say("   An engine for NVIDIA L4, built without a GPU; its kernels are counted in the build log:")
        with events:
            add_engines(bundle, [resolve_target("l4")], precisions=["fp16"], steps=[1], events=events)
    else:
        say(f"   No engine: TensorRT-RTX is not installed ({install_command('tensorrt-rtx')})")

    say("3. Validate: everything that can run here against PyTorch, on the same noise and labels")
    results = validate(bundle, events=events)
    for parity in results:
        parity.raise_if_failed()
    pictures, timings = [], []

    say("4. Generate: one row per hair color, with the selected backend")
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
            pictures.append(str(picture))
            say(f"   {picture}: {plural(len(result.seeds), 'image')} by {result.info.backend}, "
                f"{result.info.timings['sample_ms'] / len(result.seeds):.2f} ms each")  # fmt: skip

    say("5. Measure latency: interleaved rounds, 2 steps, batch 1")
    with (
        Generator.from_pretrained(bundle, backend="torch", verify="none") as torch_gen,
        Generator.from_pretrained(bundle, backend="onnxruntime", verify="none") as ort_gen,
    ):
        for timing in measure({"torch": torch_gen, "onnxruntime": ort_gen}, rounds=30):
            timings.append(timing)
            say(f"   {timing.name}: median {timing.median_ms:.2f} ms, {timing.speedup:.2f}x")
    if as_json:
        print_json({
            "bundle": str(bundle), "pictures": pictures, "parity": [parity.to_dict() for parity in results],
            "latency": [{"name": timing.name, "median_ms": timing.median_ms} for timing in timings],
        })  # fmt: skip
    say(f"Done in {perf_counter() - start:.0f} s. Look at {out}/avatars-2step.png. Next: scm-export --help")
