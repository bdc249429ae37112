"""The training state: everything that changes during a run, as named tensors in one file.

Weights, averages, weighting heads and optimizer moments are in one safetensors file. For sharded runs ``sharded_state``
stores the same tensors in a folder. A checksum covers everything, because a run that resumes from a damaged state would
silently give another result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..._util.files import atomic_write_bytes, open_regular
from ...errors import IntegrityError, TrainError

STATE_FILE = "state.safetensors"
UNREADABLE = (
    SafetensorError, msgspec.MsgspecError, OSError, LookupError, TypeError, ValueError, RuntimeError, RecursionError,
    MemoryError,
)  # fmt: skip
"""Exceptions for a damaged or unrelated state."""
MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""State of Adam and RAdam per parameter: a step count and two tensors of the parameter's shape."""


class Counters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The counters of a state; ``RunState`` has the same fields."""

    iteration: Annotated[int, msgspec.Meta(ge=0)]
    skipped: Annotated[int, msgspec.Meta(ge=0)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    window: list[tuple[float, float, float]]


@dataclass(kw_only=True)
class RunState:
    """Everything that changes during a run.

    Attributes:
        network: The trained network.
        average: Its moving average.
        modules: Further modules with weights, by name.
        optimizers: Optimizers with their moments, by name.
        iteration: Completed iterations.
        skipped: Skipped non-finite steps.
        seconds: Seconds of training, over all starts.
        window: Loss, residual and gradient norm of each finite step since the last line of the log.
    """

    network: nn.Module
    average: nn.Module
    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    iteration: int = 0
    skipped: int = 0
    seconds: float = 0.0
    window: list[tuple[float, float, float]] = field(default_factory=list)

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts that have a state dict, by the prefix of their tensors."""
        return {"network": self.network, "average": self.average, **self.modules}

    def counters(self) -> Counters:
        """Return the counters."""
        return Counters(iteration=self.iteration, skipped=self.skipped, seconds=self.seconds, window=self.window)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; in a sharded run the shards of this process (DTensor)."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self.parts().items():
            for name, tensor in module.state_dict().items():
                tensors[f"{prefix}.{name}"] = tensor.detach().contiguous()
        for prefix, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                for name, tensor in moments.items():
                    tensors[f"{prefix}.{index}.{name}"] = tensor.detach().contiguous()
        return tensors

    def empty_like(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return empty tensors to load the named tensors into, sharded like those of this run.

        Args:
            shapes: Name and full shape of each stored tensor.

        Raises:
            KeyError, ValueError: If names or shapes are not those of this run.
        """
        like: dict[str, Tensor] = {}
        for prefix, module in self.parts().items():
            like.update({f"{prefix}.{name}": tensor.detach() for name, tensor in module.state_dict().items()})
        for prefix, optimizer in self.optimizers.items():
            parameters = _parameters(optimizer)
            for name, shape in _below(shapes, prefix).items():
                parameter = parameters[int(name.partition(".")[0])].detach()
                like[f"{prefix}.{name}"] = parameter if shape == parameter.shape else torch.zeros(shape)
        if like.keys() != shapes.keys():
            raise KeyError(f"tensors {sorted(like.keys() ^ shapes.keys())[:3]} are not on both sides")
        for name, tensor in like.items():
            if tensor.shape != shapes[name]:
                raise ValueError(f"{name} is {tuple(shapes[name])}, the run's is {tuple(tensor.shape)}")
        return {name: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for name, tensor in like.items()}

    def load(self, tensors: Mapping[str, Tensor], counters: Counters) -> None:
        """Load the results of ``tensors`` and ``counters``, also from a run with another number of processes.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: If they do not match this run, or are not finite.
        """
        if counters.skipped > counters.iteration:
            raise ValueError(f"{counters.skipped} of {counters.iteration} iterations were skipped")
        for prefix, module in self.parts().items():
            own, found = module.state_dict(), _below(tensors, prefix)
            for name in own.keys() & found.keys():
                check_tensor(f"{prefix}.{name}", found[name], own[name].shape, own[name].dtype)
            module.load_state_dict({name: _split_like(t, own.get(name)) for name, t in found.items()})
        for prefix, optimizer in self.optimizers.items():
            parameters, moments = _parameters(optimizer), dict[int, dict[str, Tensor]]()
            for name, tensor in _below(tensors, prefix).items():
                index, _, key = name.partition(".")
                parameter = parameters[int(index)]
                shape = torch.Size() if key == "step" else parameter.shape
                check_tensor(f"{prefix}.{name}", tensor, shape, torch.float32 if key == "step" else parameter.dtype)
                if key == "step" and tensor < 1:
                    raise ValueError(f"{prefix}.{name} is {float(tensor)}, expected 1 or more")
                moments.setdefault(int(index), {})[key] = _split_like(tensor, parameter)
            if any(found.keys() != MOMENTS for found in moments.values()):
                raise KeyError(f"moments of {prefix} are not {', '.join(sorted(MOMENTS))}")
            if not moments and counters.iteration > counters.skipped:
                raise KeyError(f"no moments of {prefix} after {counters.iteration} iterations")
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        self.iteration, self.skipped, self.seconds = counters.iteration, counters.skipped, counters.seconds
        self.window = counters.window


def save_state(out: Path, state: RunState) -> None:
    """Write ``state.safetensors`` atomically.

    Raises:
        TrainError: If it cannot be written; the previous state stays.
    """
    tensors, counters = state.tensors(), msgspec.json.encode(state.counters()).decode()
    data = save(tensors, metadata=sealed(tensors, counters))
    atomic_write_bytes(out / STATE_FILE, data, error=TrainError)


def load_state(out: Path, state: RunState) -> None:
    """Load ``state.safetensors``, if it exists.

    Raises:
        IntegrityError: If the file is damaged or belongs to another network.
    """
    path = out / STATE_FILE
    if not path.exists():
        return
    try:
        with open_regular(path), safe_open(path, framework="pt") as archive:
            about = archive.metadata()
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        if about != sealed(tensors, about["counters"].partition(" ")[2]):
            raise ValueError("its content does not have the sha256 that it states")
        state.load(tensors, read_counters(about))
    except UNREADABLE as exc:
        raise not_resumable(path, exc) from exc


def read_counters(metadata: Mapping[str, str]) -> Counters:
    """Return the counters in the metadata of a ``state.safetensors``.

    Raises:
        KeyError, msgspec.MsgspecError: If there are none.
    """
    return msgspec.json.decode(metadata["counters"].partition(" ")[2], type=Counters)


def sealed(tensors: Mapping[str, Tensor], counters: str) -> dict[str, str]:
    """Return the metadata of a ``state.safetensors``: the sha256 of counters and tensors, then the counters as JSON.

    The digest covers names, dtypes, shapes and values in the order of the names. It is one entry, because safetensors
    does not keep the order of several.
    """
    found = hashlib.sha256(counters.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return {"counters": f"{found.hexdigest()} {counters}"}


def check_tensor(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Check shape, dtype and finiteness of a stored tensor.

    Raises:
        ValueError: If one is wrong; with the reason.
    """
    if (tensor.shape, tensor.dtype) != (shape, dtype):
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, the run's is {tuple(shape)} {dtype}")
    share = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]
    if not torch.isfinite(share).all():
        raise ValueError(f"{name} holds a NaN or an infinity")


def not_resumable(path: Path, reason: object) -> IntegrityError:
    """Return the error for a state that cannot be read or belongs to another run."""
    return IntegrityError(f"{path} cannot be resumed from: {reason}. Delete it to start again, or copy it again.")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _split_like(tensor: Tensor, own: Any) -> Tensor:
    """Return this process's shard of a full tensor if the target is sharded, else the tensor."""
    if not hasattr(own, "full_tensor") or hasattr(tensor, "full_tensor") or own.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the full tensor, so nothing is communicated.
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
