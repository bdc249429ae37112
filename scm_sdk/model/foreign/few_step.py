"""Few-step flow pipelines of diffusers as consistency models: the transformer is F, the autoencoder the decoder.

``few_step_folder`` has the table of pipelines, ``few_step_networks`` their modules. The transformer predicts the
velocity of flow matching on latents of standard deviation 1; ``model.conversions.FLOW`` makes it F, exactly. Weights
run in float32; reduced precisions are made from the float32 graph.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from torch import nn

from ..._util.json_struct import to_json
from ..._util.lazy import require
from ...errors import ConfigError, IntegrityError
from ...spec import Renoise, SamplerSpec
from ..consistency import ConsistencyModel, ModelConfig
from ..conversions import FLOW
from ..decoder import Decoder, FrameDecoder, LatentScale
from ..networks.custom import OwnConfig
from .component import CONFIG_SUFFIXES, copy_pipeline, weight_files
from .component_module import load_component
from .denoiser import ModuleDenoiser, TrigFlowNetwork
from .diffusers_models import make_tractable
from .few_step_folder import FewStepFolder, Settings, read_few_step_folder
from .few_step_networks import NETWORKS, ImageDecoder, WanDecoder, WanFrame

DECODER_WEIGHTS = ("decoder.", "post_quant_conv.", "bn.")
"""Prefixes of an autoencoder's weights that decoding needs."""
SLA_WEIGHT = "proj_l"
"""Name in sparse-linear attention (SLA, arXiv 2509.24006), which plain attention does not replace."""


class FewStepModel(ConsistencyModel):
    """A pipeline without its text encoder, as input of the sampler, the exporter and the backends.

    Args:
        folder: The source folder; its configs define the shapes.
        network: The denoiser: latents, flow time and prompt to the velocity.
        decoder: The decoder with its scale.

    Attributes:
        folder: The source folder.
        keep_text_encoder: Whether ``save_pretrained`` also copies an existing text encoder.
    """

    islands = ("@delicate",)

    def __init__(self, folder: FewStepFolder, network: nn.Module, decoder: Decoder) -> None:
        described = OwnConfig(
            name=folder.row.name,
            sample_shape=folder.sample_shape,
            conditioning=folder.conditioning,
            flow_map=folder.row.flow_map,
        )
        made = TrigFlowNetwork(ModuleDenoiser(network, FLOW), sigma_data=1.0)
        super().__init__(ModelConfig(network=described, sigma_data=1.0), made, decoder)
        self.folder = folder
        self.keep_text_encoder = True
        if folder.settings.frame_decoder:
            self.frame_decoder = _frame_decoder(folder, decoder)

    def spec(
        self,
        num_inference_steps: int = 0,
        *,
        times: tuple[float, ...] | None = None,
        renoise: Renoise | None = None,
        max_batch: int = 8,
    ) -> SamplerSpec:
        """Describe the sampler that ends with the decoder, by default with the pipeline's times and re-noise rule."""
        return self.folder.spec(num_inference_steps, times=times, renoise=renoise, max_batch=max_batch)

    def at_size(self, height: int, width: int) -> FewStepModel:
        """Return the model for another size, pixels, with the same weights.

        Raises:
            ConfigError: If the size is no multiple of a cell, or too large.
        """
        assert isinstance(self.network, TrigFlowNetwork) and self.decoder is not None, "made so"
        settings = msgspec.structs.replace(self.folder.settings, height=height, width=width)
        found = read_few_step_folder(self.folder.path, settings)
        transformer: Any = self.network.get_submodule("denoiser.module.transformer")
        kept = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
        network = NETWORKS[found.row.name](deepcopy(transformer, kept), found)  # which sets constants of the size
        decoder = Decoder(self.decoder.module, self.decoder.latents, found.output_shape)
        return FewStepModel(found, network, decoder).eval().requires_grad_(False)

    def check_reopens(self) -> None:
        """Do nothing: every part is created from the configs of the pipeline."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files of the pipeline and write the settings of the import next to them."""
        copy_few_step_folder(self.folder, Path(folder), text_encoder=self.keep_text_encoder)


def load_few_step(folder: str | Path, settings: Settings | None = None) -> FewStepModel:
    """Load transformer and decoder of a pipeline in the table, float32, evaluation mode, on the CPU.

    Args:
        folder: Folder that diffusers saved.
        settings: Size, frames and prompt tokens; None reads the settings of an import, if any.

    Raises:
        BackendUnavailable: If diffusers is not installed.
        ConfigError: If the folder is another pipeline, the full model, or has another variant's settings.
        BundleError: If a component or a shard is missing.
        IntegrityError: If weights are truncated or do not match their config.
    """
    found = read_few_step_folder(Path(folder), settings)
    diffusers = require("diffusers", extra="diffusers", purpose=f"a {found.row.name}")
    _refuse_sla(found.path / "transformer")
    transformer = load_component(
        getattr(diffusers, found.row.transformer), found.transformer, found.path / "transformer"
    )
    vae: Any = load_component(getattr(diffusers, found.row.vae), found.vae, found.path / "vae", keep=DECODER_WEIGHTS)
    for module in (transformer, vae):
        make_tractable(module)
    network = NETWORKS[found.row.name](transformer, found)
    return FewStepModel(found, network, _decoder(found, vae)).eval().requires_grad_(False)


def _decoder(folder: FewStepFolder, vae: Any) -> Decoder:
    config = folder.vae
    if folder.row.vae == "AutoencoderKLWan":
        scale = LatentScale.of_data(config["latents_mean"], config["latents_std"], sigma_data=1.0)
        return Decoder(WanDecoder(vae), scale, folder.output_shape)
    if folder.row.vae == "AutoencoderKLFlux2":
        variance = vae.bn.running_var.double() + float(config.get("batch_norm_eps", 1e-4))
        mean, std = vae.bn.running_mean.tolist(), variance.sqrt().tolist()
        return Decoder(
            ImageDecoder(vae, patches=2), LatentScale.of_data(mean, std, sigma_data=1.0), folder.output_shape
        )
    scale = LatentScale(scale=(1 / float(config["scaling_factor"]),), shift=(float(config.get("shift_factor") or 0),))
    return Decoder(ImageDecoder(vae), scale, folder.output_shape)


def _frame_decoder(folder: FewStepFolder, decoder: Decoder) -> FrameDecoder:
    shape = folder.sample_shape
    if not isinstance(decoder.module, WanDecoder) or shape[1] < 2:
        found = f"a clip of {folder.settings.num_frames} frame" if len(shape) == 4 else "images"
        raise ConfigError(
            f"a frame decoder is asked for, but this {folder.row.name} makes {found}, expected a clip of more frames. "
            "Leave --frame-decoder out."
        )
    frame = WanFrame(decoder, shape)
    return FrameDecoder(
        module=frame, sample_shape=shape, output_shape=decoder.output_shape, cache_shapes=frame.cache_shapes
    )


def _refuse_sla(folder: Path) -> None:
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if SLA_WEIGHT in name.split(".")]  # noqa: SIM118
        except (SafetensorError, OSError) as exc:
            raise IntegrityError(f"{file} is truncated or no safetensors file ({exc}). Copy it again.") from exc
        refuse_sla_names(names, file)


def refuse_sla_names(names: list[str], where: Path) -> None:
    """Refuse weights of sparse-linear attention.

    Raises:
        ConfigError: If there are any; it names the first.
    """
    if names:
        raise ConfigError(
            f"{where} holds {names[0]!r}, a weight of sparse-linear attention (SLA, as in TurboDiffusion), expected "
            "Wan's plain attention: without SLA such weights are wrong. Take a student without it, such as rCM's."
        )


def copy_few_step_folder(source: FewStepFolder, target: Path, *, text_encoder: bool = True) -> None:
    """Copy the files of a pipeline, without unrelated files.

    Args:
        source: A verified folder.
        target: Target folder; created if missing.
        text_encoder: Whether to copy the text encoder; without it the copy takes embeddings only.

    Raises:
        BundleError: If the files cannot be written.
    """
    copy_pipeline(
        source.path,
        target,
        text_encoder=text_encoder and source.has_text_encoder,
        settings=to_json(msgspec.to_builtins(source.settings)),
        suffixes=(*CONFIG_SUFFIXES, ".jinja"),
    )
