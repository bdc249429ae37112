"""Named networks: functions that return a config."""

from __future__ import annotations

from collections.abc import Callable

from ..consistency import NetworkConfig
from .ddpmpp import DDPMppConfig
from .edm2 import EDM2Config
from .transformer import TransformerConfig
from .unet import UNetConfig


def pixels16(num_classes: int = 0, in_channels: int = 3) -> UNetConfig:
    """16x16 pixel art: 1.5M parameters, trained on two CPU cores in about two hours.

    Squares of 2x2 pixels are folded into channels, so that the trunk works on 8x8 and 4x4 maps, which are efficient on
    a CPU. The parts of an avatar have fixed positions, hence ``learned_position``.
    """
    return UNetConfig(
        image_size=16,
        in_channels=in_channels,
        channels=48,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(8, 4),
        patch_size=2,
        num_classes=num_classes,
        learned_position=True,
        time_max_period=10.0,
    )


def avatars16(num_classes: int = 0, in_channels: int = 3) -> TransformerConfig:
    """16x16 pixel art: a transformer of 1.9M parameters over 4x4 patches.

    On a CPU a training step takes two thirds of the time of ``pixels16`` (192 vs 290 ms), and small noise is removed
    more accurately after the same number of steps.
    """
    return TransformerConfig(
        image_size=16,
        in_channels=in_channels,
        num_classes=num_classes,
        time_max_period=10.0,
    )


def pixels32(num_classes: int = 0, in_channels: int = 3) -> UNetConfig:
    """32x32 images, for example Fashion-MNIST: 6M parameters."""
    return UNetConfig(
        image_size=32,
        in_channels=in_channels,
        channels=64,
        channel_mult=(1, 2, 3),
        num_blocks=1,
        attention_resolutions=(8, 4),
        patch_size=2,
        num_classes=num_classes,
        time_max_period=10.0,
    )


def tiny(num_classes: int = 0, image_size: int = 8, in_channels: int = 1) -> UNetConfig:
    """8x8 digits: 0.1M parameters, for tests."""
    return UNetConfig(
        image_size=image_size,
        in_channels=in_channels,
        channels=24,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(image_size // 2,),
        num_classes=num_classes,
        head_channels=24,
        time_max_period=10.0,
    )


def cifar10(num_classes: int = 0, in_channels: int = 3) -> DDPMppConfig:
    """The paper's network for CIFAR-10, 32x32 images, unconditional: DDPM++, 60.1M parameters.

    Without double normalization 55.7M.
    """
    return DDPMppConfig(image_size=32, num_classes=num_classes, in_channels=in_channels)


def imagenet64_s(num_classes: int = 1000, in_channels: int = 3) -> EDM2Config:
    """64x64 pixels as the paper trains ImageNet: EDM2-S, 293.9M parameters (280.2M without double normalization)."""
    return EDM2Config(channels=192, num_classes=num_classes, in_channels=in_channels)


def imagenet64_m(num_classes: int = 1000, in_channels: int = 3) -> EDM2Config:
    """64x64 pixels: EDM2-M, 522.2M parameters (497.8M without double normalization)."""
    return EDM2Config(channels=256, num_classes=num_classes, in_channels=in_channels)


def imagenet64_l(num_classes: int = 1000, in_channels: int = 3) -> EDM2Config:
    """64x64 pixels: EDM2-L, 815.6M parameters (777.5M without double normalization)."""
    return EDM2Config(channels=320, num_classes=num_classes, in_channels=in_channels)


def imagenet64_xl(num_classes: int = 1000, in_channels: int = 3) -> EDM2Config:
    """64x64 pixels: EDM2-XL, 1174.1M parameters (1119.3M without double normalization)."""
    return EDM2Config(channels=384, num_classes=num_classes, in_channels=in_channels)


def imagenet512_s(num_classes: int = 1000, in_channels: int = 4, guidance: bool = False) -> EDM2Config:
    """512x512 pictures as 64x64 latents of 4 channels: EDM2-S.

    With ``guidance`` the network takes the guidance scale as an input, as the student of a guided teacher.
    """
    return EDM2Config(channels=192, num_classes=num_classes, in_channels=in_channels, guidance=guidance)


def imagenet512_m(num_classes: int = 1000, in_channels: int = 4, guidance: bool = False) -> EDM2Config:
    """512x512 pictures as latents: EDM2-M, see ``imagenet512_s``."""
    return EDM2Config(channels=256, num_classes=num_classes, in_channels=in_channels, guidance=guidance)


def imagenet512_l(num_classes: int = 1000, in_channels: int = 4, guidance: bool = False) -> EDM2Config:
    """512x512 pictures as latents: EDM2-L, see ``imagenet512_s``."""
    return EDM2Config(channels=320, num_classes=num_classes, in_channels=in_channels, guidance=guidance)


def imagenet512_xl(num_classes: int = 1000, in_channels: int = 4, guidance: bool = False) -> EDM2Config:
    """512x512 pictures as latents: EDM2-XL, see ``imagenet512_s``."""
    return EDM2Config(channels=384, num_classes=num_classes, in_channels=in_channels, guidance=guidance)


def imagenet512_xxl(num_classes: int = 1000, in_channels: int = 4, guidance: bool = False) -> EDM2Config:
    """512x512 pictures as latents: EDM2-XXL, 1597.8M parameters (1523.2M without double normalization)."""
    return EDM2Config(channels=448, num_classes=num_classes, in_channels=in_channels, guidance=guidance)


PRESETS: dict[str, Callable[..., NetworkConfig]] = {
    preset.__name__: preset
    for preset in (
        avatars16,
        pixels16,
        pixels32,
        tiny,
        cifar10,
        imagenet64_s,
        imagenet64_m,
        imagenet64_l,
        imagenet64_xl,
        imagenet512_s,
        imagenet512_m,
        imagenet512_l,
        imagenet512_xl,
        imagenet512_xxl,
    )
}
