"""A pretrained denoiser in any convention as a TrigFlow network F: exact, without training.

``Denoiser`` is the interface of a source model; ``ModuleDenoiser`` wraps any module, and ``TrigFlowNetwork`` converts a
denoiser to F. The result is a teacher and the initial weights of a student::

    denoiser = ModuleDenoiser(my_flow_model, FLOW, timestep=lambda u: 1000 * u)
    F = TrigFlowNetwork(denoiser, sigma_data=1.0)
    teacher = ConsistencyModel(network=F, sigma_data=1.0, sample_shape=(4, 32, 32))

Every convention is linear in the state and in the model's output: F = p(t) x_t + q(t) output. The factors are computed
in float64 from the time only and rounded once, so that a graph holds them as constants.

Source: arXiv 2410.11081, appendix B.2; ``model.conversions`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import ShapeError
from ..conversions import Convention
from ..networks.layers import GroupNorm
from ..trigflow import expand_time


class Denoiser(Protocol):
    """A model in another convention: maps a noisy state and a time to its target.

    Attributes:
        convention: Meaning of state, time and output; one of ``model.conversions``.
    """

    convention: Convention

    def __call__(self, x: Tensor, time: Tensor, **conditioning: Tensor) -> Tensor:
        """Return the output, (B, ...), like ``x``.

        Args:
            x: State in the scale of the model, (B, ...): ``convention.model_input``.
            time: The convention's time (sigma, u, alpha, c_noise), (B,), float64; smooth in forward-mode derivatives.
            **conditioning: By name, axis 0 the batch.
        """
        ...


class ModuleDenoiser(nn.Module):
    """Any module as a ``Denoiser``.

    Args:
        module: The pretrained network; its parameters keep their names below ``module.``.
        convention: The convention of its training.
        timestep: Converts the time of the convention, (B,), float64, to the time input of the module, (B,).
        call: ``(module, x, timestep, **conditioning) -> output``; None calls the module with these arguments. Remove
            additional output channels, such as a learned variance, here.
    """

    def __init__(
        self,
        module: nn.Module,
        convention: Convention,
        *,
        timestep: Callable[[Tensor], Tensor] = lambda time: time,
        call: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.convention = convention
        self._timestep, self._call = timestep, call
        _accept_any_layout(module)

    def forward(self, x: Tensor, time: Tensor, **conditioning: Tensor) -> Tensor:
        """See ``Denoiser``."""
        timestep = self._timestep(time).to(x.dtype)
        with _differentiable_attention():
            if self._call is not None:
                return self._call(self.module, x, timestep, **conditioning)
            return cast(Tensor, self.module(x, timestep, **conditioning))


class TrigFlowNetwork(nn.Module):
    """F_theta(x, t, ...) of a denoiser in another convention; see ``networks.custom.Network``.

    Args:
        denoiser: The source model. The weights of a module become weights of this network.
        sigma_data: Standard deviation of its training data, data units: about 0.5 for pixels in [-1, 1], 1 for scaled
            latents. Any value gives a correct F; the true one gives F the variance that TrigFlow expects.
    """

    def __init__(self, denoiser: Denoiser, *, sigma_data: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, **conditioning: Tensor) -> Tensor:
        """Return F, like ``x``, unitless.

        Args:
            x: Noisy samples divided by ``sigma_data``, (B, ...).
            t: Times, (B,) or (1,), radians.
            class_labels: Labels, (B,), int64, or None.
            **conditioning: Further inputs of the denoiser; ``r``, the time that the step of a flow map leads to, is
                given to the denoiser as a time of its convention.

        Raises:
            ShapeError: If the denoiser returns another shape.
        """
        if class_labels is not None:
            conditioning["class_labels"] = class_labels
        t = t.double().expand(x.shape[0])  # len() would fix the batch size of a graph
        convention, sigma_data = self.denoiser.convention, self.sigma_data
        if (r := conditioning.get("r")) is not None:
            conditioning["r"] = convention.time(r.double().expand(x.shape[0]), sigma_data).to(x.dtype)
        one, zero = torch.ones_like(t)[:, None], torch.zeros_like(t)[:, None]
        scale = sigma_data * convention.model_input(one, t, sigma_data)[:, 0]
        from_state = sigma_data * convention.to_trigflow(one, zero, t, sigma_data)[:, 0]
        from_output = convention.to_trigflow(zero, one, t, sigma_data)[:, 0]
        state = expand_time(scale.to(x.dtype), x) * x
        output = self.denoiser(state, convention.time(t, sigma_data), **conditioning)
        if output.shape != x.shape:
            raise ShapeError(
                f"the denoiser returned {tuple(output.shape)} for x of {tuple(x.shape)}, expected the same shape. "
                "Cut off a learned variance in ModuleDenoiser's call."
            )
        return expand_time(from_state.to(x.dtype), x) * x + expand_time(from_output.to(x.dtype), x) * output


def _differentiable_attention() -> AbstractContextManager[None]:
    """The fused attention kernels have no forward-mode derivative; MatMul and Softmax have."""
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        return nullcontext()
    return cast(AbstractContextManager[None], sdpa_kernel([SDPBackend.MATH]))


def _accept_any_layout(module: nn.Module) -> None:
    """Make group norms accept non-contiguous inputs, which their forward-mode derivative does not support."""
    for child in module.modules():
        if type(child) is nn.GroupNorm:
            child.__class__ = GroupNorm
