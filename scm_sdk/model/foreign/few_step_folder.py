"""Few-step flow pipelines of diffusers: one table, and their folders read and checked before anything is loaded.

    model_index.json   scheduler/   transformer/   vae/   text_encoder/ and tokenizer/ (may be absent)

    pipeline             transformer                 autoencoder         sigmas             re-noise
    Flux2KleinPipeline   Flux2Transformer2DModel     AutoencoderKLFlux2  the scheduler's    ode
    ZImagePipeline       ZImageTransformer2DModel    AutoencoderKL       the scheduler's    ode
    WanPipeline          WanTransformer3DModel       AutoencoderKLWan    rCM's times        fresh
    AnyFlowPipeline      AnyFlowTransformer3DModel   AutoencoderKLWan    the scheduler's    ode, a flow map

Only JSON and file names are read here, without torch and diffusers, so that a wrong folder is refused quickly. The
files are untrusted: sizes are limited, names must stay in the folder, weights must be safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ...bundle.layout import CONFIG_NAME, INDEX_NAME
from ...errors import BundleError, ConfigError
from ...spec import MAX_STEPS, Renoise, SamplerSpec, TensorSpec, flow_times
from .component import SETTINGS_NAME, check_limits, read_json, weight_files
from .sana_folder import PIPELINE as SANA_PIPELINE

SCHEDULER_NAME = "scheduler_config.json"
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
RCM_SIGMA_MAX = 80.0
RCM_TIMES = (math.atan(RCM_SIGMA_MAX), 1.5, 1.4, 1.0)
"""Times of rCM's sampler, radians: the first N of them for N steps."""
_REMEDY = "Give the folder that the pipeline's save_pretrained wrote, whole."
_OWN = "Wrap another denoiser in Python with ModuleDenoiser: docs/models.md, Few-step flow pipelines."


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an import that the pipeline takes per call; ``scm_import.json`` next to the index.

    Attributes:
        height: Height of an image or frame, pixels; 0 is the pipeline's default.
        width: Width, pixels; 0 is the pipeline's default.
        num_frames: Frames of a video, 4 n + 1; 0 is the pipeline's default, and 0 for an image.
        max_sequence_length: Tokens of a prompt; 0 is the pipeline's default.
        distilled: Whether the user declares the weights a few-step student, if the folder does not.
        frame_decoder: Whether exports decode clips frame by frame.
    """

    height: int = 0
    width: int = 0
    num_frames: int = 0
    max_sequence_length: int = 0
    distilled: bool = False
    frame_decoder: bool = False


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """How a pipeline encodes its prompts.

    Attributes:
        classes: Classes in transformers of the encoder.
        tokenizers: Classes in transformers of its tokenizer.
        layers: Hidden states that are joined to an embedding, 0 is the input of the first layer; () is the output.
        thinking: ``enable_thinking`` of the chat template around a prompt; None for no template, but a cleaned prompt.
        zero_padding: Whether the embeddings of padding are 0.
    """

    classes: tuple[str, ...]
    tokenizers: tuple[str, ...]
    layers: tuple[int, ...] = ()
    thinking: bool | None = None
    zero_padding: bool = True


@dataclass(frozen=True, kw_only=True)
class FewStepPipeline:
    """One row of the table: a pipeline class, and how its configs determine a sampler.

    Attributes:
        name: Class of the pipeline.
        transformer: Class of the denoiser.
        vae: Class of the autoencoder.
        schedulers: Classes of the schedulers whose flow the denoiser may have been trained on.
        text_dim: Setting of the transformer's config that holds the width of the prompt's embeddings.
        renoise: Rule for the noise of the steps after the first.
        steps: Numbers of steps by default.
        defaults: Default size and prompt length.
        cell: Multiple of height and width, pixels, of the transformer's and the autoencoder's configs.
        sample_shape: Shape of the noise, of the two configs and the settings.
        sigmas: Noise levels of N steps, of the scheduler's config and the sample shape.
        student: Returns "" if a model index declares a few-step student, else what it lacks. None if the model index
            of this class never declares it.
        check: Raises if transformer's or autoencoder's config or the model index is of another variant, or has no
            positions for the size.
        text: Its text encoder.
        mask: Whether the prompt has an attention mask.
        flow_map: Whether the transformer also takes the time that a step leads to.
        objective: Method of the released weights, for the provenance.
    """

    name: str
    transformer: str
    vae: str
    schedulers: tuple[str, ...]
    text_dim: str
    renoise: Renoise
    steps: tuple[int, ...]
    defaults: Settings
    cell: Callable[[Mapping[str, Any], Mapping[str, Any]], int]
    sample_shape: Callable[[Mapping[str, Any], Mapping[str, Any], Settings], tuple[int, ...]]
    sigmas: Callable[[Mapping[str, Any], int, tuple[int, ...]], Sequence[float]]
    student: Callable[[Mapping[str, Any]], str] | None
    check: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], Settings], None]
    text: TextEncoder
    mask: bool = False
    flow_map: bool = False
    objective: str = "few-step flow matching"


# Sizes


def _image_factor(vae: Mapping[str, Any]) -> int:
    """Pixels of one latent along an axis, of a KL autoencoder."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def _flux2_shape(transformer: Mapping[str, Any], vae: Mapping[str, Any], size: Settings) -> tuple[int, ...]:
    cell = 2 * _image_factor(vae)
    return (transformer["in_channels"], size.height // cell, size.width // cell)


def _z_image_shape(transformer: Mapping[str, Any], vae: Mapping[str, Any], size: Settings) -> tuple[int, ...]:
    factor = _image_factor(vae)
    return (transformer["in_channels"], size.height // factor, size.width // factor)


def _wan_factors(vae: Mapping[str, Any]) -> tuple[int, int]:
    return int(vae.get("scale_factor_temporal") or 4), int(vae.get("scale_factor_spatial") or 8)


def _wan_shape(transformer: Mapping[str, Any], vae: Mapping[str, Any], size: Settings) -> tuple[int, ...]:
    frames, pixels = _wan_factors(vae)
    return (
        transformer["in_channels"], (size.num_frames - 1) // frames + 1, size.height // pixels, size.width // pixels,
    )  # fmt: skip


# Sigmas


def _linear(num_inference_steps: int) -> list[float]:
    """Return ``linspace(1, 1 / N, N)``, the sigmas that the pipelines pass to their scheduler."""
    return [1 - i / num_inference_steps for i in range(num_inference_steps)]


def _shifted(scheduler: Mapping[str, Any], sigmas: Sequence[float], mu: float) -> list[float]:
    """Return the sigmas of ``FlowMatchEulerDiscreteScheduler``: shifted by its setting, or by exp(mu) or mu.

    Source: Esser et al. 2024, arXiv 2403.03206, equation 23: ``shift s / (1 + (shift - 1) s)``.
    """
    shift = float(scheduler.get("shift", 1.0))
    if scheduler.get("use_dynamic_shifting", False):
        shift = mu if scheduler.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
    return [shift * s / (1 + (shift - 1) * s) for s in sigmas]


def _flux2_sigmas(scheduler: Mapping[str, Any], num_inference_steps: int, shape: tuple[int, ...]) -> list[float]:
    """Noise levels of FLUX.2, whose mu is a fit of the number of tokens and of steps."""
    tokens = math.prod(shape[1:])
    at_200 = 1.6927e-4 * tokens + 0.45666666
    at_10 = 8.73809524e-5 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    mu = at_200 if tokens > 4300 else slope * num_inference_steps + at_200 - 200 * slope
    return _shifted(scheduler, _linear(num_inference_steps), mu)


def _z_image_sigmas(scheduler: Mapping[str, Any], num_inference_steps: int, shape: tuple[int, ...]) -> list[float]:
    """Noise levels of Z-Image, whose mu is linear in the number of tokens."""
    tokens = (shape[1] // 2) * (shape[2] // 2)
    first, last = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (high - low) / (last - first)
    return _shifted(scheduler, _linear(num_inference_steps), slope * tokens + low - slope * first)


def _rcm_sigmas(scheduler: Mapping[str, Any], num_inference_steps: int, shape: tuple[int, ...]) -> list[float]:
    if num_inference_steps > len(RCM_TIMES):
        raise ConfigError(
            f"rCM has times for 1..{len(RCM_TIMES)} steps, found {num_inference_steps}. Give others as times."
        )
    return [math.sin(t) / (math.sin(t) + math.cos(t)) for t in RCM_TIMES[:num_inference_steps]]


def _flow_map_sigmas(scheduler: Mapping[str, Any], num_inference_steps: int, shape: tuple[int, ...]) -> list[float]:
    return _shifted({"shift": scheduler.get("shift", 1.0)}, _linear(num_inference_steps), 0.0)


# Variants


def _flux2_student(index: Mapping[str, Any]) -> str:
    return "" if index.get("is_distilled") else "its model_index.json has is_distilled false"


def _check_flux2(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], index: Mapping[str, Any], size: Settings
) -> None:
    _refuse_other("transformer", transformer, {"patch_size": 1})
    if (out := transformer.get("out_channels")) not in (None, transformer["in_channels"]):
        raise ConfigError(f"the transformer has out_channels {out}, expected in_channels {transformer['in_channels']}.")


def _check_z_image(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], index: Mapping[str, Any], size: Settings
) -> None:
    _refuse_other("transformer", transformer, {"siglip_feat_dim": None, "all_patch_size": [2], "all_f_patch_size": [1]})
    longest = int(transformer.get("axes_lens", [1024])[0])
    if size.max_sequence_length + Z_IMAGE_MULTIPLE + 2 > longest:
        raise ConfigError(
            f"max_sequence_length is {size.max_sequence_length}, expected at most {longest - Z_IMAGE_MULTIPLE - 2}: "
            f"the transformer has positions for {longest}."
        )
    factor = 2 * _image_factor(vae)
    _check_positions({
        "height": (size.height // factor, transformer.get("axes_lens", [1024, 512, 512])[1]),
        "width": (size.width // factor, transformer.get("axes_lens", [1024, 512, 512])[2]),
    })  # fmt: skip


def _check_wan(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], index: Mapping[str, Any], size: Settings
) -> None:
    _refuse_other(
        "transformer", transformer,
        {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None, "patch_size": [1, 2, 2]},
    )  # fmt: skip
    _refuse_other(INDEX_NAME, index, {"boundary_ratio": None, "expand_timesteps": False})
    if (second := index.get("transformer_2")) and second[0] is not None:
        raise ConfigError("the pipeline has a transformer_2, as Wan 2.2 has, expected one transformer, as in Wan 2.1.")
    _check_wan_positions(transformer, vae, size)


def _check_any_flow(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], index: Mapping[str, Any], size: Settings
) -> None:
    _refuse_other("transformer", transformer, {"image_dim": None, "patch_size": [1, 2, 2]})
    _check_wan_positions(transformer, vae, size)


def _check_wan_positions(transformer: Mapping[str, Any], vae: Mapping[str, Any], size: Settings) -> None:
    _, frames, height, width = _wan_shape(transformer, vae, size)
    most = transformer.get("rope_max_seq_len", 1024)
    _check_positions({"num_frames": (frames, most), "height": (height // 2, most), "width": (width // 2, most)})


def _check_positions(axes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a size with more tokens along an axis than a transformer has positions; ``axes``: (tokens, positions)."""
    for name, (tokens, most) in axes.items():
        if tokens > most:
            raise ConfigError(
                f"{name} is {tokens} tokens long, expected at most {most}: the transformer has positions for {most}. "
                "Take a smaller size."
            )


def _refuse_other(subject: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if (there := found.get(name, value)) != value:
            raise ConfigError(f"the {subject} has {name} {there!r}, expected {value!r}: another variant of the model.")


Z_IMAGE_MULTIPLE = 32
"""Z-Image fills prompts and images up to a multiple of this many tokens."""

_UMT5 = TextEncoder(classes=("UMT5EncoderModel",), tokenizers=("T5Tokenizer", "T5TokenizerFast"))
_QWEN3, _QWEN3_TOKENIZERS = ("Qwen3ForCausalLM", "Qwen3Model"), ("Qwen2Tokenizer", "Qwen2TokenizerFast")

TABLE = {
    row.name: row
    for row in (
        FewStepPipeline(
            name="Flux2KleinPipeline",
            transformer="Flux2Transformer2DModel",
            vae="AutoencoderKLFlux2",
            schedulers=(FLOW_SCHEDULER,),
            text_dim="joint_attention_dim",
            renoise="ode",
            steps=(4,),
            defaults=Settings(height=1024, width=1024, max_sequence_length=512),
            cell=lambda transformer, vae: 2 * _image_factor(vae),
            sample_shape=_flux2_shape,
            sigmas=_flux2_sigmas,
            student=_flux2_student,
            check=_check_flux2,
            text=TextEncoder(
                classes=_QWEN3,
                tokenizers=_QWEN3_TOKENIZERS,
                layers=(9, 18, 27),
                thinking=False,
                zero_padding=False,
            ),
        ),
        FewStepPipeline(
            name="ZImagePipeline",
            transformer="ZImageTransformer2DModel",
            vae="AutoencoderKL",
            schedulers=(FLOW_SCHEDULER,),
            text_dim="cap_feat_dim",
            renoise="ode",
            steps=(8,),
            defaults=Settings(height=1024, width=1024, max_sequence_length=512),
            cell=lambda transformer, vae: 2 * _image_factor(vae),
            sample_shape=_z_image_shape,
            sigmas=_z_image_sigmas,
            student=None,
            check=_check_z_image,
            text=TextEncoder(classes=_QWEN3, tokenizers=_QWEN3_TOKENIZERS, layers=(-2,), thinking=True),
            mask=True,
        ),
        FewStepPipeline(
            name="WanPipeline",
            transformer="WanTransformer3DModel",
            vae="AutoencoderKLWan",
            schedulers=("UniPCMultistepScheduler", FLOW_SCHEDULER),
            text_dim="text_dim",
            renoise="fresh",
            steps=(1, 2, 4),
            defaults=Settings(height=480, width=832, num_frames=81, max_sequence_length=512),
            cell=lambda transformer, vae: 2 * _wan_factors(vae)[1],
            sample_shape=_wan_shape,
            sigmas=_rcm_sigmas,
            student=None,
            check=_check_wan,
            text=_UMT5,
            objective="rCM or DMD",
        ),
        FewStepPipeline(
            name="AnyFlowPipeline",
            transformer="AnyFlowTransformer3DModel",
            vae="AutoencoderKLWan",
            schedulers=("FlowMapEulerDiscreteScheduler",),
            text_dim="text_dim",
            renoise="ode",
            steps=(4,),
            defaults=Settings(height=480, width=832, num_frames=81, max_sequence_length=512),
            cell=lambda transformer, vae: 2 * _wan_factors(vae)[1],
            sample_shape=_wan_shape,
            sigmas=_flow_map_sigmas,
            student=lambda index: "",
            check=_check_any_flow,
            text=_UMT5,
            flow_map=True,
            objective="flow map (AnyFlow)",
        ),
    )
}
"""Every supported pipeline by its class."""
_ALIASES = {"WanDMDPipeline": "WanPipeline"}
"""Other class names of a pipeline; each implies a few-step student."""
_NO_SIGMAS = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


@dataclass(frozen=True, kw_only=True)
class FewStepFolder:
    """A verified folder.

    Attributes:
        path: The folder.
        row: Its row of the table.
        transformer: Config of the transformer.
        vae: Config of the autoencoder.
        scheduler: Config of the scheduler.
        settings: Settings of the import; zeros are replaced by the pipeline's defaults.
        text_classes: Classes of text encoder and tokenizer; empty if the folder holds none.
    """

    path: Path
    row: FewStepPipeline
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    settings: Settings
    text_classes: tuple[str, ...]

    @property
    def has_text_encoder(self) -> bool:
        """Whether prompts can be encoded."""
        return bool(self.text_classes)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one noise tensor: (C, H, W) for images, (C, T, H, W) for videos."""
        return self.row.sample_shape(self.transformer, self.vae, self.settings)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one output: (3, H, W), or (3, frames, H, W)."""
        frames = (self.settings.num_frames,) if self.settings.num_frames else ()
        return (int(self.vae.get("out_channels", 3)), *frames, self.settings.height, self.settings.width)

    @property
    def conditioning(self) -> tuple[TensorSpec, ...]:
        """The inputs in addition to noise."""
        tokens = self.settings.max_sequence_length
        embeds = TensorSpec(name="prompt_embeds", shape=(tokens, int(self.transformer[self.row.text_dim])))
        mask = TensorSpec(name="prompt_attention_mask", shape=(tokens,), dtype="int64", kind="mask")
        return (embeds, mask) if self.row.mask else (embeds,)

    def spec(
        self,
        num_inference_steps: int = 0,
        *,
        times: tuple[float, ...] | None = None,
        renoise: Renoise | None = None,
        max_batch: int = 8,
    ) -> SamplerSpec:
        """Describe the sampler that ends with the decoder.

        Args:
            num_inference_steps: Number of network calls at the pipeline's times; 0 is its usual number.
            times: Times, radians, instead of it.
            renoise: Noise of the steps after the first; None is the pipeline's rule.
            max_batch: Largest batch.

        Raises:
            ConfigError: If there are no times for that many steps.
        """
        steps = num_inference_steps or self.row.steps[-1]
        if not 1 <= steps <= MAX_STEPS:
            raise ConfigError(f"num_inference_steps is {steps}, expected 1..{MAX_STEPS}.")
        made = times or flow_times(self.row.sigmas(self.scheduler, steps, self.sample_shape))
        return SamplerSpec(
            times=made,
            sample_shape=self.sample_shape,
            sigma_data=1.0,
            output_shape=self.output_shape,
            conditioning=self.conditioning,
            max_batch=max_batch,
            renoise=renoise or self.row.renoise,
        )


def pipeline_class(folder: Path) -> str:
    """Return the class that a pipeline's folder names.

    Raises:
        BundleError: If it is no pipeline of diffusers.
        ConfigError: If its index is no JSON object.
    """
    if not (folder / INDEX_NAME).is_file():
        found = f"has no {INDEX_NAME}" if folder.is_dir() else "is no folder"
        raise BundleError(f"{folder} {found}, expected a pipeline of diffusers. {_REMEDY}")
    return str(read_json(folder / INDEX_NAME, remedy=_REMEDY).get("_class_name"))


def read_few_step_folder(folder: Path, settings: Settings | None = None) -> FewStepFolder:
    """Read and check a folder.

    Args:
        folder: Folder written by ``save_pretrained``, or the same folder in a bundle.
        settings: Settings of the import; None reads ``scm_import.json`` if it exists.

    Raises:
        BundleError: If it is not a pipeline of diffusers, or a component or a shard is missing.
        ConfigError: If the pipeline is not in the table, is the full model of many steps, or has unknown settings.
    """
    kind = pipeline_class(folder)
    row = TABLE.get(_ALIASES.get(kind, kind))
    if row is None:
        raise ConfigError(
            f"{folder} is a {kind!r} of diffusers, expected one of {', '.join((SANA_PIPELINE, *TABLE, *_ALIASES))}. "
            f"{_OWN}"
        )
    index = read_json(folder / INDEX_NAME, remedy=_REMEDY)
    own = folder / SETTINGS_NAME
    if settings is None:
        settings = _settings(own) if own.is_file() else Settings()
    _check_student(folder, row, index, known=kind in _ALIASES or settings.distilled)
    for component, wanted in (("transformer", row.transformer), ("vae", row.vae)):
        if index.get(component) != ["diffusers", wanted]:
            found = "missing" if (index.get(component) or [None])[0] is None else f"{index[component]}"
            raise ConfigError(
                f"component {component!r} of {folder} is {found}, expected diffusers' {wanted}. {_REMEDY}"
            )
        weight_files(folder / component, remedy=_REMEDY)
    transformer, vae = (_component(folder, name, kind) for name, kind in
                        (("transformer", row.transformer), ("vae", row.vae)))  # fmt: skip
    scheduler = _scheduler(folder, row)
    given = {name: value for name, value in msgspec.to_builtins(settings).items() if value}
    settings = msgspec.structs.replace(row.defaults, **given)
    _check_values(folder, row, transformer, vae, index, settings)
    return FewStepFolder(
        path=folder,
        row=row,
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        settings=settings,
        text_classes=_text_classes(folder, row, index),
    )


def _check_student(folder: Path, row: FewStepPipeline, index: Mapping[str, Any], *, known: bool) -> None:
    if row.student is not None:
        if lacks := row.student(index):
            raise ConfigError(
                f"{folder} is the full {row.name}, for about 50 steps with guidance: {lacks}, expected a few-step "
                "student, since its few-step images are blurred. Import the distilled weights."
            )
    elif not known:
        raise ConfigError(
            f"{folder} is a {row.name}, whose folder does not say whether it holds a few-step student or the full "
            "model of about 50 steps, whose few-step images are blurred; expected a student. If it is one, import it "
            "with distilled=True (--distilled)."
        )


def _component(folder: Path, component: str, wanted: str) -> dict[str, Any]:
    path = folder / component / CONFIG_NAME
    if not path.is_file():
        raise BundleError(f"component {component!r} is missing in {folder}: no {path.relative_to(folder)}. {_REMEDY}")
    config = read_json(path, remedy=_REMEDY)
    if (found := config.get("_class_name")) != wanted:
        raise ConfigError(f"{folder / component} holds a {found!r}, expected {wanted!r}. {_REMEDY}")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _scheduler(folder: Path, row: FewStepPipeline) -> dict[str, Any]:
    path = folder / "scheduler" / SCHEDULER_NAME
    if not path.is_file():
        raise BundleError(f"component 'scheduler' is missing in {folder}: no scheduler/{SCHEDULER_NAME}. {_REMEDY}")
    config = read_json(path, remedy=_REMEDY)
    kind = config.get("_class_name")
    if kind not in row.schedulers:
        raise ConfigError(
            f"the scheduler of {folder} is a {kind!r}, expected {' or '.join(row.schedulers)}: these weights predict "
            "the velocity of flow matching."
        )
    if kind == "UniPCMultistepScheduler" and not (
        config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    ):
        raise ConfigError(
            f"the scheduler of {folder} has prediction_type {config.get('prediction_type')!r}, expected "
            "'flow_prediction': these weights predict the velocity of flow matching."
        )
    if changed := [name for name in _NO_SIGMAS if config.get(name)]:
        raise ConfigError(
            f"the scheduler of {folder} has {changed[0]} = {config[changed[0]]!r}, which is not supported, expected "
            "the sigmas of flow matching with a shift."
        )
    if (count := config.get("num_train_timesteps", 1000)) != 1000:
        raise ConfigError(f"the scheduler of {folder} has num_train_timesteps {count}, expected 1000.")
    for name in ("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        if not isinstance(config.get(name, 1.0), int | float) or not 0 < config.get(name, 1.0) < math.inf:
            raise ConfigError(f"the scheduler of {folder} has {name} {config[name]!r}, expected a number above 0.")
    return config


def _settings(path: Path) -> Settings:
    try:
        return msgspec.convert(read_json(path, remedy=_REMEDY), Settings)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path} breaks its config: {exc}. {_REMEDY}") from exc


def _check_values(
    folder: Path, row: FewStepPipeline, transformer: dict[str, Any], vae: dict[str, Any],
    index: Mapping[str, Any], settings: Settings,
) -> None:  # fmt: skip
    wanted = {"transformer": (transformer, ("in_channels", row.text_dim)), "vae": (vae, ())}
    if row.vae != "AutoencoderKLWan":
        blocks = vae.get("block_out_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
            raise ConfigError(f"{folder / 'vae'} has block_out_channels {blocks!r}, expected a list. {_REMEDY}")
    for component, (config, names) in wanted.items():
        for name in names:
            if not isinstance(config.get(name), int) or config[name] < 1:
                raise ConfigError(
                    f"{folder / component} has {name} {config.get(name)!r}, expected 1 or more. {_REMEDY}"
                )
    if min(msgspec.to_builtins(settings).values()) < 0:
        raise ConfigError(f"settings are {settings}, expected numbers of 0 or more.")
    check_limits(height=settings.height, width=settings.width, tokens=settings.max_sequence_length)
    row.check(transformer, vae, index, settings)
    cell = row.cell(transformer, vae)
    if settings.height % cell or settings.width % cell:
        raise ConfigError(
            f"images are {settings.height}x{settings.width} pixels, expected multiples of {cell}, the autoencoder's "
            "and the transformer's cell."
        )
    if not row.defaults.num_frames and settings.num_frames:
        raise ConfigError(f"num_frames is {settings.num_frames}, but {row.name} makes images. Leave it out.")
    if row.defaults.num_frames and (settings.num_frames - 1) % (step := _wan_factors(vae)[0]):
        below = max(settings.num_frames - 1, 0) // step * step + 1
        raise ConfigError(
            f"num_frames is {settings.num_frames}, expected {step} n + 1, such as {below} or {below + step}: a latent "
            f"frame after the first holds {step} frames."
        )


def _text_classes(folder: Path, row: FewStepPipeline, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the classes of text encoder and tokenizer; () if there is none, or one that is not used."""
    names = ("text_encoder", "tokenizer")
    (source, encoder), (_, tokenizer) = (index.get(name) or [None, None] for name in names)
    if source != "transformers" or encoder not in row.text.classes or tokenizer not in row.text.tokenizers:
        return ()
    for name in names:
        if not (folder / name).is_dir():
            raise BundleError(f"component {name!r} is missing in {folder}, which its {INDEX_NAME} names. {_REMEDY}")
    weight_files(folder / "text_encoder", "model.safetensors", remedy=_REMEDY)
    return (encoder, tokenizer)
