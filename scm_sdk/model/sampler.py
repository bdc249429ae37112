"""The sampler as one module: the consistency model unrolled over the times of a spec.

Every exported graph and engine is compared with this definition. Noise is an input; nothing is drawn inside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..spec import SamplerSpec
from .consistency import ConsistencyModel


class Sampler(nn.Module):
    """Multistep sampling: denoise, add noise at the next time, denoise again.

    The noise of later steps is fresh, the first step's, or the trajectory's own, as ``spec.renoise`` says.

    Args:
        model: The consistency model.
        spec: Times, shapes and labels; ``model.spec(2)`` makes the usual one.

    Raises:
        ShapeError: If the spec belongs to another model.

    Source: arXiv 2410.11081, section 5.2 (``fresh``) and equation 26 (``ode``); Song et al. 2023, algorithm 1.
    """

    def __init__(self, model: ConsistencyModel, spec: SamplerSpec) -> None:
        super().__init__()
        config = model.config
        found = (
            spec.sample_shape,
            spec.num_classes,
            spec.sigma_data,
            spec.guidance_range is not None,
            spec.conditioning,
        )
        expected = (config.sample_shape, config.num_classes, config.sigma_data, config.guidance, config.conditioning)
        if found != expected:
            raise ShapeError(
                f"the spec has (sample_shape, num_classes, sigma_data, guidance, conditioning) = {found}, the model "
                f"{expected}. Make the spec with model.spec(num_inference_steps)."
            )
        self.model = model
        self.spec = spec
        # Computed in float64 and rounded once, because float32 trigonometry differs between backends.
        self.cosines = [math.cos(t) for t in spec.times]
        self.sines = [math.sin(t) for t in spec.times]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return samples, (B, ...), data units, not clipped.

        Args:
            *inputs: As ``spec.inputs`` orders them: standard normal noise (B, ...), float32, one for each step or
                one alone, then class_labels (B,), int64, if the model has classes, guidance_scale (B,),
                float32, if it takes one, then its own.

        Raises:
            ShapeError: If an input is missing.
        """
        x_0 = self.estimates(*inputs)[-1]
        if self.model.decoder is None or self.spec.output == "latents":
            return x_0
        pixels: Tensor = self.model.decoder(x_0)
        return pixels

    def estimates(self, *inputs: Tensor) -> list[Tensor]:
        """Return the estimate of x_0 after each step, (B, ...), data units, before a decoder.

        Args:
            *inputs: As of ``forward``.

        Raises:
            ShapeError: If an input is missing.
        """
        if len(inputs) != len(self.spec.inputs):
            names = ", ".join(tensor.name for tensor in self.spec.inputs)
            raise ShapeError(f"the sampler got {len(inputs)} inputs, expected {len(self.spec.inputs)}: {names}.")
        count = len(self.spec.noise_inputs)
        asked = [tensor.name for tensor in self.spec.conditioning_inputs]
        conditioning = dict(zip(asked, inputs[count:], strict=True))
        sigma_data, renoise = self.spec.sigma_data, self.spec.renoise
        noise = inputs[0]
        found: list[Tensor] = []
        steps = zip(self.cosines, self.sines, self.spec.times, self.spec.targets, strict=True)
        for step, (cos, sin, t, target) in enumerate(steps):
            if renoise == "fresh":
                noise = inputs[step]
            x_t = (sin * sigma_data) * noise
            if found:
                x_t = cos * found[-1] + x_t
            dtype = torch.promote_types(noise.dtype, torch.float32)  # at least float32
            t_B = torch.full(noise.shape[:1], t, dtype=dtype, device=noise.device)
            if self.model.config.flow_map:
                conditioning["r"] = torch.full_like(t_B, target)
            F = self.model.network(x_t / sigma_data, t_B, **conditioning)
            found.append(cos * x_t - (sin * sigma_data) * F)
            if renoise == "ode":
                noise = (sin / sigma_data) * x_t + cos * F
        return found
