"""Measure the quantization loss of each layer alone, in each step.

The table shows which layers to exclude from int8; ``exclude_to_target`` excludes the fewest that reach a target. Each
step is measured separately, because the first dominates: with two steps of the shipped model, only the second in int8
gives 47 dB, only the first 38. A layer that is int8 in only one step stores its weights in both precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from scm_sdk._util.events import SILENT, Counter, Events
from scm_sdk._util.files import scratch_folder
from scm_sdk.errors import ParityError

from .half import PRECISION_KEY
from .int8 import Exclusion, QuantizePlan, choose_layers
from .island_search import most_calls, smallest_set
from .probe import Probe
from .session import Session, open_session

if TYPE_CHECKING:
    import onnx_ir as ir

Quantizer = Callable[[QuantizePlan], "ir.Model"]
Candidate = Callable[[QuantizePlan], "ir.Model | Session"]
"""Returns the graph quantized by a plan, or a session that computes the same."""


@contextmanager
def open_candidates(
    model: ir.Model, quantized: Quantizer, plan: QuantizePlan, *, num_threads: int | None = None
) -> Iterator[Candidate]:
    """Open one session for every plan that quantizes no more layers than a given one.

    Inputs of its graph select for each layer whether it reads int8 or its original input. The images equal, bit for
    bit, those of the graph that ``quantized`` returns for the same plan. Float32 graphs are made one by one instead,
    since ONNX Runtime multiplies by their stored weights in another order than by selected ones.

    Args:
        model: The graph to quantize.
        quantized: Quantizes it by a plan.
        plan: The plan that quantizes the most layers.
        num_threads: Threads of a run, ``Probe.num_threads``.

    Raises:
        UnsupportedGraphError: If ONNX Runtime cannot run the graph on a CPU.
    """
    if model.metadata_props.get(PRECISION_KEY, "fp32") == "fp32":
        yield quantized
        return
    names = choose_layers(model, plan).quantized
    switched = _with_switches(quantized(plan), model, names)
    with scratch_folder() as folder:
        session = open_session(switched, folder, num_threads=num_threads)

        def candidate(plan: QuantizePlan) -> Session:
            chosen = set(choose_layers(model, plan).quantized)
            return session.fix({_switch(name): np.array(name in chosen) for name in names})

        yield candidate


def _with_switches(quantized: ir.Model, model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Add a boolean input for each named layer; if it is false, the layer reads its original input in ``model``."""
    import onnx_ir as ir

    graph = quantized.graph
    before = {node.name: node for node in model.graph}
    values = {value.name: value for value in graph.inputs} | dict(graph.initializers)
    values |= {value.name: value for node in graph for value in node.outputs}
    for node in [node for node in graph if node.name in set(names)]:
        switch = ir.Value(name=_switch(node.name or ""), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        graph.inputs.append(switch)
        for i, original in enumerate(before[node.name].inputs[:2]):
            assert original is not None, "choose_layers takes layers with data and a weight"
            if original.name not in values:  # a weight that no other layer reads
                values[original.name] = ir.val(original.name or "", const_value=original.const_value)
                graph.register_initializer(values[original.name])
            name = f"{node.name}/switch_{i}"
            chosen = ir.Value(name=f"{name}.out", shape=original.shape, type=original.type)
            inputs = [switch, node.inputs[i], values[original.name]]
            graph.insert_before(node, ir.Node("", "Where", inputs, outputs=[chosen], name=name))
            node.replace_input_with(i, chosen)
    return quantized


def _switch(layer: str) -> str:
    return f"int8/{layer}"


def sensitivity(
    model: ir.Model, candidate: Candidate, plan: QuantizePlan, probe: Probe, *, counter: Counter | None = None
) -> dict[str, float]:
    """Measure each layer of a plan alone in int8.

    Args:
        model: The graph to quantize.
        candidate: Quantizes it by a plan; see ``open_candidates``.
        plan: Which layers.
        probe: Made from the float32 graph of the same sampler.
        counter: Counts the layers.

    Returns:
        Mean PSNR of a few images, dB, by layer name, such as ``step0/conv/Conv``; lowest first.
    """
    names = choose_layers(model, plan).quantized
    counter = counter or Counter(SILENT, len(names))

    def alone(name: str) -> ir.Model | Session:
        return candidate(plan.excluding(*(Exclusion(pattern=n, reason="one at a time") for n in names if n != name)))

    found = {}
    for name, alone_db in zip(names, probe.map(probe.rank_db, map(alone, names)), strict=True):
        found[name] = alone_db
        counter.step(f"{name} alone in int8: {alone_db:.1f} dB")
    return {name: found[name] for name in sorted(found, key=found.__getitem__)}


def exclude_to_target(
    model: ir.Model,
    candidate: Candidate,
    plan: QuantizePlan,
    probe: Probe,
    target_db: float,
    *,
    events: Events = SILENT,
) -> QuantizePlan:
    """Exclude the fewest layers so that 95 % of the images reach a PSNR.

    Args:
        model: The graph to quantize.
        candidate: Quantizes it by a plan; see ``open_candidates``.
        plan: Where to begin.
        probe: Made from the float32 graph of the same sampler.
        target_db: Target PSNR, dB. The gate judges on other images than the probe, so the target should be above the
            gate by ``build_all.MARGIN_DB``.
        events: Receives what is measured.

    Returns:
        The plan; each new exclusion states the loss of its layer.

    Raises:
        ParityError: If the target cannot be reached without quantized layers.
    """
    start = probe.gate_db(candidate(plan))
    events.note(f"95 % of the images reach {start:.1f} dB by the plan as it is, {target_db:g} dB is the target")
    if start >= target_db:
        return plan
    if (base := probe.gate_db(model)) < target_db:
        raise ParityError(
            f"the graph has {base:.1f} dB with no layer in int8, expected {target_db:.1f} dB. Lower the "
            "target, or keep more of the graph in float32 (scm-export precision --target-psnr)."
        )
    events.stage(f"search the layers to keep out of int8, {probe.spec.num_inference_steps}-step graph")
    count = len(choose_layers(model, plan).quantized)
    counter = Counter(events, count + most_calls(count))
    layers_db = sensitivity(model, candidate, plan, probe, counter=counter)

    def plan_without(names: list[str]) -> QuantizePlan:
        reasons = {n: f"alone in int8 it leaves {layers_db[n]:.1f} dB; target {target_db:g} dB" for n in names}
        return plan.excluding(*(Exclusion(pattern=n, reason=reason) for n, reason in reasons.items()))

    reached = {frozenset[str](): start}

    def passes(names: list[str]) -> bool:
        chosen = frozenset(names)
        if chosen not in reached:
            reached[chosen] = probe.gate_db(candidate(plan_without(names)))
        counter.step(f"{len(names)} of {len(layers_db)} layers not in int8: {reached[chosen]:.1f} dB")
        return reached[chosen] >= target_db

    return plan_without(smallest_set(list(layers_db), lambda chosen: passes(list(chosen)), expect=counter.expect))
