"""The training loop: draw a batch, step, average, log, checkpoint; run it again to go on.

A run lives in one folder: ``train.json`` (what it is), ``state.safetensors`` (where it stands),
``config.json`` + ``diffusion_pytorch_model.safetensors`` (the averaged model, loadable at any time),
``log.jsonl`` and ``samples/``. Every iteration's randomness is a function of (seed, iteration), so a
run that was interrupted ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from ..errors import TrainError
from ..files import atomic_write_bytes
from ..model.consistency import ConsistencyModel, ModelConfig
from .config import TrainConfig
from .data import ImageData, load_data
from .ema import update_ema
from .objectives import Batch, LogVariance, consistency_loss, diffusion_loss, sample_times
from .state import RunState, load_state, save_state

CONFIG_FILE = "train.json"
LOG_FILE = "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """What one logged iteration looked like.

    Attributes:
        iteration: Iterations done.
        loss: Weighted loss, mean since the last log.
        residual: Unweighted mean square of the residual, mean since the last log.
        grad_norm: Gradient norm before clipping, largest since the last log.
        learning_rate: Learning rate.
        skipped: Non-finite steps skipped so far.
        seconds: Seconds of training so far, over all sittings.
    """

    iteration: int
    loss: float
    residual: float
    grad_norm: float
    learning_rate: float
    skipped: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the caller wants to see while a run goes on.

    Attributes:
        on_step: Called after every iteration with the iterations done.
        on_log: Called with each log line.
        on_sample: Called with the averaged model and the iteration when samples are due.
        log_every: Iterations between log lines.
        sample_every: Iterations between samples; 0 for none.
        checkpoint_every: Iterations between checkpoints.
    """

    on_step: Callable[[int], None] = lambda _: None
    on_log: Callable[[StepLog], None] = lambda _: None
    on_sample: Callable[[ConsistencyModel, int], None] = lambda _model, _iteration: None
    log_every: int = 50
    sample_every: int = 0
    checkpoint_every: int = 500


def resolve(config: TrainConfig) -> tuple[TrainConfig, ModelConfig, ImageData, ConsistencyModel | None]:
    """Load the data and the initial model and complete the config from them.

    Returns:
        The config with its network filled in, the model's config, the data, and the initial model.

    Raises:
        TrainError: If data, network and initial model do not belong together.
    """
    data = load_data(config.data)
    initial = ConsistencyModel.from_pretrained(config.init_from) if config.init_from else None
    network = config.network or (initial.config.network if initial else None)
    assert network is not None  # TrainConfig refuses a run without either
    network = msgspec.structs.replace(network, dropout=config.dropout)
    height, width, channels = data.images.shape[1:]
    if (channels, height, width) != network.sample_shape:
        raise TrainError(
            f"the images are (C, H, W) = {(channels, height, width)}, the network takes {network.sample_shape}. "
            "Choose a network of the data's size."
        )
    if network.num_classes != data.num_classes:
        raise TrainError(
            f"the data has {data.num_classes} classes, the network {network.num_classes}. "
            "Choose the label column the network was made for."
        )
    model_config = ModelConfig(network=network, sigma_data=config.sigma_data, class_names=data.class_names)
    if initial is not None:
        found = msgspec.structs.replace(initial.config.network, dropout=network.dropout)
        if found != network or initial.sigma_data != config.sigma_data:
            raise TrainError(f"the network of {config.init_from} differs from the run's; leave out the network.")
        model_config = msgspec.structs.replace(model_config, provenance=initial.config.provenance)
    return msgspec.structs.replace(config, network=network), model_config, data, initial


def draw_batch(config: TrainConfig, data: ImageData, iteration: int) -> Batch:
    """Return what an iteration sees: a pure function of the seed, the data and the iteration."""
    count, size = len(data), config.batch_size
    positions = np.arange(iteration * size, (iteration + 1) * size)
    rows = np.empty(size, np.int64)
    for epoch in np.unique(positions // count):
        here = positions // count == epoch
        order = np.random.Generator(np.random.Philox([config.seed, int(epoch)])).permutation(count)
        rows[here] = order[positions[here] % count]
    generator = torch.Generator().manual_seed((config.seed << 31) + iteration)
    x_0 = torch.from_numpy(data.normalized(rows)).to(memory_format=torch.channels_last)
    labels: torch.Tensor | None = None
    if data.labels is not None and data.num_classes:
        labels = torch.from_numpy(data.labels[rows])
        dropped = torch.rand(size, generator=generator) < config.label_dropout
        labels = torch.where(dropped, data.num_classes, labels)
    z = torch.randn(x_0.shape, generator=generator) * config.sigma_data
    z = z.to(memory_format=torch.channels_last)
    return Batch(x_0=x_0, z=z, t=sample_times(size, config, generator), class_labels=labels)


def train(config: TrainConfig, out: str | Path, hooks: Hooks | None = None) -> ConsistencyModel:
    """Run training to its end, from the start or from where an earlier call stopped.

    Args:
        config: The run. An existing run in ``out`` must have the same.
        out: The run's folder.
        hooks: What to report on the way.

    Returns:
        The averaged model, as it lies in ``out``.

    Raises:
        TrainError: If the data does not fit, the folder holds another run, or too many steps in a
            row are not finite.
    """
    hooks, out = hooks or Hooks(), Path(out)
    config, model_config, data, initial = resolve(config)
    claim_folder(config, out)
    torch.manual_seed(config.seed)
    # Channels last: a third faster convolutions on CPUs, the layout of tensor cores on GPUs.
    network = ConsistencyModel(model_config).network.train().to(memory_format=torch.channels_last)
    if initial is not None:
        network.load_state_dict(initial.network.state_dict())
    average = ConsistencyModel(model_config, deepcopy(network)).eval().requires_grad_(False)
    logvar = LogVariance()
    parameters = [*network.parameters(), *logvar.parameters()]
    kind = torch.optim.RAdam if config.optimizer == "radam" else torch.optim.Adam
    optimizer = kind(parameters, lr=config.learning_rate, betas=config.betas, eps=1e-8)
    state = RunState(network=network, average=average.network, logvar=logvar, optimizer=optimizer)
    load_state(out, state)

    teacher = None
    if initial is not None and config.objective == "scd":
        teacher = initial.network.to(memory_format=torch.channels_last)
    compute = loss_function(config, network, teacher, logvar if config.adaptive_weighting else None)
    window: list[tuple[float, float, float]] = []
    started, bad = time.monotonic() - state.seconds, 0

    def checkpoint() -> None:
        state.seconds = time.monotonic() - started
        save_state(out, state)
        average.save_pretrained(out)

    try:
        while state.iteration < config.num_iterations:
            batch = draw_batch(config, data, state.iteration)
            torch.manual_seed((config.seed << 31) + state.iteration)  # dropout
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(state.iteration)
            optimizer.zero_grad(set_to_none=True)
            loss, residual = compute(batch, state.iteration)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = float(nn.utils.clip_grad_norm_(parameters, config.grad_clip))
            value = float(loss.detach())
            if math.isfinite(value) and math.isfinite(norm):
                optimizer.step()
                update_ema(average.network, network, config.ema_decay_at(state.iteration))
                window.append((value, float(residual), norm))
                bad = 0
            else:
                state.skipped, bad = state.skipped + 1, bad + 1
                if bad >= config.max_bad_steps:
                    raise TrainError(
                        f"{bad} steps in a row had a loss or gradient that is not finite, at iteration "
                        f"{state.iteration}. Lower the learning rate or lengthen tangent_warmup."
                    )
            state.iteration += 1
            hooks.on_step(state.iteration)
            last = state.iteration == config.num_iterations
            if window and (last or state.iteration % hooks.log_every == 0):
                line = _summarize(window, state, config, time.monotonic() - started)
                with open(out / LOG_FILE, "a") as stream:
                    stream.write(json.dumps(asdict(line)) + "\n")
                hooks.on_log(line)
                window = []
            if last or state.iteration % hooks.checkpoint_every == 0:
                checkpoint()
            if hooks.sample_every and (last or state.iteration % hooks.sample_every == 0):
                hooks.on_sample(average, state.iteration)
    except KeyboardInterrupt:
        checkpoint()
        raise
    return average


def loss_function(
    config: TrainConfig, network: nn.Module, teacher: nn.Module | None, logvar: LogVariance | None
) -> Callable[[Batch, int], tuple[torch.Tensor, torch.Tensor]]:
    """Return ``(batch, iteration) -> (loss, residual)`` for a run, compiled if it asks for that."""
    if config.objective == "diffusion":

        def diffusion(batch: Batch, warmup: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return diffusion_loss(network, logvar, batch, sigma_data=config.sigma_data)

        compute = diffusion
    else:

        def consistency(batch: Batch, warmup: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return consistency_loss(network, teacher, logvar, batch, config, warmup)

        compute = consistency
    if config.compile:
        compute = torch.compile(compute)

    def at(batch: Batch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        warmup = min(1.0, iteration / config.tangent_warmup) if config.tangent_warmup else 1.0
        return compute(batch, torch.tensor(warmup))

    return at


def claim_folder(config: TrainConfig, out: Path) -> None:
    """Write the run's config into its folder, or check that it is the one that lies there.

    Raises:
        TrainError: If the folder holds a run with another config.
    """
    path = out / CONFIG_FILE
    if not path.exists():
        atomic_write_bytes(path, config.to_json().encode() + b"\n", error=TrainError)
        return
    there = msgspec.to_builtins(TrainConfig.from_json(path.read_bytes()))
    here = msgspec.to_builtins(config)
    here["compile"] = there["compile"]  # how it runs, not what it is
    if differ := [f"{key}: {there[key]} there, {here[key]} here" for key in here if here[key] != there[key]]:
        raise TrainError(
            f"{out} holds a run with other settings ({'; '.join(differ)}). "
            "Use the same settings to go on with it, or another folder for a new run."
        )


def _summarize(window: list[tuple[float, float, float]], state: RunState, config: TrainConfig, seconds: float) -> StepLog:
    losses, residuals, norms = zip(*window, strict=True)
    return StepLog(
        iteration=state.iteration,
        loss=sum(losses) / len(losses),
        residual=sum(residuals) / len(residuals),
        grad_norm=max(norms),
        learning_rate=config.learning_rate_at(state.iteration - 1),
        skipped=state.skipped,
        seconds=round(seconds, 1),
    )
