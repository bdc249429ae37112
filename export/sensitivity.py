"""What does each layer lose in int8? Each one alone is quantized, and the pictures are looked at.

The table shows which layers to keep out of int8; ``exclude_to_target`` keeps out the fewest that bring the
pictures to a PSNR.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scm_sdk.errors import ParityError

from .islands import smallest_set
from .probe import Probe
from .quantize import Exclusion, QuantizePlan, choose_layers

if TYPE_CHECKING:
    import onnx_ir as ir

_STEP = re.compile(r"^step\d+/")
Progress = Callable[[str], object]
Quantizer = Callable[[QuantizePlan], "ir.Model"]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """PSNR of a few pictures when one layer alone is quantized.

    Attributes:
        base_db: PSNR with no layer quantized, dB: what the FP16 around them costs.
        layers_db: By pattern, the same layer in every step at once; the most harmful first.
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
    patterns = list(dict.fromkeys(_pattern(name) for name in choose_layers(model, plan).quantized))
    found = {}
    for pattern in patterns:
        others = [Exclusion(pattern=other, reason="one at a time") for other in patterns if other != pattern]
        found[pattern] = probe.psnr_db(quantized(plan.excluding(*others)), glance=True)
        progress(f"{pattern} alone in int8: {found[pattern]:.1f} dB")
    return Sensitivity(
        base_db=probe.psnr_db(model), layers_db={p: found[p] for p in sorted(found, key=found.__getitem__)}
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
    """Exclude the fewest layers that bring the pictures to a PSNR.

    Args:
        model: The graph to quantize.
        quantized: Quantizes it by a plan.
        plan: Where to begin.
        probe: Made from the float32 graph of the same sampler.
        target_db: PSNR to reach, dB.
        progress: Called with a line for each layer.

    Returns:
        The plan; each new exclusion says what its layer costs alone.

    Raises:
        ParityError: If the target is out of reach with no layer quantized at all.
    """
    start = probe.psnr_db(quantized(plan))
    progress(f"as planned: {start:.1f} dB")
    if start >= target_db:
        return plan
    table = sensitivity(model, quantized, plan, probe, progress=progress)
    if table.base_db < target_db:
        raise ParityError(
            f"the graph has {table.base_db:.1f} dB with no layer in int8, expected {target_db:.1f} dB. Lower the "
            "target, or keep more of the graph in float32 (scm-export precision --target-psnr)."
        )

    def plan_without(patterns: list[str]) -> QuantizePlan:
        reasons = {
            p: f"alone in int8 it costs {table.layers_db[p]:.1f} dB; target {target_db:.0f} dB" for p in patterns
        }
        return plan.excluding(*(Exclusion(pattern=p, reason=reason) for p, reason in reasons.items()))

    def passes(patterns: list[str]) -> bool:
        found = probe.psnr_db(quantized(plan_without(patterns)))
        progress(f"{len(patterns)} of {len(table.layers_db)} layers excluded: {found:.1f} dB")
        return found >= target_db

    return plan_without(smallest_set(list(table.layers_db), lambda chosen: passes(list(chosen))))


def _pattern(name: str) -> str:
    return _STEP.sub("step*/", name)
