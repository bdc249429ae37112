"""Find the smallest set of nodes that must stay float32 to reach a target PSNR.

Strongly typed engines offer no layer-by-layer precision to play with, so the search edits the graph:
each block in turn runs alone in low precision, and the blocks that cost most become islands until
the target is met.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from scm_sdk._util.progress import Counter, Progress
from scm_sdk.errors import ParityError

from .half import MOVES, Island, PrecisionPlan, apply_precision, island_nodes
from .probe import Probe

if TYPE_CHECKING:
    import onnx_ir as ir

T = TypeVar("T")
_BLOCK = re.compile(r"(step\d+|decoder)/((?:transformer\.|module\.)?[^./]+(?:\.\d+)?)")
"""The part of a network that is tried alone: a module, or one of a list; what wraps a foreign one does not count."""


@dataclass(frozen=True, kw_only=True)
class IslandSearch:
    """What the search found.

    Attributes:
        plan: The plan that reaches the target, each new island with what its block costs alone.
        psnr_db: PSNR that 95 % of the images of that plan reach, dB.
        start_db: The same of the plan that the search began with.
        alone_db: The same with one block in low precision and all others in float32, by pattern, worst first.
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
    progress: Progress = lambda _: None,
) -> IslandSearch:
    """Add the fewest blocks to a plan's islands that bring its pictures to a PSNR.

    Args:
        model: The float32 sampler graph.
        plan: Where to begin.
        probe: Made from the same graph.
        target_db: PSNR that 95 % of the images are to reach, dB.
        progress: Called with a few words for each stage.

    Raises:
        ParityError: If the target is out of reach even with every block in float32.
    """

    def measure(islands: Sequence[Island]) -> float:
        return probe.gate_db(apply_precision(model, plan.with_islands(*islands)))

    start = measure([])
    progress(f"95 % of the images reach {start:.1f} dB by the plan as it is, {target_db:g} dB is the target")
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
    counter = Counter(progress, len(blocks) + most_calls(len(blocks)))
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
        Island(pattern=p, reason=f"alone in {plan.precision} it costs {alone[p]:.1f} dB; target {target_db:.0f} dB")
        for p in chosen
    ]
    found = plan.with_islands(*islands)
    return IslandSearch(
        plan=found, psnr_db=measure(islands), start_db=start, alone_db={p: alone[p] for p in worst_first}
    )


def most_calls(count: int) -> int:
    """Return how often ``smallest_set`` calls ``passes`` for some candidates, at most."""
    return count.bit_length() + count


def smallest_set(
    worst_first: Sequence[T], passes: Callable[[Sequence[T]], bool], *, expect: Callable[[int], object] = lambda _: None
) -> list[T]:
    """Return few of the candidates that together pass: a prefix found by bisection, then thinned out.

    Requires: all of them together pass.

    Args:
        worst_first: Candidates, those that help most first.
        passes: Whether a selection is enough. Called about ``log2(n) + k`` times for ``k`` that are kept.
        expect: Called with the number of calls that are left at most.
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
    for candidate in reversed(kept[:]):  # the least harmful first
        fewer = [other for other in kept if other != candidate]
        if passes(fewer):
            kept = fewer
    return kept


def _patterns(model: ir.Model, plan: PrecisionPlan) -> list[str]:
    """Return one pattern for each block of the network that is not an island yet, in graph order."""
    kept = island_nodes(model.graph, plan)
    found: dict[str, None] = {}
    for node in model.graph:
        if node not in kept and node.op_type not in MOVES and (match := _BLOCK.match(node.name or "")):
            part = f"{'decoder' if match[1] == 'decoder' else 'step*'}/{match[2]}"
            found[f"{part}[./]*" if "/" in (node.name or "")[match.end() :] else part] = None
    return list(found)
