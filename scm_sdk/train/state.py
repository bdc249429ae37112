"""Where a run stands, on disk: weights, average, weighting head and optimizer in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import IntegrityError, TrainError
from ..files import atomic_write_bytes

STATE_FILE = "state.safetensors"


@dataclass(kw_only=True)
class RunState:
    """Everything that changes during a run.

    Attributes:
        network: The weights that are trained.
        average: Their moving average.
        modules: What else has weights, by name.
        optimizers: With their moments, by name.
        iteration: Iterations done.
        skipped: Non-finite steps skipped.
        seconds: Seconds of training, over all sittings.
    """

    network: nn.Module
    average: nn.Module
    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    iteration: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts that have a state dict, by the prefix of their tensors."""
        return {"network": self.network, "average": self.average, **self.modules}


def save_state(out: Path, state: RunState) -> None:
    """Write ``state.safetensors`` atomically.

    Raises:
        TrainError: If the disk refuses; the earlier state is still there.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in state.parts().items():
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor.detach().contiguous()
    for prefix, optimizer in state.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            for name, tensor in moments.items():
                tensors[f"{prefix}.{index}.{name}"] = tensor.detach().contiguous()
    counters = {"iteration": state.iteration, "skipped": state.skipped, "seconds": state.seconds}
    data = save(tensors, metadata={"counters": json.dumps(counters)})
    atomic_write_bytes(out / STATE_FILE, data, error=TrainError)


def load_state(out: Path, state: RunState) -> None:
    """Fill ``state`` from ``state.safetensors``, if it exists.

    Raises:
        IntegrityError: If the file is truncated or belongs to another network.
    """
    path = out / STATE_FILE
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as archive:
            counters = json.loads(archive.metadata()["counters"])
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        for prefix, module in state.parts().items():
            module.load_state_dict(_below(tensors, prefix))
        for prefix, optimizer in state.optimizers.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _below(tensors, prefix).items():
                index, _, key = name.partition(".")
                moments.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as exc:
        raise IntegrityError(
            f"{path} cannot be resumed from: {exc}. Delete it to start again, or copy it again."
        ) from exc
    state.iteration, state.skipped, state.seconds = (
        counters["iteration"],
        counters["skipped"],
        counters["seconds"],
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
