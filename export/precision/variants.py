"""Add other precisions to a bundle: one graph per number of steps, and its plan.

Current artifacts are kept, so that an interrupted command can be repeated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.files import atomic_write_bytes, sha256_bytes
from scm_sdk._version import __version__
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import Draft, recipe_of
from scm_sdk.bundle.layout import DECODER_PATH
from scm_sdk.bundle.manifest import Artifact, ImageSize, describe_size
from scm_sdk.errors import ConfigError, UnsupportedGraphError
from scm_sdk.inference.conditioning import Examples
from scm_sdk.spec import Precision, SamplerSpec

from ..graph.io import (
    GRAPH_NAME,
    GraphReport,
    data_path_of,
    sized_name,
    write_beside,
    write_model,
)
from ..workspace import Workspace, sha256_of
from .cpu import cpu_form
from .fp16_unsafe import ISLANDS_KEY
from .half import Island, PrecisionPlan, apply_precision, count_precisions
from .island_search import find_islands
from .probe import NUM_SAMPLES, Probe

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One graph of a bundle in one precision.

    Attributes:
        path: Path inside the bundle.
        precision: Precision of the graph.
        num_inference_steps: Number of steps.
        unchanged: Whether an identical graph existed already.
        graph: Report of the written graph; None if unchanged.
        nodes: Number of nodes by type; empty if unchanged.
        psnr_db: PSNR that 95 % of the probe's images reach vs fp32, dB; None if a CPU cannot run it.
        notes: Further notes for the user.
    """

    path: str
    precision: Precision
    num_inference_steps: int
    unchanged: bool = False
    graph: GraphReport | None = None
    nodes: Mapping[str, int] = field(default_factory=dict)
    psnr_db: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.graph is None:
            return f"{self.path}: unchanged"
        size = (self.graph.bytes + self.graph.data_bytes) / 1e6
        nodes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(self.nodes.items(), key=lambda x: -x[1]))
        look = "not run: no CPU kernels" if self.psnr_db is None else f"95 % of images reach {self.psnr_db:.1f} dB"
        return "; ".join([f"{self.path}: {size:.1f} MB, nodes {nodes}", look, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "graph": self.graph.to_dict() if self.graph else None}


def add_precision(
    path: str | os.PathLike[str] | Workspace,
    plan: PrecisionPlan,
    *,
    target_db: float | None = None,
    steps: Sequence[int] = (),
    num_samples: int = NUM_SAMPLES,
    examples: Examples | None = None,
    events: Events = SILENT,
) -> list[Variant]:
    """Add the FP16 or BF16 form of a bundle's fp32 graphs.

    Args:
        path: The bundle, or the workspace that it is open in.
        plan: Nodes that stay in float32.
        target_db: PSNR that 95 % of the compared images must reach, dB; blocks become islands until they do. Only for
            fp16, which a CPU can run.
        steps: Only graphs with these numbers of steps; () is all.
        num_samples: Number of images for the comparison and the search; 0 for none, for graphs that run for minutes.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.
        events: Receives the stages and each variant.

    Returns:
        One variant per number of steps.

    Raises:
        BundleError: If the bundle is damaged or cannot be written.
        ConfigError: If an fp32 graph is missing, or the plan does not match the network.
        ParityError: If the target cannot be reached.
    """
    workspace = Workspace.of(path)
    bundle = workspace.open_to_extend()
    options = {"plan": sha256_bytes(plan.to_json()), "target_db": target_db}
    if examples is not None and target_db is not None:  # the search depends on them
        options["examples"] = examples.sha256
    sources = fp32_sources(workspace, steps, options, every_size=True)
    if unchanged := unchanged_variants(bundle, sources, plan.precision):
        return report_all(unchanged, events)
    if target_db is not None and not num_samples:
        raise ConfigError("num_samples is 0, expected 1 or more with target_db: islands are found by their pictures.")
    models = [source.model for source in sources]
    plan = plan.with_islands(*(island for island in own_islands(models[0]) if island not in plan.islands))
    probes = [source.probe(num_samples, examples) for source in sources]
    if target_db is not None:
        for model, probe in zip(models, probes, strict=True):  # one plan for all: each search starts from the last plan
            assert probe is not None
            events.stage(f"search the blocks to keep in float32, {probe.spec.num_inference_steps}-step graph")
            plan = find_islands(model, plan, probe, target_db, events=events).plan
    plan_path = f"precision/{plan.precision}.json"
    with workspace.extend(bundle) as draft:
        atomic_write_bytes(draft.path(plan_path), plan.to_json())
        draft.roles[plan_path] = "plan"
        variants = []
        for source, model, probe in zip(sources, models, probes, strict=True):
            events.stage(f"write the {source.title} in {plan.precision}")
            low = apply_precision(model, plan)
            variants.append(add_graph(draft, low, source, plan.precision, probe, built_from=[plan_path]))
    return report_all(variants, events)


def add_cpu_form(
    path: str | os.PathLike[str] | Workspace,
    *,
    steps: Sequence[int] = (),
    num_samples: int = NUM_SAMPLES,
    examples: Examples | None = None,
    events: Events = SILENT,
) -> list[Variant]:
    """Add the ``fp32-cpu`` form of a bundle's graphs: float32 with operators that are fast on CPUs.

    Args:
        path: The bundle, or the workspace that it is open in.
        steps: Only graphs with these numbers of steps; () is all.
        num_samples: Number of images for the comparison; 0 for none.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.
        events: Receives the stages and each variant.

    Raises:
        BundleError: If the bundle is damaged or cannot be written.
        ConfigError: If it has no such fp32 graph.
        UnsupportedGraphError: If no operator can be replaced.
    """
    workspace = Workspace.of(path)
    bundle = workspace.open_to_extend()
    sources = fp32_sources(workspace, steps, {}, every_size=True)
    if unchanged := unchanged_variants(bundle, sources, "fp32-cpu"):
        return report_all(unchanged, events)
    made = [(source, *cpu_form(source.model)) for source in sources]
    with workspace.extend(bundle) as draft:
        variants = []
        for source, model, notes in made:
            events.stage(f"write the {source.title} in fp32-cpu")
            probe = source.probe(num_samples, examples)
            variants.append(add_graph(draft, model, source, "fp32-cpu", probe, built_from=[], notes=notes))
    return report_all(variants, events)


def report_all(variants: list[Variant], events: Events) -> list[Variant]:
    """Report each variant, now that it is in the bundle, and return them."""
    for variant in variants:
        events.result(variant)
    return variants


def own_islands(model: ir.Model) -> tuple[Island, ...]:
    """Return the operators that a network declares to stay in float32, in addition to the default ones."""
    patterns = model.metadata_props.get(ISLANDS_KEY, "").split()
    return tuple(Island(pattern=pattern, reason="said to be needed by the network itself") for pattern in patterns)


@dataclass(frozen=True, kw_only=True)
class Fp32Graph:
    """One fp32 graph of a bundle, the source of variants.

    Attributes:
        artifact: Entry in the manifest.
        workspace: Workspace of the bundle.
        spec: The spec of the graph: that of the sampler, or, in a split bundle, before its decoder.
        recipe: Inputs of a variant: the options, the digest of the graph, the version.
        size: Image size of the graph if that is a further one of the bundle; None is the first.
    """

    artifact: Artifact
    workspace: Workspace
    spec: SamplerSpec
    recipe: dict[str, Any]
    size: ImageSize | None = None

    @property
    def title(self) -> str:
        """The graph in words."""
        at = "" if self.size is None else f" of {describe_size(self.size)} pixels"
        return f"{self.num_inference_steps}-step graph{at}"

    def variant_path(self, precision: str) -> str:
        """Return the path of a variant in the bundle."""
        return variant_path(precision, self.num_inference_steps, self.size)

    @property
    def num_inference_steps(self) -> int:
        """Number of steps."""
        return self.artifact.num_inference_steps

    @property
    def model(self) -> ir.Model:
        """The parsed graph; clone it before you change it."""
        return self.workspace.graph(self.artifact.path)

    @property
    def graph(self) -> Path:
        """The file."""
        return self.workspace.opened.file(self.artifact.path)

    def probe(self, num_samples: int, examples: Examples | None) -> Probe | None:
        """Return the probe of its variants; None without a comparison."""
        return self.required_probe(num_samples, examples) if num_samples else None

    def required_probe(self, num_samples: int = NUM_SAMPLES, examples: Examples | None = None) -> Probe:
        """Return the probe of its variants.

        Raises:
            ConfigError: If ``num_samples`` is less than 1.
        """
        bundle, steps = self.workspace.opened.holding(self.artifact.path), self.num_inference_steps
        # Clips are compared before a frame decoder, which takes as long as the sampler.
        spec = bundle.graph_spec(steps) if bundle.manifest.has_frame_decoder else bundle.spec(steps)
        return Probe(
            self.graph, spec, num_samples=num_samples, examples=examples,
            decoder=bundle.file(DECODER_PATH) if bundle.manifest.has_decoder_graph else None,
        )  # fmt: skip


def fp32_sources(
    workspace: Workspace, steps: Sequence[int], options: Mapping[str, Any], *, every_size: bool = False
) -> list[Fp32Graph]:
    """Return the float32 graphs of a bundle, fewest steps first; with ``every_size`` then those of its further sizes.

    Raises:
        ConfigError: If there are no graphs, or none for one of ``steps``.
    """
    bundle = workspace.opened
    found = sorted(bundle.artifacts(format="onnx", precision="fp32"), key=lambda a: a.num_inference_steps)
    there = [a.num_inference_steps for a in found]
    if not found or not set(steps) <= set(there):
        raise ConfigError(
            f"{bundle.path} has fp32 graphs for {there or 'no'} steps, expected {list(steps) or 'at least one'}."
            f"{bundle.manifest.cut_note or ' Export them first: scm-export onnx'}"
        )
    first, *others = bundle.manifest.image_sizes
    graphs: list[tuple[ImageSize | None, Artifact]] = [(None, artifact) for artifact in found]
    for size in others if every_size else ():
        at_size = bundle.at_size(*size).artifacts(format="onnx", precision="fp32")
        graphs += [(size, artifact) for artifact in sorted(at_size, key=lambda a: a.num_inference_steps)]
    return [
        Fp32Graph(
            artifact=a,
            workspace=workspace,
            spec=bundle.at_size(*(size or first)).graph_spec(a.num_inference_steps),
            recipe={**options, "source": sha256_of(bundle, a.path), "scm_sdk": __version__},
            size=size,
        )
        for size, a in graphs
        if not steps or a.num_inference_steps in steps
    ]


def first_graph(path: str | os.PathLike[str] | Workspace, steps: Sequence[int] = ()) -> ir.Model:
    """Return the float32 graph with the fewest steps, for inspecting its layers; clone it before a change."""
    return fp32_sources(Workspace.of(path), steps, {})[0].model


def unchanged_variants(bundle: Bundle, sources: Sequence[Fp32Graph], precision: Precision) -> list[Variant]:
    """Return the variants of all sources if each exists and is current; else nothing."""
    paths = [source.variant_path(precision) for source in sources]
    if any(recipe_of(bundle, path) != source.recipe for source, path in zip(sources, paths, strict=True)):
        return []
    return [
        Variant(path=path, precision=precision, num_inference_steps=source.num_inference_steps, unchanged=True)
        for source, path in zip(sources, paths, strict=True)
    ]


def add_graph(
    draft: Draft,
    model: ir.Model,
    source: Fp32Graph,
    precision: Precision,
    probe: Probe | None,
    *,
    built_from: Sequence[str],
    notes: Sequence[str] = (),
) -> Variant:
    """Write a graph into a bundle's draft as a variant of a source, and compare its images.

    That of a further image size shares the weights of the first one's, which must have been added before.

    Args:
        draft: The draft.
        model: The graph.
        source: The source of the variant.
        precision: Precision of the variant.
        probe: Probe of the source; None for no comparison.
        built_from: Further source files in the bundle.
        notes: Further notes for the user.
    """
    steps, path = source.num_inference_steps, source.variant_path(precision)
    data = data_path_of(Path(path)).as_posix()
    draft.path(data)  # external weights of an older graph
    if source.size is not None:
        report = write_beside(model, draft.path(path), draft.folder / variant_path(precision, steps))
    elif draft.bundle.manifest.sizes:  # whose graphs refer to a file of weights
        report = write_model(model, draft.path(path), external_data_above=0)
    else:
        report = write_model(model, draft.path(path))
    draft.digests |= {path: report.sha256, data: report.data_sha256}
    draft.add(
        Artifact(path=path, format="onnx", precision=precision, num_inference_steps=steps, recipe=source.recipe),
        [source.artifact.path, *built_from],
        files=[data] if report.data_path else [],
        size=source.size,
    )
    try:
        psnr_db = probe.gate_db(report.path) if probe is not None else None
    except UnsupportedGraphError:  # no CPU kernels, for example for bf16
        psnr_db = None
    return Variant(
        path=path,
        precision=precision,
        num_inference_steps=steps,
        graph=report.moved(draft.bundle.path / path),
        nodes=dict(count_precisions(model)),
        psnr_db=psnr_db,
        notes=tuple(notes),
    )


def variant_path(precision: str, num_inference_steps: int, size: ImageSize | None = None) -> str:
    """Return the path of a graph in a bundle; ``size`` None is the first image size."""
    name = GRAPH_NAME if size is None else sized_name(size)
    return f"onnx/{precision}/{num_inference_steps}step/{name}"
