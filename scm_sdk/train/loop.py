"""The training loop: draw a batch, step, average, log, checkpoint; run it again to go on.

A run lives in one folder: ``train.json`` (what it is), ``state.safetensors`` or ``state-ITERATION/`` (where it stands),
``config.json`` + ``diffusion_pytorch_model.safetensors`` (the averaged model, loadable at any time),
``log.jsonl`` and ``samples/``. Every iteration's randomness is a function of (seed, iteration), so a
run that was interrupted ends with the same weights as one that was not. Under ``torchrun`` the processes of
``distributed`` share the work of each iteration.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..errors import TrainError
from ..files import atomic_write_bytes
from ..model.consistency import ConsistencyModel
from .batches import Feed, seed_dropout, split
from .build import Run, build
from .config import TrainConfig
from .data import ImageData
from .distributed import Scale, World, joined, stop_signals
from .mixed import loss_scale, unscale
from .objectives import Batch
from .prepare import Prepared, claimed_folder, resolve
from .sharded_state import load_run, save_run
from .sharding import check_scale, clip_gradients, reducing

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
    """What the caller wants to see while a run goes on. Of several processes only the first reports.

    Attributes:
        on_step: Called after every iteration with the iterations done; on every process.
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


def train(
    config: TrainConfig,
    out: str | Path,
    hooks: Hooks | None = None,
    data: ImageData | None = None,
    scale: Scale | None = None,
) -> ConsistencyModel:
    """Run training to its end, from the start or from where an earlier call stopped.

    Args:
        config: The run. An existing run in ``out`` must have the same.
        out: The run's folder; on several machines one that they share.
        hooks: What to report on the way.
        data: What ``load_data(config.data)`` returned, where the caller has it already.
        scale: How to spread it over the processes that torchrun started, and each iteration over time.

    Returns:
        The averaged model, as it lies in ``out``. Of several processes of a sharded run only the first has it whole.

    Raises:
        TrainError: If the data does not fit, the folder holds another run, too many steps in a row are not finite,
            a disk is full, or another process was lost. What was saved before stays.
        ConfigError: If the run cannot be spread out so.
    """
    out, scale = Path(out), scale or Scale()
    with joined(scale) as world:
        start = world.together(lambda: _prepare(config, data, scale, world))
        with _claimed(start.config, out, world):
            run = build(start, out, scale, world)
            del start  # its models would stay in memory for the whole run
            return _iterate(run, out, hooks or Hooks())


def _prepare(config: TrainConfig, data: ImageData | None, scale: Scale, world: World) -> Prepared:
    """Load what a run starts from, and refuse one that cannot be spread out so."""
    start = resolve(config, data)
    check_scale(start.config, scale, world)
    return start


@contextmanager
def _claimed(config: TrainConfig, out: Path, world: World) -> Iterator[None]:
    """Let process 0 hold the run's folder for all."""
    with ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(claimed_folder(config, out)))
        yield


def _iterate(run: Run, out: Path, hooks: Hooks) -> ConsistencyModel:
    """Run what is left of a run's iterations, log and save on the way."""
    config, state, world = run.config, run.state, run.world
    load_run(out, state, world)
    log = _Log(run, out, hooks)
    with Feed(config, run.data, run.rows) as feed, stop_signals(world) as asked_to_stop:
        try:
            while state.iteration < config.num_iterations:
                step = _step(run, feed(state.iteration), stop=asked_to_stop())
                log.take(step)
                if step.finite:
                    run.move()
                elif log.bad >= config.max_bad_steps:
                    raise TrainError(
                        f"{log.bad} steps in a row had a loss or gradient that is not finite, at iteration "
                        f"{state.iteration}. Lower the learning rate or lengthen tangent_warmup."
                    )
                run.profiles.update(state.iteration)
                state.iteration += 1
                hooks.on_step(state.iteration)
                last = state.iteration == config.num_iterations
                if last or state.iteration % hooks.log_every == 0:
                    log.write()
                if last or step.stop or state.iteration % hooks.checkpoint_every == 0:
                    _checkpoint(run, out, log.seconds)
                if hooks.sample_every and (last or state.iteration % hooks.sample_every == 0):
                    model = run.gathered()
                    world.on_main(partial(hooks.on_sample, model, state.iteration))
                if step.stop and not last:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if world.size == 1:  # several processes have saved already, after the same iteration
                _checkpoint(run, out, log.seconds)
            raise
    return run.gathered()


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The gradient of one iteration, the same on every process: loss, residual, norm; whether any is to stop."""

    loss: float
    residual: float
    norm: float
    stop: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def _step(run: Run, batch: Batch, *, stop: bool) -> _Step:
    """Compute an iteration's gradient: that of the mean loss over the whole batch, part by part, over all processes."""
    config, iteration, parts = run.config, run.state.iteration, run.scale.accumulate
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate_at(iteration)
    run.optimizer.zero_grad(set_to_none=True)
    loss_sum = residual_sum = 0.0
    for number, part in enumerate(split(batch, parts, run.world.device)):
        if run.stable_target is not None and config.objective in ("diffusion", "sct"):
            part = run.stable_target(part)
        seed_dropout(config, iteration, run.world.rank * parts + number)
        with reducing(run.loss, last=number == parts - 1):
            loss, residual = run.loss(part, iteration)
            (loss / parts * loss_scale(config.precision)).backward()
        loss_sum += float(loss.detach())
        residual_sum += float(residual)
    unscale(run.parameters, config.precision)
    norm = clip_gradients(run.parameters, config.grad_clip or math.inf)
    loss_mean, residual_mean, stops = run.world.mean([loss_sum / parts, residual_sum / parts, float(stop)])
    return _Step(loss=loss_mean, residual=residual_mean, norm=norm, stop=stops > 0)


def _checkpoint(run: Run, out: Path, seconds: float) -> None:
    """Save where the run stands, then the averaged model."""
    run.state.seconds = seconds
    save_run(out, run.state, run.world, sharded=run.sharded)
    model = run.gathered()
    run.world.on_main(lambda: model.save_pretrained(out))


class _Log:
    """The run's log: means over a window of iterations, one JSON line each; process 0 alone writes it."""

    def __init__(self, run: Run, out: Path, hooks: Hooks) -> None:
        self._run, self._hooks, self._path = run, hooks, out / LOG_FILE
        self._window: list[_Step] = []
        self._started = time.monotonic() - run.state.seconds
        self.bad = 0
        run.world.on_main(self._trim)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all sittings."""
        return time.monotonic() - self._started

    def take(self, step: _Step) -> None:
        """Count a step; ``bad`` is how many in a row were not finite."""
        if step.finite:
            self._window.append(step)
            self.bad = 0
        else:
            self._run.state.skipped += 1
            self.bad += 1

    def write(self) -> None:
        """Write and report the line of the window, unless no step of it was finite."""
        steps, self._window = self._window, []
        if not steps or not self._run.world.is_main:
            return
        state = self._run.state
        line = StepLog(
            iteration=state.iteration,
            loss=sum(step.loss for step in steps) / len(steps),
            residual=sum(step.residual for step in steps) / len(steps),
            grad_norm=max(step.norm for step in steps),
            learning_rate=self._run.config.learning_rate_at(state.iteration - 1),
            skipped=state.skipped,
            seconds=round(self.seconds, 1),
        )
        try:
            with open(self._path, "a") as stream:
                stream.write(json.dumps(asdict(line)) + "\n")
        except OSError as exc:
            raise TrainError(
                f"{self._path} cannot be written: {exc.strerror}. Free some space or choose another disk; the last "
                "checkpoint is still there, and the same command goes on from it."
            ) from exc
        self._hooks.on_log(line)

    def _trim(self) -> None:
        """Drop what was logged after the last checkpoint: those iterations are run again."""
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            done = self._run.state.iteration
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= done]
            if kept != lines:
                atomic_write_bytes(self._path, "".join(kept).encode(), error=TrainError)
