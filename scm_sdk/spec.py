"""``SamplerSpec``: times, tensors and batch range of a sampler; the contract shared by exporters and runtimes.

``export/`` writes a ``SamplerSpec`` into every graph and manifest; ``runtimes/`` and ``Generator``
read it back. It is plain data: frozen, JSON both ways, unknown keys refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from ._util.json_struct import from_json
from .errors import ConfigError

Precision = Literal["fp32", "fp32-cpu", "fp16", "bf16", "int8", "int8-cpu", "int8-weights", "int4"]
"""Precision of a graph or engine; those that end in ``-cpu`` are graphs for CPUs. ``int8-weights`` and ``int4`` store
weights in 8 and 4 bits and compute in float32."""
CPU_PRECISIONS: frozenset[Precision] = frozenset({"fp32-cpu", "int8-cpu", "int8-weights", "int4"})
"""Those whose graphs are for ONNX Runtime; no engine is built from one."""
DType = Literal["float32", "int64"]
Renoise = Literal["fresh", "same", "ode"]
"""Where the noise of the steps after the first comes from; see ``SamplerSpec.renoise``."""

NOISE_CONTRACT = "scm-noise-v1"
T_LIMIT = 1.57080
"""Largest time, radians. SANA's 1.57080 is slightly above pi/2 and is allowed."""
MAX_STEPS = 64
DEFAULT_MID_TIME = 1.1
"""Second time of a two-step sampler, radians: the paper's for every data set."""


def default_times(
    num_inference_steps: int,
    *,
    sigma_data: float = 0.5,
    mid_time: float = DEFAULT_MID_TIME,
    max_time: float | None = None,
) -> tuple[float, ...]:
    """Return the times, radians, of a sampler with ``num_inference_steps`` network calls.

    One step starts at ``max_time``, by default ``arctan(80 / sigma_data)``; two add ``mid_time``; more
    are spread evenly between ``max_time`` and 0.

    Raises:
        ConfigError: If the number of steps is not in 1..64.

    Source: arXiv 2410.11081, section 5.2 and appendix G.2.
    """
    if not 1 <= num_inference_steps <= MAX_STEPS:
        raise ConfigError(f"num_inference_steps is {num_inference_steps}, expected 1..{MAX_STEPS}; 1 or 2 is usual.")
    t_max = math.atan(80.0 / sigma_data) if max_time is None else max_time
    if num_inference_steps == 2:
        return (t_max, mid_time)
    return tuple(t_max * (1 - i / num_inference_steps) for i in range(num_inference_steps))


def flow_times(sigmas: Sequence[float], *, sigma_data: float = 1.0) -> tuple[float, ...]:
    """Return the times, radians, at which TrigFlow has the noise levels of a flow-matching schedule.

    A flow-matching state is ``(1 - sigma) x_0 + sigma eps``; the first state of the sampler is ``sigmas[0] eps``.

    Args:
        sigmas: Noise levels in (0, 1], strictly falling, without the final 0; any shift already applied.
        sigma_data: Standard deviation of the data that the flow was trained on, in the model's own data units; 1 for
            the ``sana`` convention, whose latents are scaled to it.

    Raises:
        ConfigError: If a level is not in (0, 1] or the levels do not fall strictly.

    Source: arXiv 2410.11081, Eq. 29, with a = 1 - sigma and b = sigma.
    """
    levels = list(sigmas)
    if not levels or not all(0 < s <= 1 for s in levels) or levels != sorted(set(levels), reverse=True):
        raise ConfigError(
            f"sigmas are {levels}, expected flow-matching noise levels in (0, 1] that fall strictly, without the final "
            "0, for example 1.0 0.94 0.85 0.61."
        )
    return tuple(math.atan2(s, sigma_data * (1 - s)) for s in levels)


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor at the border of a sampler graph. Axis 0 is the batch and is not in ``shape``.

    Attributes:
        name: Name in the graph.
        shape: Shape of one sample, without the batch axis; () for one number per sample.
        dtype: ``float32`` or ``int64``.
        kind: ``mask`` for an int64 mask over axis 0 of another tensor's samples, 1 keeps and 0 leaves
            out; all ones where a caller gives none. ``values`` for anything else.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: DType = "float32"
    kind: Literal["values", "mask"] = "values"


class SamplerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sampler: its times, its tensors and its batch range.

    Attributes:
        times: Times of the network calls, radians, strictly falling, in (0, pi/2].
        sample_shape: Shape of one noise tensor without the batch axis; (C, H, W) for images.
        sigma_data: Standard deviation of the training data, data units.
        mid_time: Second time of the model's two-step sampler, radians, for ``with_steps``.
        max_time: First time of the model's samplers, radians, for ``with_steps``; None is arctan(80 / sigma_data).
        output: Whether the graph returns pixels or latents.
        output_shape: Shape of one output without the batch axis; () means ``sample_shape``.
        value_range: The outputs' lowest and highest meaningful values; images are clipped to it.
        num_classes: Number of class labels; 0 for an unconditional model.
        class_names: Names of the labels in order, or () when they have none.
        guidance_range: Lowest and highest ``guidance_scale``, or None when there is no such input.
        default_guidance: What ``guidance_scale`` is where a caller gives none; None: it must be given.
        conditioning: Further inputs, for example prompt embeddings.
        max_batch: Largest batch the graph is meant for; the smallest is always 1.
        renoise: Noise n of the steps after the first, in ``x_t = cos(t) x_0 + sin(t) sigma_data n``. ``fresh``: an
            input for each step, consistency sampling (arXiv 2410.11081, section 5.2). ``same``: the input of the first
            step. ``ode``: the trajectory's own, ``n = sin(s) x_s / sigma_data + cos(s) F`` of the step before, at time
            s; Euler's method for the flow-matching ODE. ``same`` and ``ode`` have one noise input.
        noise_contract: How a seed becomes noise; see ``scm_sdk.noise``.
    """

    times: tuple[float, ...]
    sample_shape: tuple[int, ...]
    sigma_data: float = 0.5
    mid_time: float = DEFAULT_MID_TIME
    max_time: float | None = None
    output: Literal["pixels", "latents"] = "pixels"
    output_shape: tuple[int, ...] = ()
    value_range: tuple[float, float] = (-1.0, 1.0)
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    guidance_range: tuple[float, float] | None = None
    default_guidance: float | None = None
    conditioning: tuple[TensorSpec, ...] = ()
    max_batch: int = 32
    renoise: Renoise = "fresh"
    noise_contract: str = NOISE_CONTRACT

    def __post_init__(self) -> None:
        if not 1 <= len(self.times) <= MAX_STEPS:
            raise ConfigError(f"times holds {len(self.times)} entries, expected 1..{MAX_STEPS}: {self.times}")
        if not all(0 < t <= T_LIMIT for t in self.times):
            raise ConfigError(
                f"times are {self.times}, expected radians in (0, pi/2]. "
                "An EDM noise level sigma becomes t = atan(sigma / sigma_data)."
            )
        if list(self.times) != sorted(set(self.times), reverse=True):
            raise ConfigError(f"times are {self.times}, expected to fall strictly, from noise to data.")
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ConfigError(f"sigma_data is {self.sigma_data}, expected a number greater than 0.")
        if not self.sample_shape or min(self.sample_shape) < 1:
            raise ConfigError(f"sample_shape is {self.sample_shape}, expected at least one axis, all >= 1.")
        if self.output_shape and min(self.output_shape) < 1:
            raise ConfigError(f"output_shape is {self.output_shape}, expected axes >= 1, or () for sample_shape.")
        if not self.value_range[0] < self.value_range[1]:
            raise ConfigError(f"value_range is {self.value_range}, expected (lowest, highest).")
        if self.num_classes < 0:
            raise ConfigError(f"num_classes is {self.num_classes}, expected 0 (unconditional) or more.")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ConfigError(
                f"class_names holds {len(self.class_names)} names, expected num_classes = {self.num_classes}."
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise ConfigError("class_names holds a name twice, expected unique names.")
        if self.guidance_range is not None and not self.guidance_range[0] <= self.guidance_range[1]:
            raise ConfigError(f"guidance_range is {self.guidance_range}, expected (lowest, highest) or None.")
        low, high = self.guidance_range or (math.inf, -math.inf)
        if self.default_guidance is not None and not low <= self.default_guidance <= high:
            raise ConfigError(
                f"default_guidance is {self.default_guidance}, expected a number in guidance_range = "
                f"{self.guidance_range}, or None."
            )
        if self.max_time is not None and not 0 < self.max_time <= T_LIMIT:
            raise ConfigError(f"max_time is {self.max_time}, expected radians in (0, pi/2], or None.")
        names = [tensor.name for tensor in self.inputs]
        if len(set(names)) != len(names):
            raise ConfigError(f"inputs are named {', '.join(names)}, expected each name once. Rename one.")
        if self.renoise not in get_args(Renoise):
            raise ConfigError(f"renoise is {self.renoise!r}, expected one of {', '.join(get_args(Renoise))}.")
        if self.max_batch < 1:
            raise ConfigError(f"max_batch is {self.max_batch}, expected 1 or more.")
        if self.noise_contract != NOISE_CONTRACT:
            raise ConfigError(
                f"noise_contract is {self.noise_contract!r}, expected {NOISE_CONTRACT!r}. "
                "The sampler was made by a newer scm-sdk; update this one."
            )

    @property
    def num_inference_steps(self) -> int:
        """Number of network calls."""
        return len(self.times)

    @property
    def targets(self) -> tuple[float, ...]:
        """Time that each step leads to, radians, the second time of a flow map: the next one in the ODE, else 0."""
        following = (*self.times[1:], 0.0)
        return following if self.renoise == "ode" else (0.0,) * len(self.times)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one output, without the batch axis."""
        return self.output_shape or self.sample_shape

    @property
    def noise_inputs(self) -> tuple[TensorSpec, ...]:
        """The noise tensors, ``noise_0`` first: one for each step if ``renoise`` is ``fresh``, else one."""
        count = len(self.times) if self.renoise == "fresh" else 1
        return tuple(TensorSpec(name=f"noise_{i}", shape=self.sample_shape) for i in range(count))

    @property
    def conditioning_inputs(self) -> tuple[TensorSpec, ...]:
        """Every input that is not noise: labels, guidance, then the model's own."""
        inputs: tuple[TensorSpec, ...] = ()
        if self.num_classes:
            inputs += (TensorSpec(name="class_labels", dtype="int64"),)
        if self.guidance_range is not None:
            inputs += (TensorSpec(name="guidance_scale"),)
        return inputs + self.conditioning

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Every graph input in order; axis 0 of each is the batch."""
        return self.noise_inputs + self.conditioning_inputs

    @property
    def output_name(self) -> str:
        """Name of the one graph output, ``images`` or ``latents``."""
        return "images" if self.output == "pixels" else "latents"

    @property
    def before_decoder(self) -> SamplerSpec:
        """This sampler without its decoder: the spec of a graph whose decoder is a graph of its own."""
        return msgspec.structs.replace(self, output="latents", output_shape=())

    def with_steps(self, num_inference_steps: int) -> SamplerSpec:
        """Return this spec with the default times of another number of steps."""
        times = default_times(
            num_inference_steps, sigma_data=self.sigma_data, mid_time=self.mid_time, max_time=self.max_time
        )
        return msgspec.structs.replace(self, times=times)

    def to_json(self) -> str:
        """Return compact JSON; ``from_json`` gives back an equal spec."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> SamplerSpec:
        """Parse what ``to_json`` wrote.

        Raises:
            ConfigError: If the text is no JSON, a key is unknown, or a value breaks the contract.
        """
        return from_json(
            text,
            cls,
            lambda exc: ConfigError(f"sampler spec cannot be read: {exc}. Expected the JSON that scm-export wrote."),
        )
