"""Sample images of a run in progress, on fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...images import make_grid, save_png, to_uint8
from ...model.consistency import ConsistencyModel
from ...model.guidance import GuidedNetwork
from ...model.sampler import Sampler
from ...model.solvers import karras_times, sample_ode
from ...noise import draw_noise
from ..config import OBJECTIVES, ObjectiveName

COLUMNS = 8
TEACHER_STEPS = 18
"""Second-order steps of a teacher: 35 network calls, the paper's setting for CIFAR-10."""


@torch.inference_mode()
def sample_teacher(
    model: ConsistencyModel,
    noise: Tensor,
    class_labels: Tensor | None,
    *,
    num_steps: int = TEACHER_STEPS,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Sample a diffusion model with the second-order solver, ``2 num_steps - 1`` network calls.

    Args:
        model: The teacher.
        noise: Standard normal, (B, ...).
        class_labels: Labels, (B,), int64, or None.
        num_steps: Solver steps.
        guidance_scale: Scale of classifier-free guidance, which doubles the calls; 1 is none.

    Returns:
        Samples, (B, ...), data units.
    """
    network: Callable[..., Tensor] = model.network
    if guidance_scale != 1.0:
        network = GuidedNetwork(network, num_classes=model.config.num_classes, scale=guidance_scale)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return network(x_t / model.sigma_data, t, class_labels)

    times = karras_times(num_steps, sigma_data=model.sigma_data)
    return sample_ode(velocity, noise, times, sigma_data=model.sigma_data, order=2)


def write_samples(model: ConsistencyModel, objective: ObjectiveName, folder: Path, iteration: int) -> None:
    """Write one PNG grid with a row per label (or four rows); for students with 1 and 2 steps."""
    rows = model.config.num_classes or 4
    labels = np.repeat(np.arange(rows, dtype=np.int64), COLUMNS)
    device = next(model.parameters()).device
    class_labels = torch.from_numpy(labels).to(device) if model.config.num_classes else None
    conditioning = [] if class_labels is None else [class_labels]
    if model.config.guidance:
        conditioning.append(torch.full((len(labels),), model.config.default_guidance, device=device))
    seeds = list(range(len(labels)))
    if OBJECTIVES[objective].generative:
        noise = torch.from_numpy(draw_noise(model.spec(1), seeds)[0]).to(device)
        grids = [sample_teacher(model, noise, class_labels)]
    else:
        grids = []
        for steps in (1, 2):
            spec = model.spec(steps)
            inputs = [torch.from_numpy(noise).to(device) for noise in draw_noise(spec, seeds)]
            with torch.inference_mode():
                grids.append(Sampler(model, spec)(*inputs, *conditioning))
    pixels = [make_grid(to_uint8(g.cpu().numpy(), model.config.value_range), COLUMNS, scale=3) for g in grids]
    gap = np.full((pixels[0].shape[0], 12, pixels[0].shape[2]), 255, np.uint8)
    joined = pixels[0] if len(pixels) == 1 else np.concatenate([pixels[0], gap, pixels[1]], axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    save_png(joined, folder / f"{iteration:06d}.png")
