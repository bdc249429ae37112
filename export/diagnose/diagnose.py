"""Find the fault of a sampler graph that differs from its checkpoint.

An early difference affects all later values, so each part is judged on its actual inputs: intermediate values of the
graph are read and recomputed from their predecessors. The algebra of the sampler is linear, so its factors can be
solved for, and their expected values identify the fault: another time, another sigma_data, a scaled output. The output
of the network is recomputed by PyTorch at the time and labels of the spec and, if that differs, at others, until one
explains it. Every stored tensor is also compared with its original, because the tolerance of a reduced precision may
hide the effect of a changed weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from scm_sdk.inference.conditioning import Examples
from scm_sdk.inference.parity.difference import difference
from scm_sdk.spec import SamplerSpec

from ..graph.decoder import IMAGES, LATENTS
from ..precision.half import PRECISION_KEY
from ..precision.int8 import step_of
from ..precision.probe import feeds_of
from .bisect import TOLERANCE, relative_difference
from .intermediate import read_values
from .weights import Stored, compare_stored, originals_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from scm_sdk.model.consistency import ConsistencyModel


FACTOR_TOLERANCE = 1e-5
"""Relative tolerance of the sampler's factors, which are float32 in every precision."""


@dataclass(frozen=True)
class Factor:
    """A solved factor with its tolerance."""

    value: float
    doubt: float

    def differs(self, wanted: float) -> bool:
        """Whether the factor differs from ``wanted`` by more than the tolerance."""
        return not abs(self.value - wanted) <= max(FACTOR_TOLERANCE * max(1.0, abs(wanted)), self.doubt)


def solve_factors(target: np.ndarray, *parts: np.ndarray) -> tuple[Factor, ...]:
    """Return the least-squares factors of the parts for the target, in float64.

    The tolerance is six standard errors, because rounding affects the factors of nearly parallel parts strongly.
    """
    columns = np.stack([part.astype(np.float64).ravel() for part in parts], axis=1)
    wanted = target.astype(np.float64).ravel()
    factors, *_ = np.linalg.lstsq(columns, wanted, rcond=None)
    noise = float(np.std(columns @ factors - wanted))
    errors = noise * np.sqrt(np.diag(np.linalg.pinv(columns.T @ columns)))
    return tuple(Factor(float(f), 6 * float(e)) for f, e in zip(factors, errors, strict=True))


def other_labels(labels: np.ndarray, num_classes: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield labels that a fault could have substituted, (N,) int64, each with a description."""
    yield "in reverse order of the batch", labels[::-1].copy()
    yield "shifted by one place of the batch", np.roll(labels, 1)
    for shift in range(1, num_classes):
        yield f"shifted by {shift} classes", (labels + shift) % num_classes
    yield "mirrored (last class first)", num_classes - 1 - labels
    for one in range(num_classes):
        yield f"all {one}", np.full_like(labels, one)


def search_time(error: Callable[[float], float], times: Sequence[float]) -> tuple[float, float]:
    """Return the time that explains F best, and the remaining error; searches known times, then grids."""
    known = [*times, *(float(np.float16(t)) for t in times)]
    best = min(((error(t), t) for t in [*known, *np.linspace(0.02, math.pi / 2, 40)]), key=lambda pair: pair[0])
    width = 0.04
    for _ in range(6):
        near = np.linspace(best[1] - width, best[1] + width, 9)
        best = min([best, *((error(float(t)), float(t)) for t in near)], key=lambda pair: pair[0])
        width /= 4
    return best[1], best[0]


Fault = Literal["sigma_data", "time", "labels", "weights", "output", "network", "not finite"]
_ONE = 1e-4
"""Tolerance of cos^2 + sin^2 = 1."""
_EXPLAINS = 0.2
"""A hypothesis explains a difference if at most this share remains."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of a graph.

    Attributes:
        fault: Kind of fault.
        step: Step of the sampler, from 0.
        value: Name of the value or weight.
        text: Found and expected value.
    """

    fault: Fault
    step: int
    value: str
    text: str

    def __str__(self) -> str:
        return f"{self.fault}, step {self.step}, {self.value}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of a diagnosis.

    Attributes:
        findings: The faults in the order of the computation.
        stored: The compared stored tensors.
        tolerance: Largest relative difference of a network's output that passes.
        psnr_by_step: PSNR of the estimate after each step vs PyTorch, dB; infinite if equal.
    """

    findings: tuple[Finding, ...]
    stored: Stored
    tolerance: float
    psnr_by_step: tuple[float, ...]

    @property
    def fault(self) -> str:
        """Text of the first finding; "" if there is none."""
        return str(self.findings[0]) if self.findings else ""

    def __str__(self) -> str:
        """Describe the performed checks."""
        unchecked = [name for name in self.stored.unchecked if "sampler/" not in name]  # the solved factors
        steps = len(self.psnr_by_step)
        others = f" and {len(unchecked) - 1} more" if len(unchecked) > 1 else ""
        return (
            f"checked: times and factors of {steps} step{'' if steps == 1 else 's'} to {FACTOR_TOLERANCE:.0e}, the "
            f"network's output to {self.tolerance:.2g}, {self.stored.compared} of "
            f"{self.stored.compared + len(unchecked)} stored tensors"
            + (f"; not {unchecked[0]}{others}" if unchecked else "")
        )


def diagnose(
    graph: ir.Model,
    model: ConsistencyModel,
    spec: SamplerSpec,
    *,
    exact: ir.Model | None = None,
    decoder: ir.Model | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    examples: Examples | None = None,
) -> Diagnosis:
    """Find the faults of a graph by comparison with its checkpoint.

    Args:
        graph: A sampler graph with the names of ``compose``.
        model: The checkpoint.
        spec: The expected sampler.
        exact: The float32 graph of the same sampler, for stored tensors that are not in the checkpoint.
        decoder: The graph of the decoder, for a graph that ends in latents.
        seeds: Two or more seeds of samples and labels.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.

    Raises:
        ExportError: If the graph lacks the names.
        UnsupportedGraphError: If ONNX Runtime cannot run it on a CPU.
    """
    doctor = _Doctor(graph, model, spec, seeds, exact, decoder, examples)
    return Diagnosis(
        findings=tuple(doctor.findings()),
        stored=doctor.stored,
        tolerance=doctor.tolerance,
        psnr_by_step=doctor.psnr_by_step(),
    )


class _Doctor:
    def __init__(
        self,
        graph: ir.Model,
        model: ConsistencyModel,
        spec: SamplerSpec,
        seeds: Sequence[int],
        exact: ir.Model | None,
        decoder: ir.Model | None,
        examples: Examples | None,
    ) -> None:
        self.model, self.spec, self.seeds = model, spec, seeds
        self.feeds = feeds_of(spec, seeds, examples)
        self.tolerance = TOLERANCE[graph.metadata_props.get(PRECISION_KEY, "fp32")]
        last = spec.num_inference_steps - 1
        names = [f"step{k}/{part}" for k in range(last + 1) for part in ("x_t", "network_input", "F", "x0")]
        decodes = model.decoder is not None and spec.output == "pixels"
        if not decodes:
            names.pop()  # the last estimate is the output
        if spec.renoise == "ode":
            names += [f"step{k}/noise" for k in range(last)]
        names.append(spec.output_name)
        self.values = read_values(graph, names, self.feeds)
        self.stored = compare_stored(graph, originals_of(model, exact))
        self.values.setdefault(f"step{last}/x0", self.values[spec.output_name])
        self.decoded = self.values[spec.output_name] if decodes else None
        if decoder is not None:
            self.decoded = read_values(decoder, [IMAGES], {LATENTS: self.values[f"step{last}/x0"]})[IMAGES]

    def findings(self) -> Iterator[Finding]:
        for step in range(self.spec.num_inference_steps):
            at = {part: self.values[f"step{step}/{part}"] for part in ("x_t", "network_input", "F", "x0")}
            bad = next((part for part in at if not np.isfinite(at[part]).all()), None)
            if bad is not None:
                yield Finding(fault="not finite", step=step, value=bad, text="holds NaN or infinity, expected numbers")
                return
            yield from self._algebra(step, at)
            yield from self._network(step, at)
        yield from self._decoding()

    def _decoding(self) -> Iterator[Finding]:
        """Recompute the decoder output with PyTorch."""
        import torch

        if self.decoded is None or self.model.decoder is None:
            return
        last = self.spec.num_inference_steps - 1
        with torch.inference_mode():
            wanted = self.model.decoder(torch.from_numpy(self.values[f"step{last}/x0"])).numpy()
        found = relative_difference(self.decoded, wanted)
        if not found <= self.tolerance:
            text = f"is {found:.1e} off what the decoder makes of step{last}/x0, {self.tolerance:.0e} allowed"
            yield Finding(fault="output", step=last, value=IMAGES, text=text)

    def _algebra(self, step: int, at: dict[str, np.ndarray]) -> Iterator[Finding]:
        """Solve for the factors of one step and read time, sigma_data and scale from them."""
        spec, t = self.spec, self.spec.times[step]
        cos, sin = math.cos(t), math.sin(t)
        (unit,) = solve_factors(at["network_input"], at["x_t"])
        sigma = 1 / unit.value if unit.value else math.inf
        same_sigma = not unit.differs(1 / spec.sigma_data)
        if not same_sigma:
            text = f"the network's input is divided by {sigma:.4g}, expected sigma_data {spec.sigma_data:.4g}"
            yield Finding(fault="sigma_data", step=step, value="network_input", text=text)
        noise = self._noise(step)
        if step == 0:
            (spread,) = solve_factors(at["x_t"], noise)
            wrong = spread.differs(sin * spec.sigma_data)
            # One factor, sin(t) sigma_data: the input of the network separates the two.
            mean = math.sqrt(max(0.0, 1 - (spread.value / sigma) ** 2))
        else:
            kept, spread = solve_factors(at["x_t"], self.values[f"step{step - 1}/x0"], noise)
            wrong = kept.differs(cos) or spread.differs(sin * spec.sigma_data)
            mean = kept.value
        if wrong and same_sigma and abs(math.hypot(mean, spread.value / sigma) - 1) < _ONE:
            yield self._time(step, "x_t", math.atan2(spread.value / sigma, mean))
        elif wrong:
            text = f"the noise is scaled by {spread.value:.6g}, expected {sin * spec.sigma_data:.6g}"
            yield Finding(fault="sigma_data", step=step, value="x_t", text=text)
        kept, removed = solve_factors(at["x0"], at["x_t"], at["F"])
        if kept.differs(cos) or removed.differs(-sin * spec.sigma_data):
            scale = math.hypot(kept.value, removed.value / sigma)
            if abs(scale - 1) > _ONE:
                text = f"the estimate is scaled by {scale:.6g}, expected 1"
                yield Finding(fault="output", step=step, value="x0", text=text)
            angle = math.atan2(-removed.value / sigma, kept.value)
            if abs(angle - t) > max(FACTOR_TOLERANCE, kept.doubt, removed.doubt / spec.sigma_data):
                yield self._time(step, "x0", angle)
        if (following := self.values.get(f"step{step}/noise")) is not None:
            of_x, of_F = solve_factors(following, at["x_t"], at["F"])
            if of_x.differs(sin / spec.sigma_data) or of_F.differs(cos):
                wanted = f"{sin / spec.sigma_data:.6g} x_t + {cos:.6g} F"
                text = f"is {of_x.value:.6g} x_t + {of_F.value:.6g} F, expected {wanted}"
                yield Finding(fault="output", step=step, value="noise", text=text)

    def _noise(self, step: int) -> np.ndarray:
        """Return the noise of a step: an input, or a value of the previous step."""
        if step and self.spec.renoise == "ode":
            return self.values[f"step{step - 1}/noise"]
        return self.feeds[f"noise_{step if self.spec.renoise == 'fresh' else 0}"]

    def _network(self, step: int, at: dict[str, np.ndarray]) -> Iterator[Finding]:
        """Recompute F with PyTorch; if it differs, search for a time or labels that explain it."""
        spec, t = self.spec, self.spec.times[step]
        labels = self.feeds.get("class_labels")

        def error(t: float, labels: np.ndarray | None) -> float:
            return relative_difference(at["F"], self._torch(at["network_input"], t, labels, spec.targets[step]))

        found = error(t, labels)
        off = found > self.tolerance
        enough = max(self.tolerance, _EXPLAINS * found)
        if off and labels is not None:
            for what, others in other_labels(labels, spec.num_classes):
                if not np.array_equal(others, labels) and error(t, others) <= enough:
                    text = f"is what labels {what} give ({found:.1e} off), expected the labels that were asked for"
                    yield Finding(fault="labels", step=step, value="F", text=text)
                    return
        own = f"step{step}/"
        changed = [each for each in self.stored.changed if "sampler/" not in each[0]]  # the solved factors
        if mine := [each for each in changed if each[0].startswith(own)]:
            name, share = mine[0]
            text = f"depends on the time alone and differs from the fp32 graph's by {share:.1e} of its norm"
            yield Finding(fault="time", step=step, value=name, text=f"{text}; F is {found:.1e} off")
        shared = [each for each in changed if not step_of(each[0])]
        if shared and step == 0:
            (name, share), *rest = shared
            more = f" and {len(rest)} more" if rest else ""
            text = f"differs from the checkpoint by {share:.1e} of its norm{more}; F is {found:.1e} off"
            yield Finding(fault="weights", step=step, value=name, text=text)
        if mine or shared or not off:
            return
        angle, left = search_time(lambda angle: error(angle, labels), spec.times)
        if left <= enough:
            yield self._time(step, "F", angle)
            return
        text = f"is {found:.1e} off, {self.tolerance:.0e} allowed, and neither time, labels nor weights explain it"
        yield Finding(fault="network", step=step, value="F", text=text)

    def _time(self, step: int, value: str, angle: float) -> Finding:
        t = self.spec.times[step]
        what = f"is made for t = {angle:.6f}, expected {t:.6f}"
        if any(k != step and abs(angle - other) < 1e-4 for k, other in enumerate(self.spec.times)):
            what += ": the time of another step"
        elif abs(angle - float(np.float16(t))) < 0.3 * abs(t - float(np.float16(t))):
            what += ": the time was rounded to float16"
        return Finding(fault="time", step=step, value=value, text=what)

    def _torch(self, x: np.ndarray, t: float, labels: np.ndarray | None, target: float) -> np.ndarray:
        import torch

        names = [tensor.name for tensor in self.spec.conditioning_inputs]
        given = {name: torch.from_numpy(self.feeds[name]) for name in names}
        if labels is not None:
            given["class_labels"] = torch.from_numpy(labels)
        if self.model.config.flow_map:
            given["r"] = torch.full((len(x),), target)
        with torch.inference_mode():
            F = self.model.network(torch.from_numpy(x), torch.full((len(x),), t), **given)
        array: np.ndarray = F.numpy()
        return array

    def psnr_by_step(self) -> tuple[float, ...]:
        """Compare the estimate after each step with PyTorch's sampler of these steps."""
        import torch

        from scm_sdk.model.sampler import Sampler

        found = []
        ending = self.spec if self.decoded is None else self.spec.before_decoder
        inputs = [torch.from_numpy(self.feeds[tensor.name]) for tensor in self.spec.inputs]
        with torch.inference_mode():
            estimates = [each.numpy() for each in Sampler(self.model, self.spec).eval().estimates(*inputs)]
        for step, wanted in enumerate(estimates):
            gap = difference(self.values[f"step{step}/x0"], wanted, self.seeds, ending)
            found.append(gap.psnr_db if gap.finite else 0.0)
        return tuple(found)
