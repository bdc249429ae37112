"""Models in PyTorch: the mathematics, networks, samplers, checkpoints, and models of other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._util.public import lazy_names

if TYPE_CHECKING:
    from .conversions import CONVENTIONS, EDM_DENOISER, EDM_NETWORK, FLOW, SANA, VP_NOISE, VP_VELOCITY, Convention
    from .decoder import register_decoder, sd_vae_ft_mse
    from .foreign.denoiser import ModuleDenoiser, TrigFlowNetwork
    from .foreign.diffusers_folder import load_diffusers
    from .networks.conditioning import PositionalEmbedding
    from .networks.presets import PRESETS

__all__ = [
    "CONVENTIONS",
    "EDM_DENOISER",
    "EDM_NETWORK",
    "FLOW",
    "PRESETS",
    "SANA",
    "VP_NOISE",
    "VP_VELOCITY",
    "Convention",
    "ModuleDenoiser",
    "PositionalEmbedding",
    "TrigFlowNetwork",
    "load_diffusers",
    "register_decoder",
    "sd_vae_ft_mse",
]

_HOMES = {
    "CONVENTIONS": ".conversions",
    "Convention": ".conversions",
    "EDM_DENOISER": ".conversions",
    "EDM_NETWORK": ".conversions",
    "FLOW": ".conversions",
    "ModuleDenoiser": ".foreign.denoiser",
    "PRESETS": ".networks.presets",
    "PositionalEmbedding": ".networks.conditioning",
    "SANA": ".conversions",
    "TrigFlowNetwork": ".foreign.denoiser",
    "VP_NOISE": ".conversions",
    "VP_VELOCITY": ".conversions",
    "load_diffusers": ".foreign.diffusers_folder",
    "register_decoder": ".decoder",
    "sd_vae_ft_mse": ".decoder",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
