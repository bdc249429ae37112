"""``inspect``: contents of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from scm_sdk.errors import printable

from .common import json_option, make_console, make_table, plural, print_json, print_table, say
from .located import model_argument

if TYPE_CHECKING:
    from scm_sdk.bundle.bundle import Bundle


@click.command()
@model_argument("bundle")
@click.option(
    "--portable", is_flag=True, help="Check the graphs for operators that browser and phone runtimes compute wrong."
)
@json_option
def inspect(bundle: Path, portable: bool, as_json: bool) -> None:
    """Show the samplers, files, parity records and provenance.

    --portable lists the nodes that a runtime computes wrong or refuses, with a workaround. Exit 5 if an export for
    that runtime cannot avoid them.
    """
    import msgspec

    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.bundle.layout import DECODER_PATH, FRAME_DECODER_FOLDER
    from scm_sdk.bundle.manifest import describe_size
    from scm_sdk.bundle.subset import artifact_names

    opened = Bundle.open(bundle, verify="none")
    if portable:
        _portable(opened, as_json)
        return
    manifest, status = opened.manifest, opened.status
    sizes = [describe_size(size) for size in manifest.image_sizes if len(manifest.samplers[0].image_shape) > 2]
    if as_json:
        print_json({**msgspec.to_builtins(manifest), "image_sizes": sizes, "status": status.to_dict()})
        return
    console = make_console()
    console.print(f"{printable(manifest.name)}  build {manifest.build_id[:12]}  schema {manifest.schema_version}")
    if manifest.cut_from:
        console.print(f"cut from build {printable(manifest.cut_from[:12])}: some of its artifacts")
    console.print(printable(f"{status.kind}, objective {status.objective or 'not on record'}"), soft_wrap=True)
    console.print(printable(f"training: {status.training}; quality: {status.quality}"), soft_wrap=True)
    for text in status.training_warnings:
        console.print(printable(f"warning: {text}"), soft_wrap=True)
    for spec in manifest.samplers:
        times = ", ".join(f"{t:.4f}" for t in spec.times)
        classes = "1 class" if spec.num_classes == 1 else f"{spec.num_classes} classes"
        console.print(f"{plural(spec.num_inference_steps, 'step')} at t = {times}: {spec.sample_shape}, "
                      f"{classes}, batch 1..{spec.max_batch}")  # fmt: skip
    for name, size in zip(sizes[1:], manifest.sizes, strict=True):
        steps = ", ".join(str(spec.num_inference_steps) for spec in size.samplers)
        console.print(f"further size {name}, height x width: {steps} steps, samples {size.samplers[0].sample_shape}; "
                      f"the first is {sizes[0]}", soft_wrap=True)  # fmt: skip
    if manifest.is_split:
        decoder = FRAME_DECODER_FOLDER if manifest.has_frame_decoder else DECODER_PATH
        console.print(f"split: graphs and engines end in latents, {decoder} decodes them")
    if manifest.samplers[0].class_names:
        console.print(printable("labels: " + ", ".join(manifest.samplers[0].class_names)))
    names = artifact_names(manifest)
    artifacts = make_table("artifact", "format", "precision", "steps")
    for artifact in manifest.all_artifacts:
        steps = str(artifact.num_inference_steps or "any")
        artifacts.add_row(printable(names[artifact.path]), artifact.format, artifact.precision, steps)
    print_table(artifacts)
    files = make_table("file", "bytes", "sha256")
    for entry in manifest.files:
        files.add_row(entry.path, f"{entry.size:,}", entry.sha256[:12])
    print_table(files)
    if manifest.parity:
        parity = make_table("parity of", "backend", "found", "samples", "verdict")
        for record in manifest.parity:
            of = names.get(record.artifact, record.artifact)
            parity.add_row(of, record.way, record.finding, str(record.num_samples), record.verdict)
        print_table(parity)
    for key, value in (*manifest.provenance.items(), *manifest.versions.items()):
        console.print(printable(f"{key}: {value}"))


def _portable(bundle: Bundle, as_json: bool) -> None:
    from scm_sdk.bundle.subset import artifact_names
    from scm_sdk.errors import UnsupportedGraphError

    from ..edge.portability import RULES, describe_nodes, find_faults
    from ..graph.io import read_model
    from .libraries import require_all

    require_all("onnx_ir")
    names = artifact_names(bundle.manifest)
    graphs = [artifact for artifact in bundle.manifest.all_artifacts if artifact.format == "onnx"]
    found = {names[graph.path]: find_faults(read_model(bundle.file(graph.path))) for graph in graphs}
    if as_json:
        print_json([
            {"artifact": name, "rule": f.rule.name, "runtime": f.rule.runtime, "version": f.rule.version,
             "node": f.node, "op_type": f.op_type, "rewritten": f.rule.rewrite is not None}
            for name, findings in found.items() for f in findings
        ])  # fmt: skip
    fatal = []
    for name, findings in found.items():
        for rule in RULES:
            nodes = [finding.node for finding in findings if finding.rule is rule]
            if not nodes:
                continue
            then = "the export for it rewrites them" if rule.rewrite is not None else f"expected {rule.remedy}"
            say(f"{printable(name)}: {rule.name}: {rule.runtime} ({rule.version}) {rule.fault}: "
                f"{printable(describe_nodes(nodes))}; {then}")  # fmt: skip
            fatal += [] if rule.rewrite is not None else [f"{name} on {rule.runtime}: {rule.name}"]
    say(f"{plural(len(graphs), 'graph')}, {plural(len(RULES), 'rule')}, "
        f"{plural(sum(map(len, found.values())), 'finding')}")  # fmt: skip
    if fatal:
        raise UnsupportedGraphError(
            f"{printable('; '.join(fatal))}. Expected graphs that these runtimes compute right; the lines above say "
            "what avoids it."
        )
