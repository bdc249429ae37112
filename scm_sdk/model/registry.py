"""Registries of custom modules: a checkpoint holds weights and a name, never code.

To load such a checkpoint, register the class under this name, in the process or by an entry point of an installed
package, or pass the module to ``ConsistencyModel.from_pretrained``. Graphs and engines do not need the class.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import nn

from ..errors import ConfigError

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])


class Registry:
    """Factories of one kind of module by name.

    Args:
        kind: ``network`` or ``decoder``, for messages.
        group: Group of entry points of installed packages.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self.factories: dict[str, Callable[..., nn.Module]] = {}

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Return a decorator that registers a class, or a function that returns a module, under a name.

        Raises:
            ConfigError: If another factory has this name.
        """

        def register(factory: Factory) -> Factory:
            known = self.factories.get(name)
            # A notebook cell or a script that runs again defines the same class again.
            if known is not None and _origin(known) != _origin(factory):
                raise ConfigError(
                    f"{self.kind} {name!r} is registered twice, as {_origin(known)} and as {_origin(factory)}. Rename "
                    "one."
                )
            self.factories[name] = factory
            return factory

        return register

    def name_of(self, module: nn.Module) -> str:
        """Return the registered name of a module's class; the class name if it is not registered."""
        kind = type(module)
        return next((name for name, factory in self.factories.items() if factory is kind), kind.__qualname__)

    def holds(self, name: str) -> bool:
        """Return whether ``make`` finds a factory of this name."""
        return name in self.factories or bool(entry_points(group=self.group, name=name))

    def make(self, name: str, arguments: dict[str, Any]) -> nn.Module:
        """Call the factory of a name.

        Raises:
            ConfigError: If the name is not registered, or the factory refuses the arguments.
        """
        factory = self.factories.get(name)
        if factory is None:
            (point, *_) = [*entry_points(group=self.group, name=name), None]
            if point is None:
                raise ConfigError(
                    f"this model's {self.kind} is {name!r}, whose code is not part of scm-sdk, expected it registered. "
                    f"Decorate its class with register_{self.kind}({name!r}), install the package that has it as an "
                    f"entry point of {self.group!r}, or give from_pretrained the module. Graphs and engines need none."
                )
            factory = point.load()
        try:
            return factory(**arguments)
        except TypeError as exc:
            raise ConfigError(
                f"{self.kind} {name!r} cannot be made with {arguments}: {exc}. Give the arguments={{...}} that make it "
                "again."
            ) from exc


def _origin(factory: Callable[..., nn.Module]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"
