"""Measure the quantization loss of each layer alone, in each step.

The table shows which layers to keep out of int8; ``exclude_to_target`` keeps out the fewest with which a gate takes the
pictures. Each step is looked at by itself, since the first decides: of the shipped model's two, the second
alone in int8 leaves 47 dB, the first alone 38. The price is the room of a layer's weights in both precisions where one
step has them in int8 and another has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scm_sdk._util.progress import Counter, Progress
from scm_sdk.errors import ParityError

from .int8 import Exclusion, QuantizePlan, choose_layers
from .island_search import most_calls, smallest_set
from .probe import Probe

if TYPE_CHECKING:
    import onnx_ir as ir

Quantizer = Callable[[QuantizePlan], "ir.Model"]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How near pictures stay when one layer of one step alone is quantized.

    Attributes:
        base_db: What a gate would take with no layer quantized, dB: what the FP16 around them costs.
        layers_db: Mean PSNR of a few single pictures, dB, by the layer's name, such as ``step0/conv/Conv``; the most
            harmful first.
    """

    base_db: float
    layers_db: dict[str, float]


def sensitivity(
    model: ir.Model, quantized: Quantizer, plan: QuantizePlan, probe: Probe, *, progress: Progress = lambda _: None
) -> Sensitivity:
    """Quantize each layer of a plan alone.

    Args:
        model: The graph to quantize.
        quantized: Quantizes it by a plan.
        plan: Which layers.
        probe: Made from the float32 graph of the same sampler.
        progress: Called with a line for each layer.
    """
    names = choose_layers(model, plan).quantized
    found = {}
    for name in names:
        others = [Exclusion(pattern=other, reason="one at a time") for other in names if other != name]
        found[name] = probe.rank_db(quantized(plan.excluding(*others)))
        progress(f"{name} alone in int8: {found[name]:.1f} dB")
    return Sensitivity(
        base_db=probe.gate_db(model), layers_db={n: found[n] for n in sorted(found, key=found.__getitem__)}
    )


def exclude_to_target(
    model: ir.Model,
    quantized: Quantizer,
    plan: QuantizePlan,
    probe: Probe,
    target_db: float,
    *,
    progress: Progress = lambda _: None,
) -> QuantizePlan:
    """Exclude the fewest layers with which 95 % of the images reach a PSNR.

    Args:
        model: The graph to quantize.
        quantized: Quantizes it by a plan.
        plan: Where to begin.
        probe: Made from the float32 graph of the same sampler.
        target_db: PSNR to reach, dB. The images are those of the probe; the gate judges on others, so the target is to
            lie above the gate (``chain.MARGIN_DB``).
        progress: Called with a line for each stage; the measurements are ``Step``.

    Returns:
        The plan; each new exclusion says what its layer costs alone.

    Raises:
        ParityError: If the target is out of reach with no layer quantized at all.
    """
    start = probe.gate_db(quantized(plan))
    progress(f"95 % of the images reach {start:.1f} dB by the plan as it is, {target_db:g} dB is the target")
    if start >= target_db:
        return plan
    count = len(choose_layers(model, plan).quantized)
    counter = Counter(progress, count + most_calls(count))
    table = sensitivity(model, quantized, plan, probe, progress=counter.step)
    if table.base_db < target_db:
        raise ParityError(
            f"the graph has {table.base_db:.1f} dB with no layer in int8, expected {target_db:.1f} dB. Lower the "
            "target, or keep more of the graph in float32 (scm-export precision --target-psnr)."
        )

    def plan_without(names: list[str]) -> QuantizePlan:
        reasons = {n: f"alone in int8 it costs {table.layers_db[n]:.1f} dB; target {target_db:.0f} dB" for n in names}
        return plan.excluding(*(Exclusion(pattern=n, reason=reason) for n, reason in reasons.items()))

    def passes(names: list[str]) -> bool:
        found = probe.gate_db(quantized(plan_without(names)))
        counter.step(f"{len(names)} of {len(table.layers_db)} layers not in int8: {found:.1f} dB")
        return found >= target_db

    return plan_without(smallest_set(list(table.layers_db), lambda chosen: passes(list(chosen)), expect=counter.expect))
