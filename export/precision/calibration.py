"""Calibrate activation ranges on intermediate states of the sampler, separately for each step.

A quantizer needs the range of the input of each layer. The graph of the whole sampler runs on seeded noise, so that the
second step receives actual outputs of the first, and each step, which has its own nodes, gets its own ranges. Extremes
are computed inside the graph and histograms in groups, so that memory does not grow with the number of samples or
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import msgspec
import numpy as np

from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.files import scratch_folder
from scm_sdk._util.json_struct import JsonFile
from scm_sdk._util.lazy import require
from scm_sdk.errors import ConfigError, ExportError
from scm_sdk.inference.conditioning import Examples
from scm_sdk.inference.parity.reference import CALIBRATION
from scm_sdk.spec import SamplerSpec

from ..graph.ops import stored
from .probe import feeds_of
from .session import open_session

if TYPE_CHECKING:
    import onnx_ir as ir

Method = Literal["minmax", "percentile", "entropy"]
MAX_SAMPLES = 1 << 20
"""Number of samples per calibration ``seed``."""
NUM_BINS = 2048
"""Histogram bins of |x| between 0 and its largest value."""
_ENTROPY_BINS = 512
"""Histogram bins for ``entropy``; fewer, because the search over thresholds is quadratic in this number."""
_GROUP_BYTES = 256 * 2**20
"""Maximum number of activations per histogram run."""


class Calibration(JsonFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ranges of the inputs of layers; stored in a bundle as ``calibration/<p>-<n>step.json``.

    Attributes:
        method: Method that chooses a range.
        num_samples: Number of calibration samples.
        seed: Random seed of the calibration samples.
        percentile: Share of |x| inside the range, percent; for ``percentile``.
        graph_sha256: Digest of the graph.
        conditioning: Source of the conditioning inputs; "" for a model that takes labels and guidance only.
        ranges: Largest representable absolute value, by the name of the node that reads it.
    """

    TITLE = "calibration"
    REMEDY = "Calibrate again: scm-export quantize"

    method: Method
    num_samples: int
    seed: int
    percentile: float
    graph_sha256: str
    ranges: dict[str, Annotated[float, msgspec.Meta(ge=0)]]
    conditioning: str = ""


def calibrate(
    model: ir.Model,
    nodes: Sequence[str],
    spec: SamplerSpec,
    *,
    graph_sha256: str,
    method: Method = "minmax",
    num_samples: int = 128,
    seed: int = 0,
    percentile: float = 99.99,
    batch_size: int = 8,
    examples: Examples | None = None,
    events: Events = SILENT,
) -> Calibration:
    """Measure the ranges of the inputs of nodes.

    Args:
        model: The float32 sampler graph; it is not changed.
        nodes: Names of the nodes whose first input is measured.
        spec: The sampler.
        graph_sha256: Digest of the graph, stored with the result.
        method: ``minmax`` keeps all values; ``percentile`` clips the largest; ``entropy`` chooses the clipping that
            changes the distribution by the smallest amount (Kullback-Leibler divergence).
        num_samples: Number of samples.
        seed: Random seed: noise is drawn from seeds ``CALIBRATION.start + seed * MAX_SAMPLES + i``.
        percentile: For ``percentile``, percent.
        batch_size: Batch size; it limits memory.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.
        events: Receives a step for each batch.

    Returns:
        The ranges, reproducible on one machine.

    Raises:
        ConfigError: If an argument is out of range, a node is not in the graph, or there are no nodes.
        ExportError: If an activation is not finite; the message names the node.
        BackendUnavailable: If onnxruntime is not installed.
    """
    if not 1 <= num_samples <= MAX_SAMPLES or not 0 <= seed < 2**20 or not 50 <= percentile <= 100:
        raise ConfigError(
            f"num_samples is {num_samples}, seed {seed}, percentile {percentile}; expected 1..2**20 samples, "
            "a seed in 0..2**20-1 and a percentile in 50..100."
        )
    if method not in get_args(Method) or batch_size < 1:
        raise ConfigError(
            f"method is {method!r} and batch_size {batch_size}; expected one of {', '.join(get_args(Method))} and at "
            "least 1 picture at once."
        )
    if not nodes:
        raise ConfigError("there is no layer to calibrate, expected at least one. Exclude fewer layers, or use fp16.")
    missing = set(nodes) - {node.name for node in model.graph}
    if missing:
        raise ConfigError(f"the graph has no node {sorted(missing)[0]!r}, expected names out of it.")
    seeds = calibration_seeds(spec, num_samples=num_samples, seed=seed, batch_size=batch_size)
    runner = Runner(model, spec, seeds, events, examples)
    largest = runner.largest(nodes)
    for name, value in largest.items():
        if not np.isfinite(value):
            raise ExportError(
                f"node {name!r} reads NaN or infinity, expected finite numbers. The network itself overflows in "
                "float32: look at its weights."
            )
    if method != "minmax":
        cut = _percentile_cut(percentile) if method == "percentile" else _entropy_cut
        bins = NUM_BINS if method == "percentile" else _ENTROPY_BINS
        histograms = runner.histograms(largest, bins, len(seeds[0]))
        largest = {name: cut(histogram, largest[name]) for name, histogram in histograms}
    return Calibration(
        method=method,
        num_samples=num_samples,
        seed=seed,
        percentile=percentile,
        graph_sha256=graph_sha256,
        conditioning=describe_conditioning(spec, examples),
        ranges={name: float(largest[name]) for name in nodes},
    )


def calibration_seeds(spec: SamplerSpec, *, num_samples: int, seed: int, batch_size: int) -> list[range]:
    """Return the seeds of each batch: ``CALIBRATION.start + seed * MAX_SAMPLES + i``."""
    batch = min(batch_size, spec.max_batch)
    first = CALIBRATION.start + seed * MAX_SAMPLES
    return [range(first + a, first + min(a + batch, num_samples)) for a in range(0, num_samples, batch)]


def describe_conditioning(spec: SamplerSpec, examples: Examples | None) -> str:
    """Return the source of the conditioning inputs; "" for a model that takes labels and guidance only."""
    if not spec.conditioning:
        return ""
    if examples is not None:
        return f"{examples.source}, sha256 {examples.sha256}"
    return f"{', '.join(tensor.name for tensor in spec.conditioning)}: drawn from the seeds, standard normal"


class Runner:
    """Runs a graph on all batches with additional outputs."""

    def __init__(
        self,
        model: ir.Model,
        spec: SamplerSpec,
        seeds: Sequence[range],
        events: Events,
        examples: Examples | None = None,
    ) -> None:
        self.model, self.spec, self.seeds, self.events = model, spec, seeds, events
        self.examples = examples

    def largest(self, names: Sequence[str]) -> dict[str, float]:
        """Return the largest |x| of the input of each node, reduced inside the graph; infinite for NaN."""
        import onnx_ir as ir

        copy = self.model.clone()
        read = _inputs_by_name(copy, names)
        infinity = stored(copy.graph, "infinity", np.array(np.inf, np.float32))
        outputs = {}
        for i, value in enumerate(dict.fromkeys(read.values())):
            absolute, seen = (ir.val(f"{name}_{i}", value.dtype, value.shape) for name in ("abs", "seen"))
            is_nan = ir.val(f"is_nan_{i}", ir.DataType.BOOL, value.shape)
            top = ir.val(f"top_{i}", value.dtype, ir.Shape([]))
            keep = [ir.AttrInt64("keepdims", 0)]
            copy.graph.extend(
                [
                    ir.Node("", "Abs", [value], outputs=[absolute], name=f"calibrate/abs_{i}"),
                    # ONNX Runtime's ReduceMax ignores NaN, but not infinity.
                    ir.Node("", "IsNaN", [value], outputs=[is_nan], name=f"calibrate/is_nan_{i}"),
                    ir.Node("", "Where", [is_nan, infinity, absolute], outputs=[seen], name=f"calibrate/seen_{i}"),
                    ir.Node("", "ReduceMax", [seen], keep, outputs=[top], name=f"calibrate/max_{i}"),
                ]
            )
            outputs[value] = top
        found = dict.fromkeys(read, 0.0)
        for arrays in self.run(copy, list(outputs.values())):
            by_value = dict(zip(outputs, arrays, strict=True))
            for name, value in read.items():
                found[name] = max(found[name], float(by_value[value]))
        return found

    def histograms(self, largest: Mapping[str, float], bins: int, batch: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the histogram of |x| in ``bins`` equal bins up to ``largest`` for each node."""
        for group in self._groups(list(largest), batch):
            copy = self.model.clone()
            read = _inputs_by_name(copy, group)
            values = list(dict.fromkeys(read.values()))
            counts = {name: np.zeros(bins, np.int64) for name in group}
            for arrays in self.run(copy, values):
                by_value = dict(zip(values, arrays, strict=True))
                for name, value in read.items():
                    top = largest[name] or 1.0
                    counts[name] += np.histogram(np.abs(by_value[value]), bins=bins, range=(0.0, top))[0]
            yield from counts.items()

    def _groups(self, names: list[str], batch: int) -> Iterator[list[str]]:
        """Split nodes into groups with bounded input size per batch."""
        group: list[str] = []
        size = 0
        for name, value in _inputs_by_name(self.model, names).items():
            dims = [batch if not isinstance(d, int) else d for d in value.shape or ()]
            nbytes = 4 * int(np.prod(dims))
            if group and size + nbytes > _GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(name)
            size += nbytes
        if group:
            yield group

    def run(self, model: ir.Model, outputs: list[ir.Value]) -> Iterator[list[np.ndarray]]:
        """Yield the outputs of each batch."""
        names = [value.name or "" for value in outputs]
        there = set(model.graph.outputs)
        model.graph.outputs.extend([value for value in outputs if value not in there])
        with scratch_folder() as folder:
            session = open_session(model, folder)
            for i, seeds in enumerate(self.seeds):
                yield session.run(names, feeds_of(self.spec, seeds, self.examples))
                self.events.step("batches of images", i + 1, len(self.seeds))


def _inputs_by_name(model: ir.Model, names: Sequence[str]) -> dict[str, ir.Value]:
    """Return the first input of each named node, in the graph's order."""
    wanted = set(names)
    found = {node.name or "": node.inputs[0] for node in model.graph if node.name in wanted}
    return {name: value for name, value in found.items() if value is not None}


def _percentile_cut(percentile: float) -> Callable[[np.ndarray, float], float]:
    def cut(histogram: np.ndarray, largest: float) -> float:
        inside = np.cumsum(histogram) >= percentile / 100 * histogram.sum()
        return float(largest * (np.argmax(inside) + 1) / len(histogram))

    return cut


def _entropy_cut(histogram: np.ndarray, largest: float) -> float:
    """Run ONNX Runtime's implementation of the published search, which takes a histogram around zero."""
    if largest == 0:
        return 0.0
    calibrate = require("onnxruntime.quantization.calibrate", extra="onnxruntime", purpose="calibrating")
    both = np.concatenate([histogram[::-1], [0], histogram])
    edges = np.linspace(-largest, largest, len(both) + 1, dtype=np.float64)
    collector = calibrate.HistogramCollector("entropy", True, len(both), 128, 99.99, "same")
    ends = (np.float64(-largest), np.float64(largest))
    _, threshold = collector.get_entropy_threshold((both, edges, *ends, np.float64(largest)), 128)
    return float(min(abs(threshold), largest))
