"""Build a run: networks, losses and optimizer, distributed over its processes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from ..model.consistency import ConsistencyModel
from ..model.networks.magnitude import normalize_weights_
from .averages.ema import Profiles, update_ema
from .config import TrainConfig
from .data.images import ImageData
from .objectives.base import LogVariance
from .objectives.discrete import Anchor
from .objectives.guidance import start_from
from .objectives.select import loss_function, make_vsd
from .objectives.stable_target import StableTarget
from .parallel.distributed import Scale, World
from .parallel.sharding import LossModule, gathered_state, recompute_activations, shard, wrap
from .parallel.state import RunState
from .prepare import Prepared


@dataclass(kw_only=True)
class Run:
    """The objects of a run in one process.

    Attributes:
        config: The run.
        scale: Its distribution over processes.
        world: The processes.
        data: The images.
        stable_target: Replaces data by posterior means, or None.
        loss: ``(batch, iteration) -> (loss, residual)``, the module that DDP or FSDP2 wraps.
        parameters: Parameters of the optimizer, in its order.
        optimizer: Optimizer of the student and the weighting heads.
        average: The averaged model; the shard of this process in a sharded run.
        profiles: The stored averages for post-hoc reconstruction.
        state: The mutable state of the run.
    """

    config: TrainConfig
    scale: Scale
    world: World
    data: ImageData
    stable_target: StableTarget | None
    loss: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: ConsistencyModel
    profiles: Profiles
    state: RunState

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a shard."""
        return self.scale.parallel == "fsdp"

    @property
    def rows(self) -> slice | None:
        """Rows of each batch of this process; None for all."""
        share = self.config.batch_size // self.world.size
        return None if self.world.size == 1 else slice(self.world.rank * share, (self.world.rank + 1) * share)

    def move(self) -> None:
        """Perform the optimizer step and update the average."""
        self.optimizer.step()
        normalize_weights_(self.state.network)
        update_ema(self.average.network, self.state.network, self.config.ema_decay_at(self.state.iteration))

    def gathered(self) -> ConsistencyModel:
        """Return the averaged model, complete on process 0, with the training state; all processes must call it."""
        about = {"iteration": str(self.state.iteration), "num_iterations": str(self.config.num_iterations)}
        config = self.average.config
        self.average.config = msgspec.structs.replace(config, provenance={**config.provenance, **about})
        if not self.sharded:
            return self.average
        weights = gathered_state(self.average.network, self.world)
        if weights is None:
            return self.average
        model = ConsistencyModel(self.average.config)
        model.network.load_state_dict(weights)
        return model.to(self.world.device).eval().requires_grad_(False)


def build(start: Prepared, out: Path, scale: Scale, world: World) -> Run:
    """Create the networks with their initial weights, the losses and the optimizer of a run."""
    config, sharded = start.config, scale.parallel == "fsdp"
    torch.manual_seed(config.seed)
    network = _arrange(ConsistencyModel(start.model_config).network.train(), config)
    if start.initial is not None:
        start_from(network, start.initial.network)
    normalize_weights_(network)
    teacher = _arrange(start.teacher.network, config) if start.teacher else None
    if not sharded:  # sharding moves one block at a time
        network.to(world.device)
        if teacher is not None:
            teacher.to(world.device)
    average = ConsistencyModel(start.model_config, deepcopy(network)).eval().requires_grad_(False)
    profiles = Profiles(config, network, out, world)
    stable_target = (
        StableTarget(start.data, sigma_data=config.sigma_data, device=world.device) if config.stable_targets else None
    )
    logvar, vsd = LogVariance(), make_vsd(config, network, teacher, stable_target)
    anchor = Anchor(config, stable_target) if config.anchor.weight else None
    heads = [logvar, *([vsd.logvar] if vsd else []), *([anchor.logvar] if anchor else [])]
    if scale.recompute:
        recompute_activations(network)
    used = logvar if config.adaptive_weighting and config.objective != "vsd" else None
    compute = loss_function(config, network, teacher, used, vsd, anchor)
    learned = [head for head in heads if config.adaptive_weighting or (vsd and head is vsd.logvar)]
    for head in heads:
        head.to(world.device)
    loss = LossModule(network, [head for head in learned if head is not logvar or used], compute)
    if sharded:
        for other in [average.network, *profiles.modules().values(), *([teacher] if teacher is not None else [])]:
            shard(other, other, world)
    wrapped = wrap(loss, scale, world)
    parameters = [p for module in (network, *heads) for p in module.parameters()]
    its = config.optimizer
    make_optimizer = torch.optim.RAdam if its.name == "radam" else torch.optim.Adam
    optimizer = make_optimizer(parameters, lr=its.learning_rate, betas=its.betas, eps=its.epsilon)
    state = RunState(
        network=network,
        average=average.network,
        modules={
            "logvar": logvar,
            **(vsd.modules() if vsd else {}),
            **({"anchor_logvar": anchor.logvar} if anchor else {}),
            **profiles.modules(),
        },
        optimizers={"optimizer": optimizer, **({"fake_optimizer": vsd.optimizer} if vsd else {})},
    )
    return Run(
        config=config,
        scale=scale,
        world=world,
        data=start.data,
        stable_target=stable_target,
        loss=wrapped,
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        profiles=profiles,
        state=state,
    )


def _arrange(module: nn.Module, config: TrainConfig) -> nn.Module:
    """Use the channels-last layout for weights if the loss is compiled.

    Without the compiler each group normalization would convert between the layouts.
    """
    if not config.compile:
        return module
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
