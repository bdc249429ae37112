"""Find the smallest set of nodes that must stay float32 to reach a target PSNR.

Strongly typed engines have no per-layer precision option, so the search edits the graph: each block runs alone in
reduced precision, and the blocks with the largest loss become islands until the target is reached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from scm_sdk._util.events import SILENT, Counter, Events
from scm_sdk.errors import ParityError

from .half import MOVES, Island, PrecisionPlan, apply_precision, island_nodes
from .probe import Probe

if TYPE_CHECKING:
    import onnx_ir as ir

T = TypeVar("T")
_BLOCK = re.compile(r"(step\d+|decoder)/((?:transformer\.|module\.)?[^./]+(?:\.\d+)?)")
"""Pattern of a block: a module, or one of a list, ignoring wrappers of imported networks."""


@dataclass(frozen=True, kw_only=True)
class IslandSearch:
    """Result of the search.

    Attributes:
        plan: The plan that reaches the target; each new island states the loss of its block.
        psnr_db: PSNR that 95 % of the images of the plan reach, dB.
        start_db: PSNR of the initial plan, dB.
        alone_db: PSNR with one block in reduced precision and all others in float32, by pattern, lowest first.
    """

    plan: PrecisionPlan
    psnr_db: float
    start_db: float
    alone_db: dict[str, float]


def find_islands(
    model: ir.Model,
    plan: PrecisionPlan,
    probe: Probe,
    target_db: float,
    *,
    events: Events = SILENT,
) -> IslandSearch:
    """Add the fewest blocks to a plan's islands so that 95 % of the images reach a PSNR.

    Args:
        model: The float32 sampler graph.
        plan: The initial plan.
        probe: A probe of the same graph.
        target_db: PSNR that 95 % of the images must reach, dB.
        events: Receives what is measured.

    Raises:
        ParityError: If the target cannot be reached with every block in float32.
    """

    def measure(islands: Sequence[Island]) -> float:
        return probe.gate_db(apply_precision(model, plan.with_islands(*islands)))

    start = measure([])
    events.note(f"95 % of the images reach {start:.1f} dB by the plan as it is, {target_db:g} dB is the target")
    if start >= target_db:
        return IslandSearch(plan=plan, psnr_db=start, start_db=start, alone_db={})
    blocks = {pattern: Island(pattern=pattern, reason="float32 for the search") for pattern in _patterns(model, plan)}
    best = measure(list(blocks.values()))
    if best < target_db:
        noise = probe.noise_rounding_db()
        raise ParityError(
            f"{plan.precision} reaches {best:.1f} dB with every block in float32, expected {target_db:.1f} dB; "
            f"rounding the noise alone to float16 leaves {noise:.1f} dB. The network magnifies too much for this "
            "target: lower it, or ship fp32."
        )
    alone: dict[str, float] = {}
    counter = Counter(events, len(blocks) + most_calls(len(blocks)))
    for pattern in blocks:
        alone[pattern] = measure([island for other, island in blocks.items() if other != pattern])
        counter.step(f"{pattern} alone in {plan.precision}: {alone[pattern]:.1f} dB")
    worst_first = sorted(alone, key=alone.__getitem__)

    def passes(patterns: Sequence[str]) -> bool:
        reached = measure([blocks[p] for p in patterns])
        counter.step(f"{len(patterns)} of {len(blocks)} blocks in float32: {reached:.1f} dB")
        return reached >= target_db

    chosen = smallest_set(worst_first, passes, expect=counter.expect)
    islands = [
        Island(pattern=p, reason=f"alone in {plan.precision} it leaves {alone[p]:.1f} dB; target {target_db:g} dB")
        for p in chosen
    ]
    found = plan.with_islands(*islands)
    return IslandSearch(
        plan=found, psnr_db=measure(islands), start_db=start, alone_db={p: alone[p] for p in worst_first}
    )


def most_calls(count: int) -> int:
    """Return the maximum number of calls of ``passes`` by ``smallest_set``."""
    return count.bit_length() + count


def smallest_set(
    worst_first: Sequence[T], passes: Callable[[Sequence[T]], bool], *, expect: Callable[[int], object] = lambda _: None
) -> list[T]:
    """Return a small set of candidates that passes: a prefix found by bisection, then reduced.

    Requires: all candidates together pass.

    Args:
        worst_first: Candidates, those with the largest effect first.
        passes: Whether a selection passes. Called about ``log2(n) + k`` times for ``k`` kept candidates.
        expect: Called with the maximum number of remaining calls.
    """
    low, high = 0, len(worst_first)
    while low < high:
        expect((high - low).bit_length() + high)
        middle = (low + high) // 2
        if passes(worst_first[:middle]):
            high = middle
        else:
            low = middle + 1
    kept = list(worst_first[:high])
    expect(len(kept))
    for candidate in reversed(kept[:]):  # in order of increasing harm
        fewer = [other for other in kept if other != candidate]
        if passes(fewer):
            kept = fewer
    return kept


def _patterns(model: ir.Model, plan: PrecisionPlan) -> list[str]:
    """Return one pattern per block of the network that is not an island, in graph order."""
    kept = island_nodes(model.graph, plan)
    found: dict[str, None] = {}
    for node in model.graph:
        if node not in kept and node.op_type not in MOVES and (match := _BLOCK.match(node.name or "")):
            part = f"{'decoder' if match[1] == 'decoder' else 'step*'}/{match[2]}"
            found[f"{part}[./]*" if "/" in (node.name or "")[match.end() :] else part] = None
    return list(found)
