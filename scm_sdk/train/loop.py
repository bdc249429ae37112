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

import numpy as np
import torch
from torch import nn

from ..errors import TrainError
from ..files import atomic_write_bytes
from ..model.consistency import ConsistencyModel
from .config import TrainConfig
from .data import ImageData
from .discrete import Anchor
from .ema import update_ema
from .losses import loss_function, make_vsd
from .objectives import Batch, LogVariance, sample_times
from .prepare import Prepared, claimed_folder, resolve
from .stable_target import StableTarget
from .state import RunState, load_state, save_state

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
    x_0 = torch.from_numpy(data.normalized(rows))
    labels: torch.Tensor | None = None
    if data.labels is not None and data.num_classes:
        labels = torch.from_numpy(data.labels[rows])
        dropped = torch.rand(size, generator=generator) < config.label_dropout
        labels = torch.where(dropped, data.num_classes, labels)
    z = torch.randn(x_0.shape, generator=generator) * config.sigma_data
    return Batch(x_0=x_0, z=z, t=sample_times(size, config, generator), class_labels=labels)


def train(
    config: TrainConfig, out: str | Path, hooks: Hooks | None = None, data: ImageData | None = None
) -> ConsistencyModel:
    """Run training to its end, from the start or from where an earlier call stopped.

    Args:
        config: The run. An existing run in ``out`` must have the same.
        out: The run's folder.
        hooks: What to report on the way.
        data: What ``load_data(config.data)`` returned, where the caller has it already.

    Returns:
        The averaged model, as it lies in ``out``.

    Raises:
        TrainError: If the data does not fit, the folder holds another run, or too many steps in a
            row are not finite.
    """
    out, start = Path(out), resolve(config, data)
    with claimed_folder(start.config, out):
        return _train(start, out, hooks or Hooks())


def _train(start: Prepared, out: Path, hooks: Hooks) -> ConsistencyModel:
    config, data = start.config, start.data
    torch.manual_seed(config.seed)
    network = _arrange(ConsistencyModel(start.model_config).network.train(), config)
    if start.initial is not None:
        network.load_state_dict(start.initial.network.state_dict())
    average = ConsistencyModel(start.model_config, deepcopy(network)).eval().requires_grad_(False)
    teacher = _arrange(start.teacher.network, config) if start.teacher else None
    stable_target = StableTarget(data, sigma_data=config.sigma_data) if config.stable_targets else None
    logvar, vsd = LogVariance(), make_vsd(config, network, teacher, stable_target)
    anchor = Anchor(config, stable_target) if config.anchor_weight else None
    heads = [logvar, *([vsd.logvar] if vsd else []), *([anchor.logvar] if anchor else [])]
    parameters = [p for module in (network, *heads) for p in module.parameters()]
    kind = torch.optim.RAdam if config.optimizer == "radam" else torch.optim.Adam
    optimizer = kind(parameters, lr=config.learning_rate, betas=config.betas, eps=1e-8)
    state = RunState(
        network=network,
        average=average.network,
        modules={
            "logvar": logvar,
            **(vsd.modules() if vsd else {}),
            **({"anchor_logvar": anchor.logvar} if anchor else {}),
        },
        optimizers={"optimizer": optimizer, **({"fake_optimizer": vsd.optimizer} if vsd else {})},
    )
    load_state(out, state)
    _trim_log(out / LOG_FILE, state.iteration)
    compute = loss_function(config, network, teacher, logvar if config.adaptive_weighting else None, vsd, anchor)
    window: list[tuple[float, float, float]] = []
    started, bad = time.monotonic() - state.seconds, 0

    def checkpoint() -> None:
        state.seconds = time.monotonic() - started
        save_state(out, state)
        average.save_pretrained(out)

    try:
        while state.iteration < config.num_iterations:
            batch = draw_batch(config, data, state.iteration)
            if stable_target is not None and config.objective in ("diffusion", "sct"):
                batch = stable_target(batch)
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


def _arrange(module: nn.Module, config: TrainConfig) -> nn.Module:
    """Put the weights in channels-last layout when compiled and leave them as they are when not.

    Without the compiler each group normalization would copy back and forth between the layouts.
    """
    if not config.compile:
        return module
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _trim_log(path: Path, iteration: int) -> None:
    """Drop what was logged after the last checkpoint: those iterations are run again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
        if kept != lines:
            atomic_write_bytes(path, "".join(kept).encode(), error=TrainError)


def _summarize(
    window: list[tuple[float, float, float]], state: RunState, config: TrainConfig, seconds: float
) -> StepLog:
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
