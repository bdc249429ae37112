"""Denoisers of diffusers as TrigFlow networks: supported classes, call conventions and time inputs.

``DiffusersConfig`` describes such a network in a checkpoint: the class with its arguments, and the convention of its
training, which diffusers stores with its schedulers. ``make_diffusers_network`` creates it with random weights;
``diffusers_folder`` reads both from a folder that diffusers saved.

    class                     conventions                          conditioning
    UNet2DModel               vp_*, flow, edm_network              class_labels, if it has classes
    DiTTransformer2DModel     vp_*, flow, edm_network              class_labels; label num_classes is "none"
    SD3Transformer2DModel     flow, vp_*                           encoder_hidden_states, pooled_projections

Time inputs: the index of the schedule or ln(sigma) / 4 (vp_*), 1000 u (flow), ln(sigma) / 4 (edm_network).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, Literal, cast

import msgspec
from torch import Tensor, nn
from torch.nn import functional

from ..._util.lazy import require
from ...errors import ConfigError
from ...spec import TensorSpec
from ..bounds import check_bound, check_bounds, check_num_parameters
from ..conversions import EDM_DENOISER, EDM_NETWORK, FLOW, VP_NOISE, VP_VELOCITY, Convention
from .denoiser import ModuleDenoiser, TrigFlowNetwork
from .schedule import VpIndex, VpSchedule, continuous_timestep

ClassName = Literal["UNet2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel"]
ConventionName = Literal["vp_noise", "vp_velocity", "vp_data", "flow", "edm_network"]

VP_DATA = replace(
    VP_NOISE,
    name="vp_data",
    to_trigflow=EDM_DENOISER.to_trigflow,
    from_trigflow=EDM_DENOISER.from_trigflow,
)
"""A variance-preserving model that predicts x_0; F follows from any estimate of x_0."""
CONVENTIONS: dict[str, Convention] = {
    "vp_noise": VP_NOISE,
    "vp_velocity": VP_VELOCITY,
    "vp_data": VP_DATA,
    "flow": FLOW,
    "edm_network": EDM_NETWORK,
}


class DiffusersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="diffusers"):
    """A denoiser of diffusers as a network F.

    Attributes:
        class_name: Class in diffusers.
        arguments: Arguments of its constructor, as in its ``config.json``.
        convention: Prediction target and times.
        sample_shape: Shape of one sample, (C, H, W).
        sigma_data: Standard deviation of the data, data units.
        schedule: Noise levels; only for ``vp_*``.
        timestep_type: Time input of a ``vp_*`` model: ``discrete``, the index of the schedule, or ``continuous``,
            ln(sigma) / 4.
        num_train_timesteps: Time input at u = 1; only for ``flow``.
        text_length: Tokens of ``encoder_hidden_states``; only for SD3.
        dropout: Dropout probability during the training of a student.
    """

    class_name: ClassName
    arguments: dict[str, Any]
    convention: ConventionName
    sample_shape: tuple[int, int, int]
    sigma_data: float
    schedule: VpSchedule | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    num_train_timesteps: int = 1000
    text_length: int = 333
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.convention.startswith("vp_") != (self.schedule is not None):
            found = "no schedule" if self.schedule is None else "a schedule"
            raise ConfigError(
                f"convention {self.convention!r} comes with {found}, expected one for vp_noise, vp_velocity and "
                "vp_data, and none for the others."
            )
        if self.timestep_type == "continuous" and self.convention != "vp_velocity":
            raise ConfigError(
                f"timestep_type is 'continuous' for convention {self.convention!r}, expected 'vp_velocity': with "
                "another the library gives the schedule's index."
            )
        if self.dropout and self.class_name == "SD3Transformer2DModel":
            raise ConfigError(f"dropout is {self.dropout} for {self.class_name}, expected 0: it has none.")

    @property
    def num_classes(self) -> int:
        """Class labels; 0 for none."""
        key = {"UNet2DModel": "num_class_embeds", "DiTTransformer2DModel": "num_embeds_ada_norm"}.get(self.class_name)
        default = 1000 if key == "num_embeds_ada_norm" else None
        return int(self.arguments.get(key, default) or 0) if key else 0

    @property
    def has_null_label(self) -> bool:
        """Whether label ``num_classes`` means none."""
        return self.class_name == "DiTTransformer2DModel"

    @property
    def conditioning(self) -> tuple[TensorSpec, ...]:
        """Inputs of the network in addition to x, t and class_labels."""
        if self.class_name != "SD3Transformer2DModel":
            return ()
        return (
            TensorSpec(
                name="encoder_hidden_states",
                shape=(self.text_length, int(self.arguments.get("joint_attention_dim", 4096))),
            ),
            TensorSpec(name="pooled_projections", shape=(int(self.arguments.get("pooled_projection_dim", 2048)),)),
        )


def make_diffusers_network(config: DiffusersConfig) -> TrigFlowNetwork:
    """Return the network with random weights.

    Raises:
        BackendUnavailable: If diffusers is not installed.
        ConfigError: If the class refuses the arguments, or its time is not continuous.
    """
    diffusers = require("diffusers", extra="diffusers", purpose=f"a {config.class_name}")
    _check_kind(config)
    arguments = dict(config.arguments)
    if config.class_name != "SD3Transformer2DModel":
        arguments["dropout"] = config.dropout  # regardless of its training
    for name, value in arguments.items():
        if value is not None:
            check_bound(name, value)
    make = getattr(diffusers, config.class_name)
    try:
        check_num_parameters(lambda: make(**arguments))
        module: nn.Module = make(**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, MemoryError) as exc:
        raise ConfigError(
            f"a {config.class_name} of diffusers {diffusers.__version__} cannot be made: {exc}. Expected the "
            "arguments of its own config.json; update diffusers if they are newer."
        ) from exc
    make_tractable(module)
    channels = config.sample_shape[0]
    denoiser = ModuleDenoiser(
        module,
        CONVENTIONS[config.convention],
        timestep=_timestep(config),
        call=lambda module, x, timestep, **given: _CALLS[config.class_name](module, x, timestep, **given)[:, :channels],
    )
    return TrigFlowNetwork(denoiser, sigma_data=config.sigma_data)


def make_tractable(module: nn.Module) -> None:
    """Remove randomness and dependence on the batch size, which neither a JVP nor a graph supports."""
    upsampling: Any = import_module(
        "diffusers.models.upsampling"
    )  # imported by name, because its type stubs take minutes to check
    Upsample2D = upsampling.Upsample2D

    class AnyBatch(Upsample2D):  # type: ignore[misc, valid-type]
        """The same, without the test for batches larger than 63."""

        def forward(self, hidden_states: Tensor, output_size: int | None = None) -> Tensor:
            plain = self.interpolate and self.use_conv and self.name == "conv" and not self.use_conv_transpose
            if not plain or self.norm is not None or output_size is not None:
                return cast(Tensor, super().forward(hidden_states, output_size))
            larger = functional.interpolate(hidden_states.contiguous(), scale_factor=2.0, mode="nearest")
            return cast(Tensor, self.conv(larger))

    for child in module.modules():
        if type(child) is Upsample2D:
            child.__class__ = AnyBatch
        elif type(child).__name__ == "LabelEmbedding":
            child.dropout_prob = 0.0  # type: ignore[assignment]  # training drops labels itself, once for all passes


def _timestep(config: DiffusersConfig) -> Callable[[Tensor], Tensor]:
    if config.timestep_type == "continuous":
        return continuous_timestep
    if config.schedule is not None:
        return VpIndex(config.schedule)
    if config.convention == "flow":
        return lambda u: config.num_train_timesteps * u
    return lambda c_noise: c_noise


def _check_kind(config: DiffusersConfig) -> None:
    """Refuse a network without continuous time, or with inputs other than x, t and ``conditioning``."""
    wanted = {"time_embedding_type": ("positional",), "class_embed_type": (None,), "norm_type": ("ada_norm_zero",)}
    for key, known in wanted.items():
        if (found := config.arguments.get(key, known[0])) not in known:
            raise ConfigError(
                f"{config.class_name} has {key} {found!r}, expected {known[0]!r}: no other can be asked at any time "
                "with labels alone. Wrap the module manually, with ModuleDenoiser."
            )
    default = {"UNet2DModel": 3, "DiTTransformer2DModel": 4, "SD3Transformer2DModel": 16}[config.class_name]
    channels = config.arguments.get("in_channels", default)
    given = config.arguments.get("out_channels", 3 if config.class_name == "UNet2DModel" else None)
    out_channels = channels if given is None else given
    if config.sample_shape[0] != channels or out_channels not in (channels, 2 * channels):
        raise ConfigError(
            f"{config.class_name} takes {channels} channels and returns {out_channels} for samples of "
            f"{config.sample_shape[0]}, expected as many, or twice as many out with a learned variance."
        )


def _call_unet(module: nn.Module, x: Tensor, timestep: Tensor, **given: Tensor) -> Tensor:
    out: Tensor = module(x, timestep, return_dict=False, **given)[0]
    return out


def _call_transformer(module: nn.Module, x: Tensor, timestep: Tensor, **given: Tensor) -> Tensor:
    out: Tensor = module(hidden_states=x, timestep=timestep, return_dict=False, **given)[0]
    return out


_CALLS: dict[str, Callable[..., Tensor]] = {
    "UNet2DModel": _call_unet,
    "DiTTransformer2DModel": _call_transformer,
    "SD3Transformer2DModel": _call_transformer,
}
