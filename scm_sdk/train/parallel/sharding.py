"""Wrap networks for several processes: DDP, FSDP2, activation checkpointing.

The loss with its tangent runs inside ``forward`` of the wrapped module, where the hooks that gather weights and reduce
gradients apply to every call. A JVP over the wrapper would differentiate DDP's buffer broadcast; a JVP under it would
bypass the hooks, and the gradients would silently not be averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ...errors import ConfigError
from ..config import TrainConfig
from ..objectives.base import Batch
from .distributed import Scale, World

Compute = Callable[[Batch, int], tuple[Tensor, Tensor]]


class LossModule(nn.Module):
    """The loss of a run as a module that holds the trained modules.

    Args:
        network: The student.
        heads: Further trained modules.
        compute: ``(batch, iteration) -> (loss, residual)``; calls the network and the heads.
    """

    def __init__(self, network: nn.Module, heads: Iterable[nn.Module], compute: Compute) -> None:
        super().__init__()
        self.network, self.heads = network, nn.ModuleList(heads)
        self._compute = compute

    def forward(self, batch: Batch, iteration: int) -> tuple[Tensor, Tensor]:
        """Return the loss and the residual, scalars."""
        return self._compute(batch, iteration)


def check_scale(config: TrainConfig, scale: Scale, world: World) -> None:
    """Refuse options whose result would differ from that of one process.

    Raises:
        ConfigError: If the batch cannot be split evenly, or an option does not support several processes, FSDP2 or
            gradient accumulation.
    """
    parts = world.size * scale.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size is {config.batch_size}, which {world.size} processes of {scale.accumulate} parts "
            f"(--accumulate) cannot share evenly. Expected a multiple of {parts}: the loss is a mean over equal shares."
        )
    sharded = scale.parallel == "fsdp"
    if sharded and not dist.is_initialized():
        raise ConfigError(
            "--parallel fsdp splits a run over processes, and this is one alone. Start it with torchrun, "
            "for example: torchrun --nproc-per-node 8 -m scm_sdk.export.cli train ..."
        )
    if config.uses_vsd and (parts > 1 or sharded):
        raise ConfigError(
            "VSD takes a step of its own inside each iteration and goes with one process and --accumulate 1 only. "
            "Leave it out, or run it in one process."
        )
    continuous = config.kind.tangent and not config.tangent.discrete_points
    if scale.recompute and continuous and config.tangent.mode == "jvp":
        raise ConfigError(
            "--recompute does not go with a tangent of one pass, --tangent jvp: activations cannot be computed "
            "again inside a JVP. Use jvp2, which computes the tangent without gradient first."
        )
    if config.kind.one_process and (world.size > 1 or sharded):
        raise ConfigError(
            "--trajectory-steps solves a block of trajectories at a time, which every process would do alike: it goes "
            "with one process only. Leave out torchrun, or distill by --discrete-step or sCD."
        )
    if config.compile and (world.size > 1 or sharded):
        raise ConfigError("--compile goes with one process only. Leave it out.")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network in order: its children, including those in lists, that have children."""
    opened: list[nn.Module] = []
    for child in network.children():
        opened.extend(child.children() if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential) else [child])
    return [module for module in opened if any(True for _ in module.children())]


def recompute_activations(network: nn.Module) -> None:
    """Recompute the activations of a network's blocks in the backward pass.

    Only if gradients are recorded: the JVP under ``no_grad`` stores nothing, and inside a JVP with gradients torch's
    checkpointing fails.
    """
    for block in blocks_of(network):
        block.forward = partial(_forgetting, block.forward)


def _forgetting(forward: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def shard(module: nn.Module, network: nn.Module, world: World) -> None:
    """Split the parameters of ``module``, which is or holds ``network``, over the processes, block by block (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in [*blocks_of(network), module]:
        sharded = fully_shard(part, mesh=mesh)
        # The first gathering makes the buffers of all later ones. Before 2.13 PyTorch cannot use those of a JVP again.
        sharded.unshard()
        sharded.reshard()


def wrap(loss: LossModule, scale: Scale, world: World) -> nn.Module:
    """Wrap the loss. The caller must keep the returned module: a deleted DDP module does not reduce gradients."""
    if scale.parallel == "fsdp":
        shard(loss, loss.network, world)
        return loss
    if world.size == 1:
        return loss
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(loss, device_ids=devices)


def reducing(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return the context of one part's backward pass: DDP sends gradients round after the last part of a batch.

    FSDP2 reduces after each part, because otherwise every process would store the full gradient.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def local(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Return the shard of each parameter in this process; the full parameter without sharding."""
    return (p.to_local() if hasattr(p, "to_local") else p for p in parameters)  # pyright: ignore[reportAttributeAccessIssue]


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clip the gradient norm and return the norm before clipping, equal on every process."""
    norm: Any = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def gathered_state(module: nn.Module, world: World) -> dict[str, Tensor] | None:
    """Return the full state dict of a module on process 0 and None elsewhere; all processes must call it."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.detach()
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
        if world.is_main:
            tensors[name] = whole
    return tensors if world.is_main else None
