"""Exact conversions of other diffusion parametrizations to TrigFlow: EDM, flow matching, SANA, VP.

Every source model was trained on states ``x' = a x_0 + b eps``, eps ~ N(0, I), with its own (a, b),
its own time and its own target. At equal signal-to-noise ratio its state is a rescaled TrigFlow
state, so a pretrained network becomes a TrigFlow network F without training. A ``Convention`` holds
the pure functions of one source; a wrapped network is three lines::

    def F(x_t, t):
        output = model(convention.model_input(x_t, t, sigma_data), convention.time(t, sigma_data))
        return convention.to_trigflow(x_t, output, t, sigma_data)

Conventions (s, c = sin t, cos t; sd = sigma_data):

    name          trained on                      time           model input        its output
    EDM_DENOISER  x_0 + sigma eps                 sigma          x_t / c            D = E[x_0]
    EDM_NETWORK   the same, inside D's scaling    ln(sigma) / 4  x_t / sd           F_edm = -F
    FLOW          (1 - u) x_0 + u eps             u in [0, 1]    x_t / (c + sd s)   E[eps - x_0]
    SANA          the same of x_0 / sd            u in [0, 1]    x_t / sd / (c + s) E[eps - x_0 / sd]
    VP_NOISE      al x_0 + sg eps, al^2+sg^2=1    al             x_t / sqrt(c^2 + sd^2 s^2)  E[eps]
    VP_VELOCITY   the same                        al             the same           E[al eps - sg x_0]

Coefficients are computed in float64 from ``t`` as given and rounded once to the dtype of the samples; give ``t`` in
float64 where the last digit near pi/2 matters. Where the textbook form is 0/0 at t = 0 the simplified closed form is
used; only EDM_DENOISER has none and takes the limit, F = 0, there. Its error grows like rounding / sin(t), that of
VP_NOISE like rounding / cos(t), because those outputs do not hold the information. Times slightly above pi/2 (pi/2 in
float32, SANA's 1.57080) count as pi/2 in formulas that divide by cos(t).

Shape letters: B batch; samples have any rank.
Source: arXiv 2410.11081, appendix B.2; arXiv 2206.00364 (EDM); arXiv 2503.09641 (SANA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .trigflow import expand_time

TimeMap = Callable[[Tensor, float], Tensor]
StateMap = Callable[[Tensor, Tensor, float], Tensor]
OutputMap = Callable[[Tensor, Tensor, Tensor, float], Tensor]

# Just below cos(pi/2) as float64 computes it, 6.1e-17: stands in for cos(t) at and above pi/2.
_MIN_COS = 5e-17


@dataclass(frozen=True, kw_only=True)
class Convention:
    """The pure functions between TrigFlow and one source convention.

    In all of them ``x_t`` is a TrigFlow state, (B, ...), data units; ``t`` are times, (B,) or (1,),
    radians in [0, pi/2]; ``sigma_data`` is the standard deviation of the TrigFlow data, data units.
    They raise ``ShapeError`` if ``t`` does not hold one time per sample (or a single one).

    Attributes:
        name: As in the table of this module.
        time: (t, sigma_data) -> the source's time, shape and dtype of ``t``.
        time_to_trigflow: (source time, sigma_data) -> t; the inverse of ``time``.
        model_input: (x_t, t, sigma_data) -> input of the source model.
        to_trigflow: (x_t, output, t, sigma_data) -> F, unitless, from the source model's output.
        from_trigflow: (x_t, F, t, sigma_data) -> the source's output; the inverse of ``to_trigflow``.
    """

    name: str
    time: TimeMap
    time_to_trigflow: TimeMap
    model_input: StateMap
    to_trigflow: OutputMap
    from_trigflow: OutputMap


def trigflow_time(a: Tensor, b: Tensor, sigma_data: float) -> Tensor:
    """Return t, radians in [0, pi/2], with the signal-to-noise ratio of ``a x_0 + b eps``.

    Args:
        a: Scale of the data, (B,), 0 or more.
        b: Standard deviation of the noise, (B,), data units, 0 or more, not both 0.
        sigma_data: Standard deviation of the data, data units, greater than 0.

    Source: arXiv 2410.11081, Eq. 29.
    """
    return torch.atan2(b.double(), _positive(sigma_data) * a.double()).to(b.dtype)


def trigflow_state(x: Tensor, a: Tensor, b: Tensor, sigma_data: float) -> Tensor:
    """Rescale ``x = a x_0 + b eps``, (B, ...), to the TrigFlow state of the same noise level.

    Args:
        x: State of the source model, (B, ...).
        a: Scale of the data in it, (B,).
        b: Standard deviation of the noise in it, (B,), data units.
        sigma_data: Standard deviation of the data, data units, greater than 0.

    Returns:
        x_t, (B, ...), data units, with standard deviation ``sigma_data`` at every time.

    Source: arXiv 2410.11081, Eq. 29.
    """
    scale = _positive(sigma_data) / torch.hypot(a.double() * sigma_data, b.double())
    return expand_time(scale, x).to(x.dtype) * x


def _positive(sigma_data: float) -> float:
    if not 0 < sigma_data < float("inf"):
        raise ConfigError(f"sigma_data is {sigma_data}, expected a number greater than 0.")
    return sigma_data


def _trig(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos(t) and sin(t) in float64."""
    return t.double().cos(), t.double().sin()


def _combine(x: Tensor, p: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """Return ``p x + q y``, coefficients (B,) float64 rounded once to the dtype of ``x``."""
    return expand_time(p, x).to(x.dtype) * x + expand_time(q, x).to(x.dtype) * y.to(x.dtype)


def _scale(x: Tensor, p: Tensor) -> Tensor:
    return expand_time(p, x).to(x.dtype) * x


# EDM: sigma = sigma_data tan(t)


def _sigma(t: Tensor, sigma_data: float) -> Tensor:
    c, s = _trig(t)
    return _positive(sigma_data) * s / c.clamp_min(_MIN_COS)


def _edm_to_trigflow(x_t: Tensor, output: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    c, s = _trig(t)
    # D may differ from cos(t) x_t by little: subtract in float64, then divide.
    gap = _combine(x_t.double(), c, output.double(), -torch.ones_like(c))
    zero = s == 0
    inverse = torch.where(zero, 0.0, 1 / (_positive(sigma_data) * torch.where(zero, 1.0, s)))
    return _scale(gap, inverse).to(x_t.dtype)


def _edm_from_trigflow(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    c, s = _trig(t)
    return _combine(x_t, c, F, -_positive(sigma_data) * s)


EDM_DENOISER = Convention(
    name="edm_denoiser",
    time=lambda t, sigma_data: _sigma(t, sigma_data).to(t.dtype),
    time_to_trigflow=lambda sigma, sigma_data: trigflow_time(torch.ones_like(sigma), sigma, sigma_data),
    model_input=lambda x_t, t, sigma_data: _scale(x_t, 1 / _trig(t)[0].clamp_min(_MIN_COS)),
    to_trigflow=_edm_to_trigflow,
    from_trigflow=_edm_from_trigflow,
)
"""The preconditioned denoiser D(x; sigma) of EDM and EDM2."""


def _edm_condition(t: Tensor, sigma_data: float) -> Tensor:
    # At t = 0 sigma is replaced by the smallest positive number, so that c_noise stays finite.
    return (_sigma(t, sigma_data).clamp_min(torch.finfo(torch.float64).tiny).log() / 4).to(t.dtype)


EDM_NETWORK = Convention(
    name="edm_network",
    time=_edm_condition,
    time_to_trigflow=lambda c_noise, sigma_data: EDM_DENOISER.time_to_trigflow(
        (4 * c_noise.double()).exp(), sigma_data
    ).to(c_noise.dtype),
    model_input=lambda x_t, t, sigma_data: x_t / _positive(sigma_data),
    # c_skip = cos^2, c_out = +sigma_data sin: TrigFlow's c_out has the other sign, hence the flip.
    to_trigflow=lambda x_t, output, t, sigma_data: -output,
    from_trigflow=lambda x_t, F, t, sigma_data: -F,
)
"""The raw network inside D, before its scaling; ``time`` is its c_noise, ``model_input`` is c_in x."""


# Flow matching, data of any standard deviation: u = sigma_data sin / (cos + sigma_data sin)


def _flow_total(t: Tensor, sigma_data: float) -> Tensor:
    c, s = _trig(t)
    return c + _positive(sigma_data) * s


def _flow_to_trigflow(x_t: Tensor, output: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    (c, s), total = _trig(t), _flow_total(t, sigma_data)
    return _combine(x_t, (c - s / sigma_data) / total, output, 1 / total)


def _flow_from_trigflow(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    (c, s), total = _trig(t), _flow_total(t, sigma_data)
    return _combine(x_t, s / sigma_data - c, F, total)


FLOW = Convention(
    name="flow",
    time=lambda t, sigma_data: (sigma_data * _trig(t)[1] / _flow_total(t, sigma_data)).to(t.dtype),
    time_to_trigflow=lambda u, sigma_data: trigflow_time(1 - u.double(), u.double(), sigma_data).to(u.dtype),
    model_input=lambda x_t, t, sigma_data: _scale(x_t, 1 / _flow_total(t, sigma_data)),
    to_trigflow=_flow_to_trigflow,
    from_trigflow=_flow_from_trigflow,
)
"""Flow matching (rectified flow) on the same data as TrigFlow: velocity ``eps - x_0`` at time u."""


# SANA and rCM: the flow was trained on x_0 / sigma_data, that is on data of standard deviation 1.


SANA = Convention(
    name="sana",
    time=lambda t, sigma_data: FLOW.time(t, 1.0),
    time_to_trigflow=lambda u, sigma_data: FLOW.time_to_trigflow(u, 1.0),
    model_input=lambda x_t, t, sigma_data: FLOW.model_input(x_t / _positive(sigma_data), t, 1.0),
    to_trigflow=lambda x_t, v, t, sigma_data: _flow_to_trigflow(x_t / _positive(sigma_data), v, t, 1.0),
    from_trigflow=lambda x_t, F, t, sigma_data: _flow_from_trigflow(x_t / _positive(sigma_data), F, t, 1.0),
)
"""SANA-Sprint and rCM: flow matching on latents l, TrigFlow data is ``x_0 = sigma_data * l``."""


# Variance preserving: al = cos / r, sg = sigma_data sin / r, r = sqrt(cos^2 + sigma_data^2 sin^2)


def _vp_radius(t: Tensor, sigma_data: float) -> Tensor:
    c, s = _trig(t)
    return (c**2 + (_positive(sigma_data) * s) ** 2).sqrt()  # ONNX has no hypot


def _vp_alpha(t: Tensor, sigma_data: float) -> Tensor:
    return (_trig(t)[0].clamp_min(0) / _vp_radius(t, sigma_data)).to(t.dtype)


def _vp_time_to_trigflow(alpha: Tensor, sigma_data: float) -> Tensor:
    a = alpha.double()
    return trigflow_time(a, ((1 - a) * (1 + a)).sqrt(), sigma_data).to(alpha.dtype)


def _vp_input(x_t: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    return _scale(x_t, 1 / _vp_radius(t, sigma_data))


def _vp_noise_to_trigflow(x_t: Tensor, output: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    c, s = _trig(t)
    c = c.clamp_min(_MIN_COS)
    gap = _combine(x_t.double(), -s / _positive(sigma_data), output.double(), torch.ones_like(s))
    return _scale(gap, 1 / c).to(x_t.dtype)


def _vp_noise_from_trigflow(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    c, s = _trig(t)
    return _combine(x_t, s / _positive(sigma_data), F, c)


def _vp_skip(t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    (c, s), r = _trig(t), _vp_radius(t, sigma_data)
    return c * s * (sigma_data**2 - 1) / (sigma_data * r**2), r


def _vp_velocity_to_trigflow(x_t: Tensor, output: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    skip, r = _vp_skip(t, sigma_data)
    return _combine(x_t, skip, output, 1 / r)


def _vp_velocity_from_trigflow(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    skip, r = _vp_skip(t, sigma_data)
    return _combine(x_t, -skip * r, F, r)


VP_NOISE = Convention(
    name="vp_noise",
    time=_vp_alpha,
    time_to_trigflow=_vp_time_to_trigflow,
    model_input=_vp_input,
    to_trigflow=_vp_noise_to_trigflow,
    from_trigflow=_vp_noise_from_trigflow,
)
"""Noise prediction (DDPM). ``time`` is al = sqrt(alpha_bar); find the discrete index by matching it."""

VP_VELOCITY = Convention(
    name="vp_velocity",
    time=_vp_alpha,
    time_to_trigflow=_vp_time_to_trigflow,
    model_input=_vp_input,
    to_trigflow=_vp_velocity_to_trigflow,
    from_trigflow=_vp_velocity_from_trigflow,
)
"""v prediction. With ``sigma_data = 1`` this is TrigFlow itself: F = v."""

CONVENTIONS = {c.name: c for c in (EDM_DENOISER, EDM_NETWORK, FLOW, SANA, VP_NOISE, VP_VELOCITY)}
"""Every convention by its name."""
