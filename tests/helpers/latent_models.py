"""A latent model of a user: a tiny U-Net on latents and a registered decoder."""

import torch
from torch import nn

from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.decoder import Decoder, LatentScale, register_decoder
from scm_sdk.model.networks.presets import tiny

SCALE = LatentScale(scale=(2.0, 0.5), shift=(0.25, -1.0))


@register_decoder("tests/pictures")
class Pictures(nn.Module):
    """4x4 latents to pictures of 8x8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 3, 1, 1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(width, 3, 3, 1, 1)
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(latents)
        return out


def latent_model(module: nn.Module | None = None, **changes: object) -> ConsistencyModel:
    """Return the model; ``changes`` are arguments of its ``Decoder``."""
    torch.manual_seed(0)
    decoder = Decoder(module or Pictures(4), SCALE, (3, 8, 8), **({"arguments": {"width": 4}} | changes))  # type: ignore[arg-type]
    model = ConsistencyModel(ModelConfig(network=tiny(image_size=4, in_channels=2), output="latents"), decoder=decoder)
    for parameter in model.network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)
