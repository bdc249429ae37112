"""Bounds of config fields, so that a malformed file raises an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError

BOUNDS: dict[str, tuple[float, float]] = {
    "image_size": (1, 2**14),
    "in_channels": (1, 2**12),
    "channels": (1, 2**16),
    "channel_mult": (1, 2**6),
    "num_blocks": (1, 2**6),
    "depth": (1, 2**9),
    "mlp_ratio": (1, 2**6),
    "head_channels": (1, 2**16),
    "patch_size": (1, 2**10),
    "num_classes": (0, 2**24),
    "sample_shape": (1, 2**30),
    "layers_per_block": (1, 2**6),
    "num_layers": (1, 2**9),
    "norm_num_groups": (1, 2**16),
    "attention_head_dim": (1, 2**16),
    "num_attention_heads": (1, 2**16),
    "text_length": (1, 2**16),
    "num_train_timesteps": (1, 2**20),
    "num_cross_attention_heads": (1, 2**16),
    "cross_attention_head_dim": (1, 2**16),
    "encoder_block_out_channels": (1, 2**16),
    "decoder_block_out_channels": (1, 2**16),
    "encoder_layers_per_block": (0, 2**6),
    "decoder_layers_per_block": (0, 2**6),
    "sigma_data": (1e-6, 1e6),
    "time_max_period": (1.0, 1e12),
    "time_fourier_scale": (0.0, 1e6),
}
"""Lowest and highest value of each config field or diffusers argument, and of each entry of a sequence."""
MAX_ENTRIES = 16
"""Maximum number of entries of a sequence field."""
MAX_SAMPLE = 2**30
"""Maximum number of elements of one sample."""
MAX_PARAMETERS = 2**34
"""Maximum number of parameters of a network; ten times the largest preset."""


class _Config(Protocol):
    __struct_fields__: ClassVar[tuple[str, ...]]

    @property
    def sample_shape(self) -> tuple[int, ...]: ...


def check_bounds(config: _Config) -> None:
    """Refuse a config with a field out of its bounds.

    Args:
        config: A msgspec struct; its fields in ``BOUNDS`` and its ``sample_shape`` are checked.

    Raises:
        ConfigError: If a number is out of bounds or not finite; the message names the field.
    """
    for name in config.__struct_fields__:
        check_bound(name, getattr(config, name))
    shape = config.sample_shape
    if math.prod(shape) > MAX_SAMPLE:
        raise ConfigError(f"sample_shape is {shape}, {math.prod(shape)} numbers, expected at most {MAX_SAMPLE}.")


def check_bound(name: str, value: object) -> None:
    """Refuse a value out of the bounds of ``name``, if ``BOUNDS`` has it; see ``check_bounds``."""
    if name not in BOUNDS:
        return
    low, high = BOUNDS[name]
    numbers = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(numbers) <= MAX_ENTRIES:
        raise ConfigError(f"{name} holds {len(numbers)} numbers, expected 1 to {MAX_ENTRIES}.")
    if not all(isinstance(number, int | float) and low <= number <= high for number in numbers):
        raise ConfigError(f"{name} is {value}, expected {low} to {high}.")


def check_num_parameters(make: Callable[[], nn.Module]) -> None:
    """Refuse a network with more than ``MAX_PARAMETERS``, before it takes memory.

    Args:
        make: Returns the network; called on the meta device, which allocates no memory.

    Raises:
        ConfigError: If the network has more parameters.
    """
    with on_meta():
        found = sum(parameter.numel() for parameter in make().parameters())
    if found > MAX_PARAMETERS:
        raise ConfigError(
            f"the network has {found} parameters, expected at most {MAX_PARAMETERS}. Make it narrower or take fewer "
            "blocks."
        )


class _Uninitialized(TorchFunctionMode):
    """Skips random initial values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor that an initialization would fill or make; call all other functions."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)


_RANDOM = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_"}


@contextmanager
def on_meta() -> Iterator[None]:
    """Create modules on the meta device: they have shapes, but neither memory nor values.

    Random values of meta tensors would be computed by PyTorch's decompositions, which import its compiler: 1 to 3
    seconds of each process that loads a checkpoint.
    """
    with torch.device("meta"), _Uninitialized():
        yield
