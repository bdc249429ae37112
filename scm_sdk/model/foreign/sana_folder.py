"""A SANA-Sprint folder as diffusers saves it, read and checked before anything of it is loaded.

    model_index.json   scheduler/   transformer/   vae/   text_encoder/ and tokenizer/ (may be absent)

Only JSON and file names are read here, without torch and diffusers, so a wrong folder is refused quickly. The files are
untrusted: sizes are limited, names must stay in the folder, weights must be safetensors, and unknown settings are
refused.

Source: arXiv 2503.09641; the layout is that of diffusers 0.42's ``SanaSprintPipeline.save_pretrained``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ...bundle.layout import CONFIG_NAME, INDEX_NAME
from ...errors import BundleError, ConfigError
from ...spec import Renoise, SamplerSpec, TensorSpec, default_times
from .component import SETTINGS_NAME, check_limits, read_json, weight_files

PIPELINE = "SanaSprintPipeline"
COMPONENTS = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC", "scheduler": "SCMScheduler"}
CONFIGS = {"scheduler": "scheduler_config.json"}
TEXT_ENCODERS = ("Gemma2Model",)
TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast")
MAX_TIME, MID_TIME = 1.57080, 1.3
"""First time of every sampler and second of the two-step one, radians: diffusers' defaults for this pipeline."""
GUIDANCE_RANGE, DEFAULT_GUIDANCE = (0.0, 20.0), 4.5
"""The released models were distilled at scales 4 to 5; the default of their pipeline is 4.5, without limits."""
STEPS = (1, 2, 3, 4)
OBJECTIVE = "sCM and LADD (SANA-Sprint)"
"""Objective of the released models (arXiv 2503.09641), for the provenance."""
_REMEDY = f"Give a folder that {PIPELINE}.save_pretrained wrote, whole."
Config = TypeVar("Config", bound=msgspec.Struct)


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``transformer/config.json``: the arguments of ``SanaTransformer2DModel``."""

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int | None = 20
    cross_attention_head_dim: int | None = 112
    cross_attention_dim: int | None = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``scheduler/scheduler_config.json``."""

    num_train_timesteps: int = 1000
    prediction_type: str = "trigflow"
    sigma_data: float = 0.5


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an import that the pipeline takes per call; ``scm_import.json`` next to the index.

    Attributes:
        height: Image height, pixels; 0 is the native size of the transformer.
        width: Image width, pixels; 0 is the native size of the transformer.
        max_sequence_length: Tokens of a prompt.
    """

    height: int = 0
    width: int = 0
    max_sequence_length: int = 300


@dataclass(frozen=True, kw_only=True)
class SanaFolder:
    """A verified folder.

    Attributes:
        path: The folder.
        transformer: Config of the transformer.
        vae: Unparsed config of the autoencoder.
        scheduler: Config of the scheduler.
        settings: Settings of the import.
        has_text_encoder: Whether prompts can be encoded.
        tokenizer_class: Class of the tokenizer; "" if there is none.
    """

    path: Path
    transformer: TransformerConfig
    vae: dict[str, Any]
    scheduler: SchedulerConfig
    settings: Settings
    has_text_encoder: bool
    tokenizer_class: str

    @property
    def scale_factor(self) -> int:
        """Pixels of one latent, along an axis."""
        return int(2 ** (len(self.vae["encoder_block_out_channels"]) - 1))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one sample of latents."""
        size = self.transformer.sample_size * self.scale_factor
        height, width = self.settings.height or size, self.settings.width or size
        cell = self.scale_factor * self.transformer.patch_size
        if height < 1 or width < 1 or height % cell or width % cell:
            raise ConfigError(
                f"images are {height}x{width} pixels, expected multiples of {cell}, the autoencoder's and the "
                f"transformer's cell; {size}x{size} is the model's own size."
            )
        return (self.transformer.in_channels, height // self.scale_factor, width // self.scale_factor)

    @property
    def conditioning(self) -> tuple[TensorSpec, ...]:
        """The inputs in addition to noise and guidance."""
        tokens = self.settings.max_sequence_length
        return (
            TensorSpec(name="prompt_embeds", shape=(tokens, self.transformer.caption_channels)),
            TensorSpec(name="prompt_attention_mask", shape=(tokens,), dtype="int64", kind="mask"),
        )

    def spec(
        self,
        num_inference_steps: int = 2,
        *,
        times: tuple[float, ...] | None = None,
        renoise: Renoise = "fresh",
        max_batch: int = 8,
    ) -> SamplerSpec:
        """Describe the sampler that ends with the decoder, ``SanaSprintPipeline``'s times where none are given."""
        channels, height, width = self.sample_shape
        sigma_data = self.scheduler.sigma_data
        made = default_times(num_inference_steps, sigma_data=sigma_data, mid_time=MID_TIME, max_time=MAX_TIME)
        return SamplerSpec(
            times=times or made,
            sample_shape=(channels, height, width),
            sigma_data=sigma_data,
            mid_time=MID_TIME,
            max_time=MAX_TIME,
            output_shape=(int(self.vae.get("in_channels", 3)), height * self.scale_factor, width * self.scale_factor),
            guidance_range=GUIDANCE_RANGE,
            default_guidance=DEFAULT_GUIDANCE,
            conditioning=self.conditioning,
            max_batch=max_batch,
            renoise=renoise,
        )


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder is a pipeline of diffusers of any kind."""
    return (folder / INDEX_NAME).is_file()


def read_sana_folder(folder: Path, settings: Settings | None = None) -> SanaFolder:
    """Read and check a folder.

    Args:
        folder: Folder written by ``save_pretrained``, or the same folder in a bundle.
        settings: Size and tokens; None reads ``scm_import.json`` if it exists.

    Raises:
        BundleError: If it is not a pipeline of diffusers, or a component or a shard is missing.
        ConfigError: If it is another pipeline, or a config has unknown settings.
    """
    if not is_pipeline(folder):
        found = f"has no {INDEX_NAME}" if folder.is_dir() else "is no folder"
        raise BundleError(f"{folder} {found}, expected a SANA-Sprint pipeline. {_REMEDY}")
    index = _read_json(folder / INDEX_NAME)
    kind = index.get("_class_name")
    if kind != PIPELINE:
        raise ConfigError(f"{folder} is a {kind!r} of diffusers, expected {PIPELINE!r}. Other pipelines are no sCM.")
    for component, wanted in COMPONENTS.items():
        if index.get(component) != ["diffusers", wanted]:
            found = "missing" if index.get(component, [None])[0] is None else f"{index[component]}"
            raise ConfigError(
                f"component {component!r} of {folder} is {found}, expected diffusers' {wanted}. {_REMEDY}"
            )
        _check_component(folder, component, wanted)
    transformer = _convert(folder, "transformer", TransformerConfig)
    scheduler = _convert(folder, "scheduler", SchedulerConfig)
    vae = _component_config(folder, "vae")
    _check_values(folder, transformer, scheduler, vae)
    own = folder / SETTINGS_NAME
    if settings is None:
        settings = _from_builtins(_read_json(own), Settings, own) if own.is_file() else Settings()
    if settings.max_sequence_length < 1:
        raise ConfigError(f"max_sequence_length is {settings.max_sequence_length}, expected 1 or more tokens.")
    check_limits(height=settings.height, width=settings.width, tokens=settings.max_sequence_length)
    tokenizer = _check_text(folder, index)
    return SanaFolder(
        path=folder,
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        settings=settings,
        has_text_encoder=bool(tokenizer),
        tokenizer_class=tokenizer,
    )


def _check_component(folder: Path, component: str, wanted: str) -> None:
    config = _component_config(folder, component)
    if (found := config.get("_class_name")) != wanted:
        raise ConfigError(f"{folder / component} holds a {found!r}, expected {wanted!r}. {_REMEDY}")
    if component != "scheduler":
        weight_files(folder / component, remedy=_REMEDY)


def _check_text(folder: Path, index: dict[str, Any]) -> str:
    """Return the tokenizer's class, "" if the pipeline was saved without a text encoder."""
    kinds = {name: index.get(name) or [None, None] for name in ("text_encoder", "tokenizer")}
    if all(kind[0] is None for kind in kinds.values()):
        return ""
    for (name, kind), allowed in zip(kinds.items(), (TEXT_ENCODERS, TOKENIZERS), strict=True):
        if kind[0] != "transformers" or kind[1] not in allowed:
            raise ConfigError(
                f"component {name!r} of {folder} is {kind}, expected transformers' {' or '.join(allowed)}. {_REMEDY}"
            )
        if not (folder / name).is_dir():
            raise BundleError(f"component {name!r} is missing in {folder}, which its {INDEX_NAME} names. {_REMEDY}")
    weight_files(folder / "text_encoder", "model.safetensors", remedy=_REMEDY)
    return str(kinds["tokenizer"][1])


def _check_values(
    folder: Path, transformer: TransformerConfig, scheduler: SchedulerConfig, vae: dict[str, Any]
) -> None:
    if not transformer.guidance_embeds:
        raise ConfigError(
            f"{folder / 'transformer'} has guidance_embeds false, expected true: it is a SANA diffusion model, not a "
            "SANA-Sprint one. Distill it first."
        )
    if scheduler.prediction_type != "trigflow" or not 0 < scheduler.sigma_data < math.inf:
        raise ConfigError(
            f"{folder / 'scheduler'} has prediction_type {scheduler.prediction_type!r} and sigma_data "
            f"{scheduler.sigma_data}, expected 'trigflow' and a number above 0."
        )
    factor, blocks = vae.get("scaling_factor"), vae.get("encoder_block_out_channels")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf or not isinstance(blocks, list) or not blocks:
        raise ConfigError(
            f"{folder / 'vae'} has scaling_factor {factor!r} and encoder_block_out_channels {blocks!r}, expected a "
            f"number above 0 and a list. {_REMEDY}"
        )
    if vae.get("latent_channels") != transformer.in_channels:
        raise ConfigError(
            f"the autoencoder of {folder} has {vae.get('latent_channels')} latent channels, expected the transformer's "
            f"{transformer.in_channels}. {_REMEDY}"
        )


def _component_config(folder: Path, component: str) -> dict[str, Any]:
    path = folder / component / CONFIGS.get(component, CONFIG_NAME)
    if not path.is_file():
        raise BundleError(f"component {component!r} is missing in {folder}: no {path.relative_to(folder)}. {_REMEDY}")
    return _read_json(path)


def _convert(folder: Path, component: str, kind: type[Config]) -> Config:
    config = _component_config(folder, component)
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return _from_builtins(known, kind, folder / component)


def _from_builtins(value: dict[str, Any], kind: type[Config], where: Path) -> Config:
    if unknown := sorted(set(value) - set(kind.__struct_fields__)):
        raise ConfigError(
            f"{where} has unknown config keys {', '.join(unknown)}, expected only those this scm-sdk knows: their "
            "effect is unknown. Update scm-sdk, or report it."
        )
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where} breaks its config: {exc}. {_REMEDY}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, remedy=_REMEDY)
