"""Add INT8 to a bundle: calibrate and quantize, or add a graph that another tool quantized."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.files import atomic_write_bytes, sha256_bytes, sha256_file
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import Draft
from scm_sdk.errors import ConfigError
from scm_sdk.inference.conditioning import Examples

from ..workspace import Workspace
from .calibration import Calibration, Method, calibrate, describe_conditioning
from .external_qdq import adopt_quantized
from .half import LowPrecision, PrecisionPlan, apply_precision, default_plan
from .int8 import FREE, QuantizePlan, choose_layers, default_quantize_plan, quantize, step_of
from .int8_ort import quantize_for_cpu
from .layer_search import Quantizer, exclude_to_target, open_candidates
from .probe import NUM_SAMPLES, Probe
from .smoothquant import choose_factors, equalize
from .variants import (
    Fp32Graph,
    Variant,
    add_graph,
    first_graph,
    fp32_sources,
    own_islands,
    report_all,
    unchanged_variants,
)
from .weight_only import BITS, quantize_weights

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

Int8 = Literal["int8", "int8-cpu", "int8-weights", "int4"]
Base = Literal["fp16", "bf16", "fp32"]


class QuantizeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of quantization.

    Attributes:
        precision: ``int8`` for engines, ``int8-cpu`` for ONNX Runtime and OpenVINO on CPUs; ``int8-weights`` and
            ``int4`` for small files: 8-bit or 4-bit weights alone, which need no calibration.
        base: Precision of the rest of the graph; fp32 for all but ``int8``.
        plan: Excluded layers; None is ``default_quantize_plan``.
        method: Method that chooses ranges; ``minmax`` for ``int8-cpu``.
        percentile: For ``percentile``, percent.
        num_samples: Number of calibration samples, and of further samples for a target; at most 32 without a target.
        seed: Random seed of the calibration samples: see ``calibrate``.
        target_db: PSNR that 95 % of the compared images must reach, dB; layers are excluded until they do.
        equalize: Whether to equalize channels first (``smoothquant``); ``int8`` only.
    """

    precision: Int8 = "int8"
    base: Base = "fp16"
    plan: QuantizePlan | None = None
    method: Method = "minmax"
    percentile: float = 99.99
    num_samples: int = 128
    seed: int = 0
    target_db: float | None = None
    equalize: bool = True

    def __post_init__(self) -> None:
        if self.precision == "int8-cpu" and self.method != "minmax":
            raise ConfigError(
                f"int8-cpu was asked for with method {self.method}, expected minmax: ONNX Runtime's own quantizer "
                "makes it."
            )


def add_int8(
    path: str | os.PathLike[str] | Workspace,
    options: QuantizeOptions | None = None,
    *,
    steps: Sequence[int] = (),
    examples: Examples | None = None,
    events: Events = SILENT,
) -> list[Variant]:
    """Add the INT8 form of a bundle's graphs, calibrated on intermediate states of the sampler.

    Args:
        path: The bundle, or the workspace that it is open in.
        options: Options of quantization; default: ``QuantizeOptions()``.
        steps: Only graphs with these numbers of steps; () is all.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.
        events: Receives the stages and each variant.

    Raises:
        BundleError: If the bundle is damaged or cannot be written.
        ConfigError: If a graph is missing, or a plan does not match the network.
        ParityError: If the target cannot be reached.
    """
    options = options or QuantizeOptions()
    workspace = Workspace.of(path)
    bundle = workspace.open_to_extend()
    base_plan = None
    if options.precision == "int8" and options.base != "fp32":
        base_plan = _base_plan(workspace, options.base)
    recipe = msgspec.to_builtins(options) | {"base_plan": sha256_bytes(base_plan.to_json()) if base_plan else ""}
    if examples is not None:
        recipe["examples"] = examples.sha256
    sources = fp32_sources(workspace, steps, recipe)
    if unchanged := unchanged_variants(bundle, sources, options.precision):
        return report_all(unchanged, events)
    plan = options.plan or default_quantize_plan(sources[-1].model)
    _check_steps(bundle, plan)
    looked_at = options.num_samples if options.target_db is not None else min(NUM_SAMPLES, options.num_samples)
    probes = [source.required_probe(looked_at, examples) for source in sources]
    if options.precision != "int8":
        plan, made = _make_for_cpu(sources, probes, plan, options, examples, events)
    else:
        plan, made = _make_for_engines(sources, probes, plan, base_plan, options, examples, events)
    with workspace.extend(bundle) as draft:
        plan_path = f"precision/{options.precision}.json"
        atomic_write_bytes(draft.path(plan_path), plan.to_json())
        draft.roles[plan_path] = "plan"
        variants = []
        for source, probe, (model, measured) in zip(sources, probes, made, strict=True):
            files = [plan_path, *_write_calibration(draft, source, measured)]
            layers = choose_layers(source.model, plan)
            notes = [f"{layers.share()} in int8", *(f"not {name}: {why}" for name, why in _left_out(layers.left))]
            if options.precision in BITS:
                probe.check_not_blank(model, f"{options.precision}, {source.num_inference_steps} steps")
                count = sum(node.op_type == "MatMulNBits" for node in model.graph)
                notes[0] = f"{count} of {len(layers.quantized)} layers with {BITS[options.precision]}-bit weights"
            elif (conditioning := describe_conditioning(source.spec, examples)) and examples is None:
                notes.append(f"calibrated on {conditioning}: give --prompts for ranges of real ones")
            variants.append(add_graph(draft, model, source, options.precision, probe, built_from=files, notes=notes))
    return report_all(variants, events)


def add_foreign_int8(
    path: str | os.PathLike[str] | Workspace, graph: Path, *, steps: int, events: Events = SILENT
) -> Variant:
    """Add a sampler graph that another tool, such as ModelOpt, quantized with QuantizeLinear nodes.

    Args:
        path: The bundle, or the workspace that it is open in.
        graph: The ONNX file.
        steps: Its number of steps.
        events: Receives the variant.

    Raises:
        UnsupportedGraphError: If engines cannot use it, with the reason.
        ShapeError: If its inputs and outputs do not match the sampler.
        BundleError: If the bundle is damaged or cannot be written.
    """
    workspace = Workspace.of(path)
    bundle = workspace.open_to_extend()
    (source,) = fp32_sources(workspace, [steps], {"foreign": sha256_file(graph) if graph.is_file() else ""})
    if unchanged := unchanged_variants(bundle, [source], "int8"):
        return report_all(unchanged, events)[0]
    model = adopt_quantized(graph, source.spec)
    probe = source.required_probe()
    with workspace.extend(bundle) as draft:
        variant = add_graph(draft, model, source, "int8", probe, built_from=[], notes=[f"adopted from {graph.name}"])
    return report_all([variant], events)[0]


_Made = tuple[QuantizePlan, "list[tuple[ir.Model, Calibration | None]]"]


def _make_for_cpu(
    sources: Sequence[Fp32Graph],
    probes: Sequence[Probe],
    plan: QuantizePlan,
    options: QuantizeOptions,
    examples: Examples | None,
    events: Events,
) -> _Made:
    """Return the plan, with exclusions for the target, and the graph of each source."""

    def quantizer(source: Fp32Graph) -> Quantizer:
        if options.precision in BITS:
            return lambda plan: quantize_weights(source.model, plan, options.precision)
        return lambda plan: quantize_for_cpu(
            source.model, source.spec, plan, num_samples=options.num_samples, seed=options.seed,
            examples=examples,
        )  # fmt: skip

    for source, probe in zip(sources, probes, strict=True):
        events.stage(f"quantize the {source.num_inference_steps}-step graph to {options.precision}")
        if options.target_db is not None:  # one plan for all: each starts from the last
            full = source.model
            plan = exclude_to_target(full, quantizer(source), plan, probe, options.target_db, events=events)
    return plan, [(quantizer(source)(plan), None) for source in sources]


def _make_for_engines(
    sources: Sequence[Fp32Graph],
    probes: Sequence[Probe],
    plan: QuantizePlan,
    base_plan: PrecisionPlan | None,
    options: QuantizeOptions,
    examples: Examples | None,
    events: Events,
) -> _Made:
    """Return the plan, with exclusions for the target, and the graph and ranges of each source."""
    measured = []
    for source, probe in zip(sources, probes, strict=True):
        full = source.model
        base = full if base_plan is None else apply_precision(full, base_plan)
        on = f"the {source.num_inference_steps}-step graph on {options.num_samples} images"
        if options.equalize:
            events.stage(f"measure the channels of {on}")
        factors = _factors(full, source, plan, options, examples, events)
        events.stage(f"calibrate {on}")
        equal = equalize(full, choose_layers(full, plan).quantized, factors)
        calibration = _calibrate(equal, source, plan, options, examples, events)
        quantizer = partial(_equalize_and_quantize, base, factors, calibration)
        if options.target_db is not None:  # one plan for all: each starts from the last
            with open_candidates(base, quantizer, plan, num_threads=probe.num_threads) as candidate:
                plan = exclude_to_target(base, candidate, plan, probe, options.target_db, events=events)
        measured.append((quantizer, calibration))
    return plan, [(quantizer(plan), calibration) for quantizer, calibration in measured]


def _equalize_and_quantize(
    base: ir.Model, factors: dict[str, np.ndarray], calibration: Calibration, plan: QuantizePlan
) -> ir.Model:
    return quantize(equalize(base, choose_layers(base, plan).quantized, factors), calibration, plan)


def _check_steps(bundle: Bundle, plan: QuantizePlan) -> None:
    """Refuse an exclusion for a step that no graph of the bundle has, because it would have no effect."""
    most = max(a.num_inference_steps for a in bundle.artifacts(format="onnx", precision="fp32"))
    known = {"", *(f"step{k}/" for k in range(most))}
    for exclusion in plan.exclusions:
        if step_of(exclusion.pattern) not in known:
            raise ConfigError(
                f"exclusion {exclusion.pattern!r} names a step that no graph of {bundle.path} has, expected step0/ to "
                f"step{most - 1}/, or step*/ for all."
            )


def _base_plan(workspace: Workspace, base: LowPrecision | str) -> PrecisionPlan:
    """Return the plan of the bundle's graph of the base precision, or the default one."""
    bundle, path = workspace.opened, f"precision/{base}.json"
    if any(entry.path == path for entry in bundle.manifest.files):
        return PrecisionPlan.from_json(bundle.file(path).read_bytes())
    model = first_graph(workspace)
    return default_plan("bf16" if base == "bf16" else "fp16").with_islands(*own_islands(model))


def _factors(
    model: ir.Model,
    source: Fp32Graph,
    plan: QuantizePlan,
    options: QuantizeOptions,
    examples: Examples | None,
    events: Events,
) -> dict[str, np.ndarray]:
    if not options.equalize:
        return {}
    layers = choose_layers(model, plan).quantized
    return choose_factors(
        model, layers, source.spec, num_samples=options.num_samples, seed=options.seed, examples=examples, events=events
    )


def _calibrate(
    model: ir.Model,
    source: Fp32Graph,
    plan: QuantizePlan,
    options: QuantizeOptions,
    examples: Examples | None,
    events: Events,
) -> Calibration:
    return calibrate(
        model,
        choose_layers(model, plan).quantized,
        source.spec,
        graph_sha256=str(source.recipe["source"]),
        method=options.method,
        num_samples=options.num_samples,
        seed=options.seed,
        percentile=options.percentile,
        events=events,
        examples=examples,
    )


def _write_calibration(draft: Draft, source: Fp32Graph, calibration: Calibration | None) -> list[str]:
    if calibration is None:
        return []
    path = f"calibration/int8-{source.num_inference_steps}step.json"
    atomic_write_bytes(draft.path(path), calibration.to_json())
    draft.roles[path] = "calibration"
    draft.built_from[path] = (source.artifact.path,)
    return [path]


def _left_out(left: dict[str, str]) -> list[tuple[str, str]]:
    """Return the layers excluded by the user or the plan, without those of general rules; once for all steps."""
    steps = {step_of(name) for name in left}
    named: dict[tuple[str, str], list[str]] = {}
    for name, why in left.items():
        if why != FREE:
            named.setdefault((name.removeprefix(step_of(name)), why), []).append(name)
    return [
        (name, why)
        for (layer, why), names in named.items()
        for name in ([layer] if len(names) == len(steps) else names)
    ]
