"""The consistency model: a network, the scale of its data, and its labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

import msgspec
import torch
from torch import Tensor, nn

from .._util.arguments import check_names
from ..errors import ConfigError, ShapeError
from ..spec import DEFAULT_MID_TIME, Renoise, SamplerSpec, TensorSpec, default_times
from .bounds import check_bounds, check_num_parameters
from .decoder import Decoder, Encoder, FrameDecoder
from .foreign.diffusers_models import DiffusersConfig, make_diffusers_network
from .networks.custom import OwnConfig, make_own_network, own_config
from .networks.ddpmpp import DDPMpp, DDPMppConfig
from .networks.edm2 import EDM2, EDM2Config
from .networks.transformer import Transformer, TransformerConfig
from .networks.unet import UNet, UNetConfig
from .trigflow import predict_data

if TYPE_CHECKING:
    from typing_extensions import Unpack

NetworkConfig = UNetConfig | TransformerConfig | DDPMppConfig | EDM2Config | OwnConfig | DiffusersConfig


def make_network(config: NetworkConfig) -> nn.Module:
    """Return the network that a config describes, with random weights.

    Raises:
        ConfigError: If a custom network is not registered, or a built-in one exceeds ``bounds.MAX_PARAMETERS``.
        BackendUnavailable: If it is a network of diffusers and diffusers is not installed.
    """
    if isinstance(config, DiffusersConfig):
        return make_diffusers_network(config)
    if isinstance(config, OwnConfig):
        return make_own_network(config)
    check_num_parameters(lambda: _make_built_in(config))
    return _make_built_in(config)


def _make_built_in(config: UNetConfig | TransformerConfig | DDPMppConfig | EDM2Config) -> nn.Module:
    match config:
        case UNetConfig():
            return UNet(config)
        case TransformerConfig():
            return Transformer(config)
        case DDPMppConfig():
            return DDPMpp(config)
        case EDM2Config():
            return EDM2(config)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Description of a model without its weights; stored as ``config.json``.

    Attributes:
        network: Shape of the network.
        sigma_data: Standard deviation of the data, data units.
        class_names: Names of the labels in order, or ().
        value_range: The data's lowest and highest values.
        output: Whether samples are pixels (or any other final values) or latents.
        mid_time: Second time of the two-step sampler, radians.
        guidance_range: Lowest and highest guidance scale that the model was trained with, if its network takes one.
        default_guidance: Default guidance scale; 1 is the conditional model without guidance.
        provenance: Origin of the weights: data, license, recipe; free form. A training run records its ``objective``
            (``diffusion`` is a teacher), the ``iteration`` reached and the ``num_iterations`` planned.
    """

    network: NetworkConfig
    sigma_data: float = 0.5
    class_names: tuple[str, ...] = ()
    value_range: tuple[float, float] = (-1.0, 1.0)
    output: Literal["pixels", "latents"] = "pixels"
    mid_time: float = DEFAULT_MID_TIME
    guidance_range: tuple[float, float] = (1.0, 2.0)
    default_guidance: float = 1.0
    provenance: dict[str, str] = {}

    def __post_init__(self) -> None:
        own_sigma = getattr(self.network, "sigma_data", self.sigma_data)
        if own_sigma != self.sigma_data:
            raise ConfigError(f"sigma_data is {self.sigma_data}, expected {own_sigma}, which the network is scaled by.")
        check_bounds(self)
        if not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise ConfigError(f"value_range is {self.value_range}, expected (lowest, highest), both finite.")
        if not all(map(math.isfinite, self.guidance_range)):
            raise ConfigError(f"guidance_range is {self.guidance_range}, expected (lowest, highest), both finite.")
        t_max = default_times(1, sigma_data=self.sigma_data)[0]
        if not 0 < self.mid_time < t_max:
            raise ConfigError(f"mid_time is {self.mid_time}, expected radians between 0 and t_max = {t_max:.4f}.")
        low, high = self.guidance_range
        if not low <= self.default_guidance <= high:
            raise ConfigError(
                f"default_guidance is {self.default_guidance}, expected a number in guidance_range = {low}..{high}."
            )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return self.network.sample_shape

    @property
    def num_classes(self) -> int:
        """Number of class labels; 0 for an unconditional model."""
        return self.network.num_classes

    @property
    def guidance(self) -> bool:
        """Whether the network takes a guidance scale."""
        return getattr(self.network, "guidance", False)

    @property
    def flow_map(self) -> bool:
        """Whether the network takes ``r``, the time that a step leads to."""
        return getattr(self.network, "flow_map", False)

    @property
    def conditioning(self) -> tuple[TensorSpec, ...]:
        """Inputs of the network in addition to x, t, class_labels and guidance_scale."""
        return getattr(self.network, "conditioning", ())


class OwnOptions(TypedDict, total=False):
    """Keywords of ``ConsistencyModel`` for a network of your own.

    Those of ``own_config``, then fields of ``ModelConfig``, both of which say what each means.
    """

    sample_shape: tuple[int, ...]
    name: str
    arguments: dict[str, Any]
    num_classes: int
    conditioning: tuple[TensorSpec, ...]
    guidance: bool
    flow_map: bool
    sigma_data: float
    class_names: tuple[str, ...]
    value_range: tuple[float, float]
    output: Literal["pixels", "latents"]
    mid_time: float
    guidance_range: tuple[float, float]
    default_guidance: float
    provenance: dict[str, str]


class ConsistencyModel(nn.Module):
    """``f(x_t, t) = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t)`` around a network F.

    A TrigFlow diffusion model has the same form; f is then its denoiser. ``f(x, 0) = x`` holds for any weights.

    Args:
        config: Shape of the network and scale of the data; default: created from ``own``.
        network: The network; default: created from ``config`` with random weights. See ``networks.custom.Network``.
        decoder: Decoder of a latent model, the last stage of its samplers.
        own: Without a config: ``sample_shape`` and the other arguments of ``own.own_config``, and the fields of
            ``ModelConfig`` except the network.

    Attributes:
        encoder: Encoder of a latent model, None by default. ``export_bundle`` adds its graph, for ``gen(image=...)``.
        frame_decoder: Decoder of clips frame by frame, None by default. ``export_bundle`` then writes its two graphs,
            and samplers that end in latents.

    Raises:
        ConfigError: If neither a config nor a network with its ``sample_shape`` is given.

    Source: arXiv 2410.11081, equation 5.
    """

    islands: ClassVar[tuple[str, ...]] = ()
    """Patterns of further operators that must stay in float32 in every precision; see ``export.precision``."""

    def __init__(
        self,
        config: ModelConfig | None = None,
        network: nn.Module | None = None,
        decoder: Decoder | None = None,
        **own: Unpack[OwnOptions],
    ) -> None:
        super().__init__()
        self.config = _own_model_config(network, own) if config is None else config
        if config is not None and own:
            raise ConfigError(
                f"config is given and {', '.join(own)} in addition, expected either. The config says both."
            )
        self.network: nn.Module = make_network(self.config.network) if network is None else network
        self.decoder: Decoder | None = decoder
        self.encoder: Encoder | None = None
        self.frame_decoder: FrameDecoder | None = None

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data, data units."""
        return self.config.sigma_data

    def at_size(self, height: int, width: int) -> ConsistencyModel:
        """Return the model for images of another size, with the same weights; of pipelines of diffusers.

        Raises:
            ConfigError: If the model has one size, or its parts cannot have this one.
        """
        raise ConfigError(
            f"images of {height}x{width} pixels are asked for, expected {self.config.sample_shape}, the one shape of "
            "this model: only imported pipelines have other sizes."
        )

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None, **conditioning: Tensor) -> Tensor:
        """Return the data end of each sample's trajectory, (B, ...), data units.

        Args:
            x_t: Noisy samples, (B, ...), data units.
            t: Times, (B,) or (1,), radians.
            class_labels: Labels, (B,), int64, or None for none.
            **conditioning: Further inputs of the network by name, axis 0 is the batch, for example ``guidance_scale``.

        Raises:
            ShapeError: If the samples do not have the model's shape.
        """
        if tuple(x_t.shape[1:]) != self.config.sample_shape:
            raise ShapeError(
                f"x_t has shape {tuple(x_t.shape)}, expected (batch, {', '.join(map(str, self.config.sample_shape))})."
            )
        if class_labels is not None:
            conditioning["class_labels"] = class_labels
        t = t.expand(len(x_t))
        if self.config.flow_map:
            conditioning["r"] = torch.zeros_like(t)
        F = self.network(x_t / self.sigma_data, t, **conditioning)
        return predict_data(x_t, F, t, sigma_data=self.sigma_data)

    def spec(
        self,
        num_inference_steps: int = 2,
        *,
        times: tuple[float, ...] | None = None,
        renoise: Renoise | None = None,
        max_batch: int = 32,
    ) -> SamplerSpec:
        """Describe the sampler that unrolls this model over its times and decodes, if the model has a decoder.

        Args:
            num_inference_steps: Number of network calls at the default times; not used if ``times`` is given.
            times: Times, radians, strictly falling; ``scm_sdk.spec.flow_times`` makes them from flow-matching sigmas.
            renoise: Noise of the steps after the first, see ``SamplerSpec.renoise``; None is the model's rule, which is
                ``fresh`` except for few-step flow pipelines.
            max_batch: Largest batch.
        """
        config = self.config
        return SamplerSpec(
            times=times or default_times(num_inference_steps, sigma_data=config.sigma_data, mid_time=config.mid_time),
            sample_shape=config.sample_shape,
            sigma_data=config.sigma_data,
            mid_time=config.mid_time,
            value_range=config.value_range,
            output=config.output if self.decoder is None else "pixels",
            output_shape=() if self.decoder is None else self.decoder.output_shape,
            num_classes=config.num_classes,
            class_names=config.class_names,
            guidance_range=config.guidance_range if config.guidance else None,
            default_guidance=config.default_guidance if config.guidance else None,
            conditioning=config.conditioning,
            max_batch=max_batch,
            renoise=renoise or "fresh",
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        network: nn.Module | None = None,
        decoder: nn.Module | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> ConsistencyModel:
        """Load ``config.json`` and ``diffusion_pytorch_model.safetensors``, in eval mode.

        Args:
            path: Folder of a checkpoint or a bundle, a ``.scmz`` file, or ``hf:owner/name`` on the hub.
            network: Module to load the weights into, for a custom network that is not registered.
            decoder: The same for a custom decoder.
            revision: Branch, tag or commit of a hub id.
            local_files_only: Read a hub id from the cache only.

        Raises:
            ConfigError: If the network is not registered.
            BundleError: If the folder or a file is missing.
            IntegrityError: If the weights are truncated or do not match the config.
        """
        from .checkpoint import load_checkpoint
        from .sharing import find_checkpoint

        return load_checkpoint(
            find_checkpoint(path, revision=revision, local_files_only=local_files_only), network, decoder
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors``, each file atomically.

        Those of a decoder are written to the folder ``decoder``.
        """
        from .checkpoint import save_checkpoint

        save_checkpoint(self, Path(folder))

    def check_reopens(self) -> None:
        """Refuse a model whose checkpoint could not be opened; ``export_bundle`` calls this first.

        Raises:
            ConfigError: If a custom network or decoder is not registered, or the ``arguments`` create a different one.
        """
        from .checkpoint import check_reopens

        check_reopens(self)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        message: str = "",
        create_pr: bool = False,
    ) -> str:
        """Upload config, weights and a model card to the Hugging Face hub; see ``scm_sdk.bundle.hub.push``.

        Returns:
            URL of the commit.

        Raises:
            BackendUnavailable: If huggingface_hub is not installed.
            BundleError: If the hub refuses or cannot be reached.
        """
        from .sharing import push_model

        return push_model(self, repo_id, revision=revision, private=private, message=message, create_pr=create_pr)


def _own_model_config(network: nn.Module | None, own: OwnOptions) -> ModelConfig:
    if network is None or "sample_shape" not in own:
        raise ConfigError(
            "a model needs a config, or a network with its sample_shape, for example "
            "ConsistencyModel(network=my_module, sigma_data=0.5, sample_shape=(1, 256))."
        )
    fields = set(ModelConfig.__struct_fields__) - {"network"}
    check_names(own, tuple(OwnOptions.__annotations__), of="ConsistencyModel")
    described = own_config(network, **{name: value for name, value in own.items() if name not in fields})  # type: ignore[arg-type]
    return ModelConfig(network=described, **{name: value for name, value in own.items() if name in fields})  # type: ignore[arg-type]
