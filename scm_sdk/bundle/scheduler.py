"""A sampler's times and sigma_data as an ``SCMScheduler`` of diffusers.

    scheduler = diffusers_scheduler(Bundle.open("avatars").spec(2))
    sample = math.sin(times[0]) * sigma_data * noise_0              # times = scheduler.timesteps[:-1], radians
    for t in times:
        F = network(sample / sigma_data, t, labels)
        sample, x_0 = scheduler.step(sigma_data * F, t, sample, generator, return_dict=False)

``x_0`` of the last step equals the output of ``Sampler`` for the same noise. diffusers draws noise in every step, also
in the last one, where its weight is 0. A bundle holds ``scheduler/scheduler_config.json``, so that
``SCMScheduler.from_pretrained(bundle, subfolder="scheduler")`` also works; the file has no field for times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._util.json_struct import to_json
from .._util.lazy import require
from ..errors import ConfigError
from ..spec import SamplerSpec

if TYPE_CHECKING:
    import diffusers
    import torch

SCHEDULER_PATH = "scheduler/scheduler_config.json"
SCHEDULER_CLASS = "SCMScheduler"


def scheduler_config(spec: SamplerSpec) -> dict[str, Any]:
    """Return the config for ``SCMScheduler.from_config``."""
    return {
        "_class_name": SCHEDULER_CLASS,
        "num_train_timesteps": 1000,
        "prediction_type": "trigflow",
        "sigma_data": spec.sigma_data,
    }


def scheduler_json(spec: SamplerSpec) -> bytes:
    """Return the text of ``scheduler_config.json``."""
    return to_json(scheduler_config(spec))


def diffusers_scheduler(spec: SamplerSpec, *, device: str | torch.device | None = None) -> diffusers.SCMScheduler:
    """Return a ``diffusers.SCMScheduler`` with a sampler's times, ready for the first step.

    Args:
        spec: The sampler.
        device: Device of the times; None is the CPU.

    Raises:
        ConfigError: If the sampler's noise is not ``fresh`` in each step, as ``SCMScheduler`` draws it.
        BackendUnavailable: If diffusers is not installed.
    """
    if spec.renoise != "fresh":
        raise ConfigError(
            f"the sampler has renoise {spec.renoise!r}, expected 'fresh': SCMScheduler draws new noise in each step. "
            "For 'ode' use FlowMatchEulerDiscreteScheduler with the flow-matching output of the network."
        )
    diffusers = require("diffusers", extra="diffusers", purpose="an SCMScheduler")
    scheduler = diffusers.SCMScheduler.from_config(scheduler_config(spec))
    scheduler.set_timesteps(
        spec.num_inference_steps,
        timesteps=[*spec.times, 0.0],
        device=device,
        max_timesteps=None,
        intermediate_timesteps=None,
    )
    scheduler.set_begin_index(0)
    return scheduler
