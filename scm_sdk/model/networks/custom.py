"""Networks of your own: the protocol, the registry, and how a checkpoint names its class.

A network is any ``torch.nn.Module`` with ``forward(x, t, **conditioning) -> F`` (``Network`` below), of any rank:

    @register_network("waves")
    class Waves(nn.Module): ...

    model = ConsistencyModel(network=Waves(), sigma_data=0.5, sample_shape=(1, 256))

A checkpoint holds weights and a name, never code. Whoever loads it has the class registered under that name, in this
process (``register_network``) or by an installed package's entry point of the group ``scm_sdk.networks``, or gives the
module itself (``ConsistencyModel.from_pretrained(folder, network=Waves())``). Graphs and engines need none of that.
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
    """What the SDK asks of a network F. ``scm_sdk.export.check.check_model`` says which of it fails, and where.

    * Each sample of a batch on its own: no batch norm in training mode, no fixed batch size.
    * A smooth function of ``t``, in forward-mode derivatives too where it is distilled in continuous time: attention as
      MatMul and Softmax, since the fused kernels have none.
    * The same operators whatever the inputs hold: no ``if`` on a tensor's value, no ``.item()``.
    * Sines, cosines, exponentials of the time and of nothing else: the time is a constant of each step of a graph, and
      half precision would not survive them.
    """

    def __call__(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        """Return F, like ``x``, unitless.

        Args:
            x: Noisy samples divided by ``sigma_data``, (B, *sample_shape), float32: variance 1 at every time.
            t: Times, (B,), float32, radians in [0, pi/2]: 0 is data, pi/2 is noise.
            **conditioning: By name, axis 0 the batch: ``class_labels`` (B,) int64 if there are classes, then the
                model's own. Training may give labels as the third argument, and the label ``num_classes`` for none.
        """
        ...


class OwnConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="own"):
    """What a checkpoint says of a network whose code is not part of this package.

    Attributes:
        name: Name under which it is registered; the class's own name where it is not.
        sample_shape: Shape of one sample, without the batch axis; any rank.
        arguments: What the registered factory is called with; JSON values.
        num_classes: Class labels; 0 for none.
        conditioning: Its inputs beside x, t, class_labels and guidance_scale.
        guidance: Whether it takes ``guidance_scale`` (B,) float32.
        dropout: Always 0: such a network keeps its own.
    """

    name: str
    sample_shape: tuple[int, ...]
    arguments: dict[str, Any] = {}
    num_classes: int = 0
    conditioning: tuple[TensorSpec, ...] = ()
    guidance: bool = False
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
        name: What checkpoints call it; best with your package's name in front.

    Raises:
        ConfigError: If another is registered under that name.
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
) -> OwnConfig:
    """Describe a module; ``ConsistencyModel(network=...)`` does it with these arguments.

    Args:
        network: The module.
        sample_shape: Shape of one sample, without the batch axis; any rank.
        name: Name of its factory; found by the module's class when empty.
        arguments: What the factory is called with to make it again; JSON values.
        num_classes: Class labels; 0 for none.
        conditioning: Inputs beside x, t, class_labels and guidance_scale.
        guidance: Whether it takes ``guidance_scale``.
    """
    return OwnConfig(
        name=name or NETWORKS.name_of(unwrapped(network)),
        sample_shape=tuple(sample_shape),
        arguments=dict(arguments or {}),
        num_classes=num_classes,
        conditioning=tuple(conditioning),
        guidance=guidance,
    )


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return what ``torch.compile`` or data parallelism wraps; None where the module is no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return cast(nn.Module, module.module)
    inner = module._modules.get("_orig_mod")  # the class of torch.compile's takes seconds to import
    return inner


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers of ``wrapped_module``."""
    while (inner := wrapped_module(module)) is not None:
        module = inner
    return module


def make_own_network(config: OwnConfig) -> nn.Module:
    """Call the factory that a config names.

    Raises:
        ConfigError: If none is registered, or it does not take the config's arguments.
    """
    return NETWORKS.make(config.name, config.arguments)
