"""Named networks: functions that return a config."""

from __future__ import annotations

from collections.abc import Callable

from .consistency import NetworkConfig
from .transformer import TransformerConfig
from .unet import UNetConfig


def pixels16(num_classes: int = 0, in_channels: int = 3) -> UNetConfig:
    """16x16 pixel art: 1.5M parameters, trained on two CPU cores in about two hours.

    Squares of 2x2 pixels are folded into channels, so that the trunk works on 8x8 and 4x4 maps that
    keep a CPU's matrix units busy. The parts of an avatar have fixed places: hence ``learned_position``.
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

    On a CPU a training step takes two thirds of ``pixels16``'s time (192 against 290 ms), and after as many steps
    small noise is removed more exactly.
    """
    return TransformerConfig(
        image_size=16,
        in_channels=in_channels,
        num_classes=num_classes,
        time_max_period=10.0,
    )


def pixels32(num_classes: int = 0, in_channels: int = 3) -> UNetConfig:
    """32x32 pictures, Fashion-MNIST for one: 6M parameters."""
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
    """8x8 digits: 0.1M parameters, for tests and first tries."""
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


PRESETS: dict[str, Callable[..., NetworkConfig]] = {
    "avatars16": avatars16,
    "pixels16": pixels16,
    "pixels32": pixels32,
    "tiny": tiny,
}
