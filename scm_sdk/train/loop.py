"""The training loop: draw a batch, step, average, log, checkpoint. A second start resumes.

A run is one folder: ``train.json`` (settings), ``state.safetensors`` or ``state-ITERATION/`` (training state),
``config.json`` + ``diffusion_pytorch_model.safetensors`` (the averaged model, loadable at any time),
``log.jsonl`` and ``samples/``. The random numbers of an iteration are a function of (seed, iteration), and a checkpoint
writes the state last, after log, samples and model. A run that was interrupted or killed at any moment therefore ends
with the same files as an uninterrupted one; only the seconds in the log differ. Under ``torchrun`` the processes of
``distributed`` share the work of each iteration.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import msgspec
import torch

from .._util.files import atomic_write_bytes, open_regular
from ..bundle.layout import CONFIG_NAME, WEIGHTS_NAME
from ..errors import BundleError, ScmError, TrainError
from ..model.checkpoint import read_config, read_tensors
from ..model.consistency import ConsistencyModel
from .batches import Feed, seed_dropout, split
from .build import Run, build
from .config import TrainConfig
from .data.images import ImageData
from .objectives.base import Batch
from .parallel.distributed import Scale, World, joined, stop_signals
from .parallel.mixed import loss_scale, unscale
from .parallel.sharded_state import load_run, save_run
from .parallel.sharding import check_scale, clip_gradients, reducing
from .parallel.state import not_resumable
from .prepare import Prepared, claimed_folder, resolve

LOG_FILE = "log.jsonl"
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """One line of the log.

    Attributes:
        iteration: Completed iterations.
        loss: Weighted loss, mean since the last line.
        residual: Unweighted mean square of the residual, mean since the last line.
        grad_norm: Gradient norm before clipping, maximum since the last line.
        learning_rate: Learning rate.
        skipped: Total skipped non-finite steps.
        seconds: Total seconds of training, over all starts.
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
    """Callbacks and intervals of a run. Of several processes only the first reports.

    Attributes:
        on_start: Called with the completed config and the data before the first iteration.
        on_step: Called after every iteration with the number of completed iterations, on every process.
        on_log: Called with each log line.
        on_sample: Called with the averaged model and the iteration when samples are due.
        log_every: Iterations between log lines.
        sample_every: Iterations between samples; 0 for none.
        checkpoint_every: Iterations between checkpoints.
    """

    on_start: Callable[[TrainConfig, ImageData], None] = lambda _config, _data: None
    on_step: Callable[[int], None] = lambda _: None
    on_log: Callable[[StepLog], None] = lambda _: None
    on_sample: Callable[[ConsistencyModel, int], None] = lambda _model, _iteration: None
    log_every: int = 50
    sample_every: int = 0
    checkpoint_every: int = 500


def train(
    config: TrainConfig,
    out: str | Path,
    hooks: Hooks | None = None,
    data: ImageData | None = None,
    scale: Scale | None = None,
) -> ConsistencyModel:
    """Run training to its end, from the start or from the last checkpoint.

    Args:
        config: The run. An existing run in ``out`` must have the same config.
        out: The run's folder; on several machines on a shared disk.
        hooks: Callbacks and intervals.
        data: Result of ``load_data(config.data)``, if the caller has loaded it.
        scale: Distribution over the processes of torchrun, and gradient accumulation.

    On Ctrl-C (SIGINT) and SIGTERM the run finishes the iteration and saves. A second Ctrl-C ends a single process at
    once without saving. Only the main thread receives signals.

    Returns:
        The averaged model as saved in ``out``. In a sharded run only the first process has the complete model.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: With code 143, after SIGTERM.
        TrainError: If the data does not match, the folder holds another run, too many consecutive steps are not finite,
            a disk is full, or another process was lost. Earlier checkpoints stay.
        ConfigError: If the run cannot be distributed in this way.
    """
    out, scale = Path(out), scale or Scale()
    with joined(scale) as world:
        start = world.run_on_all(lambda: _prepare(config, data, scale, world))
        with _claimed(start.config, out, world):
            hooks, config, images = hooks or Hooks(), start.config, start.data
            world.run_on_main(lambda: hooks.on_start(config, images))
            run = build(start, out, scale, world)
            del start  # the loaded models would stay in memory during the run
            return _iterate(run, out, hooks)


def _prepare(config: TrainConfig, data: ImageData | None, scale: Scale, world: World) -> Prepared:
    """Load data and initial models, and refuse an unsupported distribution."""
    start = resolve(config, data)
    check_scale(start.config, scale, world)
    return start


@contextmanager
def _claimed(config: TrainConfig, out: Path, world: World) -> Iterator[None]:
    """Lock the run's folder on process 0 for all processes."""
    with ExitStack() as stack:
        world.run_on_main(lambda: stack.enter_context(claimed_folder(config, out)))
        yield


def _iterate(run: Run, out: Path, hooks: Hooks) -> ConsistencyModel:
    """Run the remaining iterations with logging and checkpoints."""
    config, state, world = run.config, run.state, run.world
    load_run(out, state, world)
    if state.iteration >= config.num_iterations:
        return _finished(run, out)
    log = _Log(run, out, hooks)
    with Feed(config, run.data, run.rows) as feed, stop_signals(world) as asked_to_stop:
        while state.iteration < config.num_iterations:
            step = _step(run, feed(state.iteration), stop=asked_to_stop())
            log.take(step)
            if step.finite:
                run.move()
            elif log.bad >= config.max_bad_steps:
                raise TrainError(
                    f"{log.bad} steps in a row had a loss or gradient that is not finite, at iteration "
                    f"{state.iteration}. Lower the learning rate or fade the tangent in for longer: --tangent-warmup."
                )
            run.profiles.update(state.iteration)
            state.iteration += 1
            hooks.on_step(state.iteration)
            stop = asked_to_stop() if world.size == 1 else step.stop
            last = state.iteration == config.num_iterations
            if last or state.iteration % hooks.log_every == 0:
                log.write()
            if hooks.sample_every and (last or state.iteration % hooks.sample_every == 0):
                model = run.gathered()
                world.run_on_main(partial(hooks.on_sample, model, state.iteration))
            if last or stop or state.iteration % hooks.checkpoint_every == 0:
                _checkpoint(run, out, log)
            if stop and not last:
                raise SystemExit(128 + stop) if stop == signal.SIGTERM else KeyboardInterrupt
    return run.gathered()


def _finished(run: Run, out: Path) -> ConsistencyModel:
    """Return the model of a finished run, and write it if the folder does not hold it."""
    if run.state.iteration > run.config.num_iterations:
        raise not_resumable(
            out, f"it has done {run.state.iteration} iterations, expected at most {run.config.num_iterations}"
        )
    model = run.gathered()

    def repair() -> None:
        if not _is_saved(model, out):
            _save_model(model, out)

    run.world.run_on_main(repair)
    return model


def _save_model(model: ConsistencyModel, out: Path) -> None:
    try:
        model.save_pretrained(out)
    except BundleError as exc:
        raise TrainError(f"{exc} The last checkpoint is still there, and the same command continues from it.") from exc


def _is_saved(model: ConsistencyModel, out: Path) -> bool:
    """Return whether a folder holds exactly this model."""
    try:
        if read_config(out / CONFIG_NAME) != model.config:
            return False
        stored, own = read_tensors(out / WEIGHTS_NAME), model.network.state_dict()
    except ScmError:
        return False
    return stored.keys() == own.keys() and all(torch.equal(stored[name], own[name].cpu()) for name in own)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Result of one iteration, equal on every process: loss, residual, gradient norm, stop signal or 0."""

    loss: float
    residual: float
    norm: float
    stop: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def _step(run: Run, batch: Batch, *, stop: int) -> _Step:
    """Compute the gradient of the mean loss over the global batch, in parts and over all processes."""
    config, iteration, parts = run.config, run.state.iteration, run.scale.accumulate
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate_at(iteration)
    run.optimizer.zero_grad(set_to_none=True)
    loss_sum = residual_sum = 0.0
    for number, part in enumerate(split(batch, parts, run.world.device)):
        if run.stable_target is not None and config.kind.data_velocity:
            part = run.stable_target(part)
        seed_dropout(config, iteration, run.world.rank * parts + number)
        with reducing(run.loss, last=number == parts - 1):
            loss, residual = run.loss(part, iteration)
            if loss.requires_grad:  # during the warm-up of VSD alone, no loss depends on the student
                (loss / parts * loss_scale(config.precision)).backward()
        loss_sum += float(loss.detach())
        residual_sum += float(residual)
    unscale(run.parameters, config.precision)
    norm = clip_gradients(run.parameters, config.optimizer.grad_clip or math.inf)
    signals = [float(stop == signal.SIGTERM), float(stop == signal.SIGINT)]
    loss_mean, residual_mean, terms, ints = run.world.mean([loss_sum / parts, residual_sum / parts, *signals])
    stop = signal.SIGTERM if terms else signal.SIGINT if ints else 0
    return _Step(loss=loss_mean, residual=residual_mean, norm=norm, stop=stop)


def _checkpoint(run: Run, out: Path, log: _Log) -> None:
    """Save the averaged model, then the state, from which the run resumes."""
    model = run.gathered()
    run.world.run_on_main(lambda: _save_model(model, out))
    log.keep()
    save_run(out, run.state, run.world, sharded=run.sharded)


class _Log:
    """The run's log: one JSON line per window of iterations; only process 0 writes it."""

    def __init__(self, run: Run, out: Path, hooks: Hooks) -> None:
        self._run, self._hooks, self._path = run, hooks, out / LOG_FILE
        self._started = time.monotonic() - run.state.seconds
        self.bad = 0
        run.world.run_on_main(self._trim)

    def take(self, step: _Step) -> None:
        """Record a step; ``bad`` is the number of consecutive non-finite steps."""
        if step.finite:
            self._run.state.window.append((step.loss, step.residual, step.norm))
            self.bad = 0
        else:
            self._run.state.skipped += 1
            self.bad += 1

    def write(self) -> None:
        """Write and report the line of the window, unless none of its steps was finite."""
        state = self._run.state
        steps, state.window = state.window, []
        if not steps or not self._run.world.is_main:
            return
        losses, residuals, norms = zip(*steps, strict=True)
        line = StepLog(
            iteration=state.iteration,
            loss=sum(losses) / len(steps),
            residual=sum(residuals) / len(steps),
            grad_norm=max(norms),
            learning_rate=self._run.config.learning_rate_at(state.iteration - 1),
            skipped=state.skipped,
            seconds=round(time.monotonic() - self._started, 1),
        )
        with self._writing() as stream:
            stream.write(json.dumps(asdict(line)) + "\n")
        self._hooks.on_log(line)

    def keep(self) -> None:
        """Flush the log to disk, and store the seconds in the state."""
        self._run.state.seconds = time.monotonic() - self._started
        if self._run.world.is_main and self._path.exists():
            with self._writing() as stream:
                os.fsync(stream.fileno())

    @contextmanager
    def _writing(self) -> Iterator[TextIO]:
        try:
            with open(self._path, "a", encoding="utf-8") as stream:
                yield stream
        except OSError as exc:
            raise TrainError(
                f"{self._path} cannot be written: {exc.strerror}. Free some space or choose another disk; the last "
                "checkpoint is still there, and the same command continues from it."
            ) from exc

    def _trim(self) -> None:
        """Drop lines after the last checkpoint, which are repeated, and lines truncated by a power loss."""
        if not self._path.exists():
            return
        try:
            with open_regular(self._path) as stream:
                lines = iter(lambda: stream.readline(_MAX_LINE_BYTES), b"")
                kept = [line for line in lines if 0 < _iteration_of(line) <= self._run.state.iteration]
        except OSError as exc:
            raise TrainError(f"{self._path} cannot be read: {exc.strerror}. It is only a log: move it away.") from exc
        if sum(map(len, kept)) < self._path.stat().st_size:
            atomic_write_bytes(self._path, b"".join(kept), error=TrainError)


def _iteration_of(line: bytes) -> int:
    """Return the iteration of a line of the log; 0 for an invalid line."""
    try:
        return msgspec.json.decode(line, type=_Logged).iteration if line.endswith(b"\n") else 0
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0


class _Logged(msgspec.Struct):
    iteration: int
