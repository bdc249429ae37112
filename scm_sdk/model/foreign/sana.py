"""SANA-Sprint as a consistency model: its transformer is F, its autoencoder the decoder.

The transformer predicts the velocity v of flow matching on latents l; TrigFlow's data is ``x_0 = sigma_data * l``. With
``s = sin t / (cos t + sin t)`` the flow's time,

    u = (x_t / sigma_data) sqrt(s^2 + (1 - s)^2)            input of the transformer
    v = transformer(u, s, guidance_scale * 0.1, prompt)
    F = ((1 - 2 s) u + (1 - 2 s + 2 s^2) v) / sqrt(s^2 + (1 - s)^2)

and the sampler is that of scm-sdk. Weights and modules are those of diffusers and run in float32; reduced precisions
are made from the float32 graph.

Source: arXiv 2503.09641, section 3.1; the exactness of the conversion is that of ``model.conversions.SANA``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..._util.json_struct import to_json
from ..._util.lazy import require
from ...spec import Renoise, SamplerSpec
from ..consistency import ConsistencyModel, ModelConfig
from ..decoder import Decoder, Encoder, LatentScale
from ..networks.custom import OwnConfig
from .component import copy_pipeline
from .component_module import load_component
from .linear_attention import guard_autoencoder, guard_transformer
from .sana_folder import SanaFolder, Settings, read_sana_folder

PURPOSE = "a SANA-Sprint model"


class _FlowInput(nn.Module):
    """u of x; a module, so that its nodes have its name in a graph and stay in float32."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        s = s.reshape(-1, 1, 1, 1)
        return x * torch.sqrt(s**2 + (1 - s) ** 2)


class _FlowOutput(nn.Module):
    """F of u and v; a module for the same reason."""

    def forward(self, u: Tensor, v: Tensor, s: Tensor) -> Tensor:
        s = s.reshape(-1, 1, 1, 1)
        return ((1 - 2 * s) * u + (1 - 2 * s + 2 * s**2) * v) / torch.sqrt(s**2 + (1 - s) ** 2)


class SanaNetwork(nn.Module):
    """The transformer as a TrigFlow network F(x, t, guidance_scale, prompt).

    Args:
        transformer: A ``SanaTransformer2DModel`` with guidance embedding.
        guidance_embeds_scale: Factor of the guidance scale before it is embedded.
    """

    def __init__(self, transformer: nn.Module, guidance_embeds_scale: float = 0.1) -> None:
        super().__init__()
        self.transformer = transformer
        self.flow_input, self.flow_output = _FlowInput(), _FlowOutput()
        self.guidance_embeds_scale = guidance_embeds_scale

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        guidance_scale: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
    ) -> Tensor:
        """Return F, like ``x``.

        Args:
            x: Noisy latents divided by ``sigma_data``, (B, C, H, W).
            t: Times, (B,), radians.
            guidance_scale: (B,), for example 4.5.
            prompt_embeds: Output of the text encoder, (B, L, D).
            prompt_attention_mask: 1 for tokens and 0 for padding, (B, L), int64.
        """
        s = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        u = self.flow_input(x, s)
        (v,) = self.transformer(
            u,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=prompt_attention_mask,
            timestep=s,
            guidance=guidance_scale * self.guidance_embeds_scale,
            return_dict=False,
        )
        F: Tensor = self.flow_output(u, v, s)
        return F


class SanaModel(ConsistencyModel):
    """A SANA-Sprint pipeline without its text encoder, as input of the sampler, the exporter and the backends.

    Args:
        folder: The source folder; its configs define the shapes.
        transformer: The transformer.
        decode: The decoder of the autoencoder: latents to pixels.
        encode: Its encoder: pixels to latents; None for samplers that start from noise.

    Attributes:
        folder: The source folder.
        keep_text_encoder: Whether ``save_pretrained`` also copies an existing text encoder.
    """

    islands = ("@delicate", "step*/flow*")

    def __init__(
        self, folder: SanaFolder, transformer: nn.Module, decode: nn.Module, encode: nn.Module | None = None
    ) -> None:
        described = OwnConfig(
            name="sana-sprint", sample_shape=folder.sample_shape, conditioning=folder.conditioning, guidance=True
        )
        spec = folder.spec()
        config = ModelConfig(network=described, sigma_data=spec.sigma_data, mid_time=spec.mid_time)
        super().__init__(config, SanaNetwork(transformer, folder.transformer.guidance_embeds_scale))
        self.folder = folder
        self.keep_text_encoder = True
        factor = 1 / (spec.sigma_data * float(folder.vae["scaling_factor"]))
        self.decoder = Decoder(decode, LatentScale(scale=(factor,), shift=(0.0,)), spec.image_shape)
        if encode is not None:
            self.encoder = Encoder(encode, self.decoder.latents, spec.image_shape, folder.sample_shape)

    def spec(
        self,
        num_inference_steps: int = 2,
        *,
        times: tuple[float, ...] | None = None,
        renoise: Renoise | None = None,
        max_batch: int = 8,
    ) -> SamplerSpec:
        """Describe the sampler that ends with the decoder, by default with diffusers' times."""
        return self.folder.spec(num_inference_steps, times=times, renoise=renoise or "fresh", max_batch=max_batch)

    def at_size(self, height: int, width: int) -> SanaModel:
        """Return the model for images of another size, pixels, with the same modules and without an encoder.

        Raises:
            ConfigError: If the size is no multiple of a cell, or too large.
        """
        assert isinstance(self.network, SanaNetwork) and self.decoder is not None, "made so"
        settings = msgspec.structs.replace(self.folder.settings, height=height, width=width)
        found = read_sana_folder(self.folder.path, settings)
        return SanaModel(found, self.network.transformer, self.decoder.module).eval()

    def check_reopens(self) -> None:
        """Do nothing: every part is created from the configs of the pipeline."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files of the pipeline and write the settings of the import next to them."""
        copy_sana_folder(self.folder, Path(folder), text_encoder=self.keep_text_encoder)


def load_sana(folder: str | Path, settings: Settings | None = None, *, encoder: bool = False) -> SanaModel:
    """Load transformer and decoder of a SANA-Sprint folder, float32, evaluation mode, on the CPU.

    Args:
        folder: Folder that diffusers saved.
        settings: Image size and prompt tokens; None reads the settings of an import, if any.
        encoder: Whether to load the encoder of the autoencoder, too.

    Raises:
        BackendUnavailable: If diffusers is not installed.
        ConfigError: If the folder is another pipeline, or a config has unknown settings.
        BundleError: If a component or a shard is missing.
        IntegrityError: If weights are truncated or do not match their config.
    """
    found = read_sana_folder(Path(folder), settings)
    diffusers = require("diffusers", extra="diffusers", purpose=PURPOSE)
    transformer = load_component(
        diffusers.SanaTransformer2DModel, msgspec.to_builtins(found.transformer), found.path / "transformer"
    )
    parts = ("decoder", "encoder") if encoder else ("decoder",)
    vae = load_component(
        diffusers.AutoencoderDC, _public(found.vae), found.path / "vae", keep=tuple(f"{p}." for p in parts)
    )
    guard_transformer(transformer)
    guard_autoencoder(vae)
    return SanaModel(found, transformer, *map(vae.get_submodule, parts)).eval().requires_grad_(False)


def copy_sana_folder(source: SanaFolder, target: Path, *, text_encoder: bool = True) -> None:
    """Copy the files of the pipeline, without unrelated files.

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
    )


def _public(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}
