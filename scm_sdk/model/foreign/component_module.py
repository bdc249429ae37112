"""A component of a diffusers pipeline as a module of diffusers, with the weights of its folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...errors import IntegrityError
from ..bounds import check_bound, check_num_parameters, on_meta
from ..checkpoint import check_fits, read_tensors
from .component import weight_files


def load_component(
    kind: type[Any], config: dict[str, Any], folder: Path, *, keep: str | tuple[str, ...] = ""
) -> nn.Module:
    """Create a module of diffusers with the weights of a component, float32.

    Args:
        kind: Class of the module.
        config: Its config.
        folder: Folder of the component.
        keep: Prefixes of the weights to load; the others stay on the meta device.

    Raises:
        ConfigError: If a setting is out of bounds.
        IntegrityError: If the class refuses the config, or the weights do not match it.
    """
    for name, value in config.items():
        if value is not None:
            check_bound(name, tuple(value) if isinstance(value, list) else value)
    try:
        check_num_parameters(lambda: kind.from_config(config))
        with on_meta():  # no memory for a wrong file, no time for random weights
            module: nn.Module = kind.from_config(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError,
            MemoryError) as exc:  # fmt: skip
        raise IntegrityError(
            f"{folder} has a config that {kind.__name__} refuses: {exc}. Copy the folder again."
        ) from exc
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    check_fits(module, tensors, f"the weights in {folder} do not fit its config", remedy="Copy the folder again.")
    if any(buffer.is_meta for name, buffer in module.named_buffers() if name not in tensors):
        with _without_parameters():  # its constructor computes tables
            module = kind.from_config(config)
    kept: dict[str, Tensor] = {}
    while tensors:  # one after the other, because large models exist once in memory
        name, tensor = tensors.popitem()
        if name.startswith(keep):
            kept[name] = tensor.float() if tensor.is_floating_point() else tensor
    module.load_state_dict(kept, strict=False, assign=True)
    return module


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Create modules, in this thread, with real buffers and with parameters on the meta device."""
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:  # torch declares None alone
        return nn.Parameter(parameter.to("meta")) if threading.get_ident() == thread else None

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
