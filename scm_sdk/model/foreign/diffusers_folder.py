"""A folder that diffusers saved, as a TrigFlow teacher: the pipeline's, or that of its ``unet`` or ``transformer``.

    model_index.json   scheduler/scheduler_config.json   unet/ or transformer/{config.json, *.safetensors}

or, as the first repositories were saved, with all files in the folder itself.

The scheduler defines what the denoiser predicts and at which noise levels, so it is required in the folder or next to
the folder of the component. The files are untrusted: sizes are limited, names stay in the folder, weights are
safetensors, every tensor is accounted for, and only classes of ``diffusers_models`` are imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
from torch import Tensor, nn

from ...bundle.layout import CONFIG_NAME, INDEX_NAME
from ...errors import BundleError, ConfigError
from ..checkpoint import check_fits, read_tensors, without_wrappers
from ..consistency import ConsistencyModel, ModelConfig
from .component import read_json, weight_files
from .diffusers_models import ClassName, ConventionName, DiffusersConfig

COMPONENTS = ("unet", "transformer")
SCHEDULER_NAME = "scheduler_config.json"
PIXEL_SIGMA, LATENT_SIGMA = 0.5, 1.0
"""Default standard deviation of the data: pixels in [-1, 1], latents scaled by diffusers."""
_VP_SCHEDULERS = {
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
_FLOW_SCHEDULERS = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
_EDM_SCHEDULERS = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
_VP_CONVENTIONS: dict[str, ConventionName] = {
    "epsilon": "vp_noise", "v_prediction": "vp_velocity", "sample": "vp_data",
}  # fmt: skip
_LAST_ALPHA_BAR = 2**-24
_DIVIDES_BY_LAST_ALPHA = {
    "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
}  # fmt: skip
"""Schedulers that replace a terminal alpha_bar of 0 by 2^-24."""
_READ_SETTINGS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "timestep_type", "use_flow_sigmas", "invert_sigmas", "sigma_data",
}  # fmt: skip
"""Settings that define the network; each is read below."""
_SAMPLER_SETTINGS = {
    "algorithm_type", "base_image_seq_len", "base_shift", "clip_sample", "clip_sample_range", "disable_corrector",
    "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type",
    "lambda_min_clipped", "lower_order_final", "max_image_seq_len", "max_shift", "predict_x0", "rho",
    "sample_max_value", "set_alpha_to_one", "shift", "shift_terminal", "sigma_max", "sigma_min", "sigma_schedule",
    "skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "stochastic_sampling",
    "thresholding", "time_shift_type", "timestep_spacing", "use_beta_sigmas", "use_dynamic_shifting",
    "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip
"""Settings of diffusers' samplers: their noise levels, and their changes of the prediction."""
_PREDICTION_CHANGES = ("clip_sample", "thresholding")
"""Settings that change a prediction: the teacher is the network without them, and its provenance names them."""
_REMEDY = "Give the folder that the pipeline's save_pretrained wrote, whole."


def is_diffusers_folder(folder: Path) -> bool:
    """Return whether a folder is a pipeline of diffusers or a supported denoiser."""
    if (folder / INDEX_NAME).is_file():
        return True
    config = folder / CONFIG_NAME
    return config.is_file() and _read_json(config).get("_class_name") in get_args(ClassName)


def load_diffusers(
    folder: str | Path,
    *,
    sigma_data: float | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    text_length: int = 333,
) -> ConsistencyModel:
    """Load a denoiser that diffusers saved as a TrigFlow diffusion model, in evaluation mode.

    Its ``network`` is exactly F: a teacher to distill, or to sample with ``solvers.sample_ode``. ``save_pretrained``
    writes a checkpoint of scm-sdk.

    Args:
        folder: The folder of a pipeline, or of its denoiser with the scheduler's folder next to it.
        sigma_data: Standard deviation of the data; None is 0.5 for a U-Net, 1 for the transformers, which work on
            scaled latents, and that of the scheduler for EDM.
        sample_shape: Shape of one sample, (C, H, W); default: ``sample_size`` of the config.
        text_length: Tokens of an SD3-like model's prompt.

    Raises:
        BackendUnavailable: If diffusers is not installed.
        BundleError: If a component, its config, or a shard is missing, or the weights are not safetensors.
        ConfigError: If the denoiser or the scheduler is not supported.
        IntegrityError: If the weights do not match the config.
    """
    folder = Path(folder)
    component, scheduler = _find(folder)
    config, schedule = _read_json(component / CONFIG_NAME), _read_json(scheduler)
    described = _describe(config, schedule, component, sigma_data, sample_shape, text_length)
    left_out = [name for name in _PREDICTION_CHANGES if schedule.get(name)]
    is_latent = described.sample_shape[0] not in (1, 3)
    model = ConsistencyModel(
        ModelConfig(
            network=described,
            sigma_data=described.sigma_data,
            output="latents" if is_latent else "pixels",
            provenance={
                "source": f"{described.class_name} of {folder.name}",
                "objective": "diffusion",
                "scheduler": str(schedule.get("_class_name")),
                **({"scheduler_settings_not_applied": ", ".join(left_out)} if left_out else {}),
                "license": "other",
                # Guidance needs a "no label" class; diffusers' class-conditional DiT has one.
                **({"label_dropout": "0.1"} if described.has_null_label else {}),
            },
        )
    )
    _load_weights(model.get_submodule("network.denoiser.module"), component)
    return model.eval().requires_grad_(False)


def _load_weights(denoiser: nn.Module, component: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(component, remedy=_REMEDY):
        tensors.update(read_tensors(file))
    tensors = without_wrappers(denoiser, tensors)
    check_fits(denoiser, tensors, f"the weights in {component} do not fit its {CONFIG_NAME}", remedy=_REMEDY)
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    denoiser.load_state_dict(floats)


def _find(folder: Path) -> tuple[Path, Path]:
    """Return the denoiser's folder and the scheduler's config."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder, expected one that diffusers saved. {_REMEDY}")
    component = folder
    if (folder / INDEX_NAME).is_file():
        index = _read_json(folder / INDEX_NAME)
        named = [name for name in COMPONENTS if index.get(name)]
        if len(named) != 1:
            raise ConfigError(
                f"{folder} is a {index.get('_class_name')!r} with {' and '.join(named) or 'none'} of "
                f"{', '.join(COMPONENTS)}, expected one denoiser."
            )
        component = folder / named[0] if (folder / named[0]).is_dir() else folder
    if not (component / CONFIG_NAME).is_file():
        raise BundleError(f"no {CONFIG_NAME} in {component}, expected the denoiser's. {_REMEDY}")
    places = [component / SCHEDULER_NAME, component / "scheduler" / SCHEDULER_NAME]
    if not (component / INDEX_NAME).is_file():  # a folder next to a pipeline belongs to another model
        places.append(component.parent / "scheduler" / SCHEDULER_NAME)
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise BundleError(
            f"no {SCHEDULER_NAME} in {places[-1].parent}, expected it: it alone says what the denoiser "
            f"predicts and at which noise levels. {_REMEDY}"
        )
    return component, scheduler


def _describe(
    config: dict[str, Any],
    scheduler: dict[str, Any],
    where: Path,
    sigma_data: float | None,
    sample_shape: tuple[int, int, int] | None,
    text_length: int,
) -> DiffusersConfig:
    kind = config.get("_class_name")
    if kind not in get_args(ClassName):
        raise ConfigError(
            f"{where} holds a {kind!r}, expected one of {', '.join(get_args(ClassName))}. Wrap another denoiser in "
            "Python: scm_sdk.model.foreign.denoiser.ModuleDenoiser."
        )
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    convention, schedule = _read_scheduler(scheduler)
    continuous = scheduler.get("timestep_type") == "continuous" and convention == "vp_velocity"
    own_sigma = scheduler.get("sigma_data", 0.5) if convention == "edm_network" else None
    if own_sigma is not None and sigma_data not in (None, own_sigma):
        raise ConfigError(
            f"sigma_data is {sigma_data}, expected {own_sigma}: the network's scaling is EDM's with that of its "
            "scheduler."
        )
    sigma = own_sigma or sigma_data or (PIXEL_SIGMA if kind == "UNet2DModel" else LATENT_SIGMA)
    try:
        return msgspec.convert(
            {
                "type": "diffusers",
                "class_name": kind,
                "arguments": arguments,
                "convention": convention,
                "sample_shape": sample_shape or _sample_shape(str(kind), arguments, where),
                "sigma_data": sigma,
                "schedule": schedule,
                "timestep_type": "continuous" if continuous else "discrete",
                "num_train_timesteps": scheduler.get("num_train_timesteps", 1000),
                "text_length": text_length,
            },
            DiffusersConfig,
        )
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where} or its scheduler breaks its config: {exc}. {_REMEDY}") from exc


def _sample_shape(kind: str, arguments: dict[str, Any], where: Path) -> tuple[Any, ...]:
    channels, size = {"UNet2DModel": (3, None), "DiTTransformer2DModel": (4, 32), "SD3Transformer2DModel": (16, 128)}[
        kind
    ]
    size = arguments.get("sample_size", size)
    if size is None:
        raise ConfigError(f"{where} names no sample_size, expected sample_shape=(C, H, W) from you.")
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return (arguments.get("in_channels", channels), *sides)


def _read_scheduler(config: dict[str, Any]) -> tuple[ConventionName, dict[str, Any] | None]:
    kind = config.get("_class_name")
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = [name for name, value in settings.items() if value and name not in _READ_SETTINGS | _SAMPLER_SETTINGS]
    if kind in _FLOW_SCHEDULERS | _EDM_SCHEDULERS | _VP_SCHEDULERS and unknown:
        raise ConfigError(
            f"the {kind} has {unknown[0]} = {settings[unknown[0]]!r}, a setting that is not known here and may change "
            "what the network predicts or at which noise levels. Wrap the module manually, with ModuleDenoiser."
        )
    if (times := config.get("timestep_type", "discrete")) not in ("discrete", "continuous"):
        raise ConfigError(f"the {kind} has timestep_type {times!r}, expected 'discrete' or 'continuous'.")
    if kind in _FLOW_SCHEDULERS:
        if config.get("invert_sigmas"):
            raise ConfigError(f"the {kind} has invert_sigmas, expected u = 1 to be noise. Wrap the module manually.")
        return "flow", None
    predicts = config.get("prediction_type", "epsilon")
    if kind in _EDM_SCHEDULERS:
        if predicts != "epsilon":
            raise ConfigError(f"the {kind} has prediction_type {predicts!r}, expected 'epsilon', which is EDM's own.")
        return "edm_network", None
    if kind not in _VP_SCHEDULERS:
        known = ", ".join(sorted(_VP_SCHEDULERS | _FLOW_SCHEDULERS | _EDM_SCHEDULERS))
        raise ConfigError(f"the scheduler is a {kind!r}, expected one of {known}.")
    if predicts == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow", None
    if predicts not in _VP_CONVENTIONS:
        raise ConfigError(f"the {kind} has prediction_type {predicts!r}, expected one of {', '.join(_VP_CONVENTIONS)}.")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    schedule = {name: config[name] for name in (*names, "rescale_betas_zero_snr") if config.get(name) is not None}
    if schedule.get("rescale_betas_zero_snr") and kind in _DIVIDES_BY_LAST_ALPHA:
        schedule["last_alpha_bar"] = _LAST_ALPHA_BAR
    return _VP_CONVENTIONS[predicts], schedule


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, remedy=_REMEDY)
