"""Self-checks: properties of any consistency model and backend, without data and without a reference.

Each check is a property that follows from the mathematics or from the documented behavior; the measured value and its
limit are reported. The checks do not measure image quality: an untrained network passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..inference.backends import Backend
from ..inference.generator import Generator
from ..inference.request import Request, make_example
from ..noise import draw_noise
from ..spec import SamplerSpec

if TYPE_CHECKING:
    from torch import Tensor

SAME = {
    "fp32": 1e-3, "fp32-cpu": 1e-3, "fp16": 5e-2, "bf16": 0.5, "int8": 0.5, "int8-cpu": 0.5, "int8-weights": 5e-2,
    "int4": 5e-2,
}  # fmt: skip
"""Largest difference of one sample in two batches, units of sigma_data. Other batch sizes may use other kernels, whose
last bits differ; a reduced precision may round these to another level (int8 of the shipped model: 0.07)."""
TRAJECTORY_TIMES, TRAJECTORY_END = 16, 0.2
"""Times of one trajectory, and its last one, radians."""
_EMPTY = 0.05
"""Minimum root mean square of samples, units of sigma_data; below, they are empty."""
EXTREME_SEEDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the check.
        passed: Whether the property holds; None if it cannot be checked here, for the reason in ``text``.
        value: Measured value.
        allowed: Limit of the value.
        text: Description of the property.
    """

    name: str
    passed: bool | None
    value: float
    allowed: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is not finite becomes None."""
        plain = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


def selfcheck(generator: Generator, *, num_samples: int = 16) -> list[Check]:
    """Run every check that a generator's backend allows.

    Args:
        generator: The model with its backend.
        num_samples: Samples for each check, 2 or more.

    Raises:
        BackendError: If the backend cannot run.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # non-finite values are a result, not a warning
        return list(_checks(generator, max(2, num_samples)))


def _checks(generator: Generator, num_samples: int) -> Iterator[Check]:
    opened = generator.opened()
    backend, spec = opened.backend, opened.spec
    count, same = min(num_samples, spec.max_batch), SAME[opened.row.precision]
    request = make_example(spec, range(count))
    together = backend.sample(*request.inputs(0, count))
    yield _at_most(
        "repeat",
        _gap(together, backend.sample(*request.inputs(0, count)), spec),
        same,
        "the same call twice, sigma_data",
    )
    yield _at_most(
        "batch", _gap(together, _one_by_one(backend, request), spec), same, "samples alone and in a batch, sigma_data"
    )
    order = np.random.default_rng(0).permutation(count)
    mixed = make_example(spec, [int(s) for s in order], class_labels=_labels(request, order))
    yield _at_most(
        "permutation", _gap(together[order], backend.sample(*mixed.inputs(0, count)), spec), same,
        "samples in another order of the batch, sigma_data",
    )  # fmt: skip
    extreme = make_example(spec, EXTREME_SEEDS)
    wild = _one_by_one(backend, extreme)
    yield _at_most("finite", float((~np.isfinite(wild)).sum()), 0, "values that are not finite, seeds up to 2^64 - 1")
    yield _labels_matter(backend, spec, request, together)
    yield _steps_agree(generator, request)
    yield from _mathematics(generator, request, together)


def _labels_matter(backend: Backend, spec: SamplerSpec, request: Request, images: NDArray[np.float32]) -> Check:
    text = "share of samples that another label leaves as they are"
    if spec.num_classes < 2 or request.class_labels is None:
        return _cannot("labels", "the model has one label" if spec.num_classes else "the model has no labels")
    others = [(int(label) + 1) % spec.num_classes for label in request.class_labels]
    changed = make_example(spec, request.seeds, class_labels=others)
    other = backend.sample(*changed.inputs(0, len(request)))
    kept = np.abs(other - images).reshape(len(images), -1).max(axis=1) <= 1e-3 * spec.sigma_data
    return _at_most("labels", float(kept.mean()), 0.0, text)


def _steps_agree(generator: Generator, request: Request) -> Check:
    """One and two steps from the same noise must be closer to each other than to samples of other noise."""
    if not {1, 2} <= set(generator.source.steps) and generator.opened().row.backend != "torch":
        return _cannot("steps", "there are no 1-step and 2-step samplers")
    own = {tensor.name: request.conditioning[tensor.name] for tensor in request.spec.conditioning}
    one, two = (
        generator(
            len(request), seed=request.seeds, num_inference_steps=n, output_type="raw", class_labels=_first(generator),
            conditioning=own,
        ).images
        for n in (1, 2)
    )  # fmt: skip
    if np.square(one).mean() < (_EMPTY * request.spec.sigma_data) ** 2:
        return _cannot("steps", "the 1-step samples are empty, as those of an untrained network are")
    same = np.square(one - two).mean()
    other = np.square(one - np.roll(two, 1, axis=0)).mean()
    return _at_most(
        "steps", float(same / other) if other else math.inf, 1.0,
        "distance of 1-step and 2-step samples of one seed, over that of different seeds",
    )  # fmt: skip


def _mathematics(generator: Generator, request: Request, images: NDArray[np.float32]) -> Iterator[Check]:
    """Checks that need the network at arbitrary times, which only PyTorch provides."""
    opened = generator.opened()
    if opened.row.backend != "torch" or opened.row.lowered:
        for name in ("boundary", "variance", "consistency"):
            yield _cannot(name, f"{opened.row.name} runs fixed times; ask PyTorch in fp32")
        return
    import torch

    model: Any = opened.backend.model  # type: ignore[attr-defined]
    spec, count = opened.spec, len(images)
    noise = [draw_noise(spec, range(at, at + count))[0] * np.float32(spec.sigma_data) for at in (0, count)]
    z, other = (torch.from_numpy(each).to(opened.device) for each in noise)
    given = {name: torch.from_numpy(array).to(opened.device) for name, array in request.conditioning.items()}
    with torch.inference_mode():
        at_zero = model(z, torch.zeros(1, device=opened.device), **given)
        boundary = float((at_zero - z).abs().max()) / spec.sigma_data
        yield _at_most("boundary", boundary, 1e-6, "f(x, 0) - x, sigma_data")
        yield _variance(torch.from_numpy(images).to(opened.device), other, spec)
        yield _consistency(model, z, given, spec)


def _variance(x_0: Tensor, z: Tensor, spec: SamplerSpec) -> Check:
    """The standard deviation of x_t must be sqrt(cos^2 s^2 + sin^2 sigma_data^2) for samples of deviation s."""
    import torch

    from ..model.trigflow import add_noise

    if x_0.shape != z.shape:
        return _cannot("variance", "the sampler does not return what its network denoises")
    ratios, s = [], float(x_0.std())
    for t in (0.2, 0.8, 1.1, 1.5):
        wanted = math.hypot(math.cos(t) * s, math.sin(t) * spec.sigma_data)
        ratios.append(float(add_noise(x_0, z, torch.full((1,), t, device=z.device)).std()) / wanted)
    # The standard error of a standard deviation of n values is 1 / sqrt(2 n); allow five.
    text = "standard deviation of x_t, made of the model's own pictures, over what it must be, less 1"
    return _at_most("variance", max(abs(r - 1) for r in ratios), 5 / math.sqrt(2 * x_0.numel()), text)


def _consistency(model: Any, z: Tensor, given: dict[str, Tensor], spec: SamplerSpec) -> Check:
    """Follow the model's trajectory from noise and compare its end estimates, which should be constant.

    From (x_t, t) to the next time along the arc through the estimate f(x_t, t) and its implied noise. The gate is loose
    because an untrained network has no consistent trajectories: neighbors must agree better than different seeds do.
    """
    import torch

    x_t, ends = z, []
    times = np.linspace(spec.times[0], TRAJECTORY_END, TRAJECTORY_TIMES)
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        end = model(x_t, torch.full((1,), float(t), device=z.device), **given)
        implied = (x_t - math.cos(t) * end) / math.sin(t)
        x_t = math.cos(after) * end + math.sin(after) * implied
        ends.append(end)
    steps = torch.stack([(b - a).square().mean() for a, b in pairwise(ends)])
    apart = torch.stack([(end - end.roll(1, dims=0)).square().mean() for end in ends])
    text = (
        f"change of f(x, t) between {TRAJECTORY_TIMES} neighboring times of one trajectory, over the distance of seeds"
    )
    return _at_most("consistency", float((steps.mean() / apart.mean()).sqrt()), 1.0, text)


def _one_by_one(backend: Backend, request: Request) -> NDArray[np.float32]:
    return np.concatenate([backend.sample(*request.inputs(i, i + 1)) for i in range(len(request))])


def _labels(request: Request, order: NDArray[np.int64]) -> list[int] | None:
    return None if request.class_labels is None else [int(request.class_labels[i]) for i in order]


def _first(generator: Generator) -> int | None:
    return 0 if generator.opened().spec.num_classes else None


def _gap(a: NDArray[np.float32], b: NDArray[np.float32], spec: SamplerSpec) -> float:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a - b).max()) / spec.sigma_data


def _at_most(name: str, value: float, allowed: float, text: str) -> Check:
    return Check(name=name, passed=value <= allowed, value=value, allowed=allowed, text=text)


def _cannot(name: str, why: str) -> Check:
    return Check(name=name, passed=None, value=math.nan, allowed=math.nan, text=why)
