"""Custom networks: the protocol, the registry, and their names in checkpoints.

A network is any ``torch.nn.Module`` with ``forward(x, t, **conditioning) -> F`` (``Network`` below), of any rank:

    @register_network("waves")
    class Waves(nn.Module): ...

    model = ConsistencyModel(network=Waves(), sigma_data=0.5, sample_shape=(1, 256))

A checkpoint holds weights and a name, never code. To load it, register the class under this name, in the process
(``register_network``) or by an entry point of an installed package in the group ``scm_sdk.networks``, or pass the
module (``ConsistencyModel.from_pretrained(folder, network=Waves())``). Graphs and engines do not need the class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec
from torch import Tensor, nn

from ...errors import ConfigError
from ...spec import TensorSpec
from ..bounds import check_bounds
from ..registry import Factory, Registry

NETWORKS = Registry("network", "scm_sdk.networks")


class Network(Protocol):
    """Requirements of a network F. ``scm_sdk.export.check.check_model`` names the violated one and its source line.

    * Samples of a batch are independent: no batch norm in training mode, no fixed batch size.
    * F is a smooth function of ``t``; continuous-time distillation also needs forward-mode derivatives: write attention
      as MatMul and Softmax, because the fused kernels have none.
    * The operators do not depend on tensor values: no ``if`` on a tensor, no ``.item()``.
    * Sines, cosines and exponentials only of the time, which is a constant of each step of a graph; in half precision
      they would be inaccurate.
    """

    def __call__(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        """Return F, like ``x``, unitless.

        Args:
            x: Noisy samples divided by ``sigma_data``, (B, *sample_shape), float32: variance 1 at every time.
            t: Times, (B,), float32, radians in [0, pi/2]: 0 is data, pi/2 is noise.
            **conditioning: By name, axis 0 is the batch: ``class_labels`` (B,) int64 if there are classes, ``r`` (B,)
                if it is a flow map (the time that the step leads to, radians, one for each step), then custom inputs.
                Training may pass labels as the third argument, and the label ``num_classes`` for "no label".
        """
        ...


class OwnConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="own"):
    """Config of a custom network in a checkpoint.

    Attributes:
        name: Registered name; the class name if it is not registered.
        sample_shape: Shape of one sample, without the batch axis; any rank.
        arguments: Arguments of the registered factory; JSON values.
        num_classes: Number of class labels; 0 for none.
        conditioning: Inputs in addition to x, t, class_labels and guidance_scale.
        guidance: Whether it takes ``guidance_scale`` (B,) float32.
        flow_map: Whether it takes ``r`` (B,) float32, the time that a step leads to, radians.
        dropout: Always 0: a custom network sets its own dropout.
    """

    name: str
    sample_shape: tuple[int, ...]
    arguments: dict[str, Any] = {}
    num_classes: int = 0
    conditioning: tuple[TensorSpec, ...] = ()
    guidance: bool = False
    flow_map: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.sample_shape or min(self.sample_shape) < 1:
            raise ConfigError(f"sample_shape is {self.sample_shape}, expected at least one axis, all >= 1.")
        check_bounds(self)
        if self.dropout:
            raise ConfigError(f"dropout is {self.dropout} for your own network, expected 0: set it in the network.")


def register_network(name: str) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a class, or a function that returns a module, under a name.

    Args:
        name: Name in checkpoints, preferably with the package name as a prefix.

    Raises:
        ConfigError: If another network has this name.
    """
    return NETWORKS.register(name)


def own_config(
    network: nn.Module,
    *,
    sample_shape: tuple[int, ...],
    name: str = "",
    arguments: dict[str, Any] | None = None,
    num_classes: int = 0,
    conditioning: tuple[TensorSpec, ...] = (),
    guidance: bool = False,
    flow_map: bool = False,
) -> OwnConfig:
    """Return the config of a module; ``ConsistencyModel(network=...)`` passes these arguments.

    Args:
        network: The module.
        sample_shape: Shape of one sample, without the batch axis; any rank.
        name: Name of its factory; default: by the class of the module.
        arguments: Arguments of the factory; JSON values.
        num_classes: Number of class labels; 0 for none.
        conditioning: Inputs in addition to x, t, class_labels and guidance_scale.
        guidance: Whether it takes ``guidance_scale``.
        flow_map: Whether it takes ``r``, the time that a step leads to.
    """
    return OwnConfig(
        name=name or NETWORKS.name_of(unwrapped(network)),
        sample_shape=tuple(sample_shape),
        arguments=dict(arguments or {}),
        num_classes=num_classes,
        conditioning=tuple(conditioning),
        guidance=guidance,
        flow_map=flow_map,
    )


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper of ``torch.compile`` or data parallelism; None if it is not a wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return cast(nn.Module, module.module)
    inner = module._modules.get("_orig_mod")  # importing the class of torch.compile's wrapper takes seconds
    return inner


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers of ``wrapped_module``."""
    while (inner := wrapped_module(module)) is not None:
        module = inner
    return module


def make_own_network(config: OwnConfig) -> nn.Module:
    """Call the factory that a config names.

    Raises:
        ConfigError: If the name is not registered, or the factory refuses the arguments.
    """
    return NETWORKS.make(config.name, config.arguments)
