"""Files for Polygraphy on another machine: inputs and reference outputs, and the comparison of its outputs.

This machine writes the files; a machine with a GPU runs ``polygraphy run``, without scm-sdk, on the graph or an engine,
and compares there or returns its outputs.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from scm_sdk._util.files import atomic_file
from scm_sdk._util.lazy import require
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import ConfigError, ParityError
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.parity.compare import FLOOR_FACTOR, MIN_PSNR_DB, ROUNDING_FLOOR
from scm_sdk.inference.parity.difference import Difference, difference
from scm_sdk.inference.parity.reference import noise_floor
from scm_sdk.spec import CPU_PRECISIONS, Precision, SamplerSpec

from .graph.io import data_path_of
from .precision.probe import feeds_of

INPUTS, REFERENCE = "inputs.json", "reference.json"
_RUNNER = "scm-sdk torch fp32"


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Written files.

    Attributes:
        graph: A copy of the graph; weights that are stored in a separate file are copied to the same folder.
        inputs: File for ``polygraphy run --load-inputs``.
        reference: File for ``--load-outputs``.
        command: Command to run in the folder of these files.
    """

    graph: Path
    inputs: Path
    reference: Path
    command: str


def write_handover(
    path: str | os.PathLike[str],
    folder: Path,
    *,
    steps: int,
    precision: str = "fp32",
    num_samples: int = 32,
    batch: int = 8,
) -> Handover:
    """Write a graph, inputs and PyTorch's outputs for some seeds, each file atomically.

    Args:
        path: The bundle.
        folder: Output folder; files of an earlier call are replaced.
        steps: Number of steps.
        precision: Precision of the graph that the command runs, with TensorRT, or with ONNX Runtime for CPU precisions.
        num_samples: Number of samples, seeds 0, 1, ...
        batch: Samples per iteration of Polygraphy.

    Raises:
        BackendUnavailable: If polygraphy or torch is not installed.
        ConfigError: If the bundle has no such sampler or graph.
    """
    json, comparator = _polygraphy()
    bundle = Bundle.open(path)
    bundle.check_not_split("a handover to Polygraphy")
    spec, graph = bundle.spec(steps), _graph(bundle, steps, precision)
    size = min(batch, spec.max_batch)
    feeds = [feeds_of(spec, range(at, min(at + size, num_samples))) for at in range(0, num_samples, size)]
    outputs = []
    with Generator.from_pretrained(path, backend="torch", num_inference_steps=steps, verify="none") as gen:
        backend = gen.opened().backend
        for each in feeds:
            images = backend.sample(*_split(spec, each))
            outputs.append(comparator.IterationResult(outputs={spec.output_name: images}, runner_name=_RUNNER))
        threshold = _threshold(bundle, gen, steps)
    copy = folder / Path(graph.path).name
    for source, target in (
        (bundle.file(graph.path), copy),
        (data_path_of(bundle.path / graph.path), data_path_of(copy)),
    ):
        if source.exists():
            with atomic_file(target) as temp:
                shutil.copyfile(source, temp)
        else:
            target.unlink(missing_ok=True)  # of another graph
    log = require("polygraphy.logger", extra="polygraphy", purpose="a hand-over").G_LOGGER
    with log.verbosity(log.ERROR):  # it would name the temporary files
        with atomic_file(folder / INPUTS) as temp:
            json.save_json(feeds, str(temp))
        with atomic_file(folder / REFERENCE) as temp:
            comparator.RunResults([(_RUNNER, outputs)]).save(str(temp))
    engine = ["--trt", "--strongly-typed", *_profile(spec, size)]
    arguments = ["polygraphy", "run", copy.name, *(["--onnxrt"] if graph.precision in CPU_PRECISIONS else engine)]
    arguments += ["--load-inputs", INPUTS, "--save-outputs", "outputs.json"]
    if graph.precision == "fp32":  # reduced precisions are judged by PSNR, which Polygraphy does not compute
        arguments += ["--load-outputs", REFERENCE, "--atol", f"{threshold * spec.sigma_data:.1e}", "--rtol", "0"]
    return Handover(graph=copy, inputs=folder / INPUTS, reference=folder / REFERENCE, command=shlex.join(arguments))


def check_outputs(
    path: str | os.PathLike[str], outputs: Path, *, steps: int, precision: str = "fp32", inputs: Path | None = None
) -> dict[str, Difference]:
    """Compare outputs of ``polygraphy run --save-outputs`` with the reference.

    Args:
        path: The bundle.
        outputs: The file of outputs for the written inputs.
        steps: Number of steps.
        precision: Precision that ran; it decides the gate. For fp32 the threshold recorded by ``validate``, or a newly
            derived one.
        inputs: The inputs; None is ``inputs.json`` in the folder of the outputs.

    Returns:
        The difference from PyTorch for each of Polygraphy's runners.

    Raises:
        ConfigError: If the files do not match each other or this sampler, or the precision is unknown.
        ParityError: If the outputs of a runner fail the gate.
    """
    json, comparator = _polygraphy()
    _check_precision(precision)
    bundle = Bundle.open(path)
    spec = bundle.spec(steps)
    feeds = _load(lambda: json.load_json(str(inputs or outputs.with_name(INPUTS))), inputs or outputs.with_name(INPUTS))
    results = _load(lambda: comparator.RunResults.load(str(outputs)), outputs)
    with Generator.from_pretrained(path, backend="torch", num_inference_steps=steps, verify="none") as gen:
        wanted = np.concatenate([gen.opened().backend.sample(*_split(spec, each)) for each in feeds])
        threshold = _threshold(bundle, gen, steps) if precision == "fp32" else None
    found = {}
    for runner, iterations in results:
        arrays = [np.asarray(iteration[spec.output_name]) for iteration in iterations if spec.output_name in iteration]
        got = np.concatenate(arrays) if arrays else np.zeros(0)
        if got.shape != wanted.shape:
            raise ConfigError(
                f"{outputs} holds {got.shape} of {spec.output_name!r} by {runner}, expected {wanted.shape}, the "
                f"samples of {INPUTS}. Run polygraphy with --load-inputs {INPUTS}."
            )
        found[runner] = difference(got.astype(np.float32), wanted, range(len(got)), spec)
        _gate(runner, found[runner], precision, threshold)
    return found


def _gate(runner: str, found: Difference, precision: str, threshold: float | None) -> None:
    least = MIN_PSNR_DB.get(precision)
    if not found.finite or (least is not None and found.psnr_p05_interval_db[1] < least):
        raise ParityError(
            f"95 % of the samples of {runner} reach {found.psnr_p05_db:.1f} dB of torch's, expected at least "
            f"{least or 0:.0f} dB for {precision} and finite numbers. Do not ship it; look at seed {found.worst_seed}."
        )
    if threshold is not None and found.max_abs > threshold:
        raise ParityError(
            f"{runner} differs from torch by {found.max_abs:.1e} sigma_data, expected at most {threshold:.1e} between "
            f"two right fp32 programs. Do not ship it; look at seed {found.worst_seed}."
        )


def _graph(bundle: Bundle, steps: int, precision: str) -> Artifact:
    _check_precision(precision)
    graphs = [a for a in bundle.artifacts(format="onnx") if a.num_inference_steps == steps]
    found = next((a for a in graphs if a.precision == precision), None)
    if found is None:
        there = ", ".join(a.precision for a in graphs) or "none"
        raise ConfigError(
            f"{bundle.path} has no {precision} graph of {steps} steps (it has {there}), expected one to hand over. "
            f"Make it: scm-export onnx, then scm-export precision or quantize.{bundle.manifest.cut_note}"
        )
    return found


def _check_precision(precision: str) -> None:
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}, expected one of {', '.join(get_args(Precision))}.")


def _threshold(bundle: Bundle, reference: Generator, steps: int) -> float:
    """Return the strictest recorded fp32 threshold, units of sigma_data."""
    paths = [a.path for a in bundle.artifacts(format="onnx", precision="fp32") if a.num_inference_steps == steps]
    recorded = [r.threshold for r in bundle.manifest.parity if r.artifact in paths and r.gate == "max_abs"]
    if recorded:
        return min(recorded)
    return max(ROUNDING_FLOOR, FLOOR_FACTOR * noise_floor(reference, num_inference_steps=steps))


def _profile(spec: SamplerSpec, size: int) -> list[str]:
    """Return the shapes of one optimization profile; without it Polygraphy builds for a batch of 1."""
    arguments = []
    for name, batch in (("min", 1), ("opt", size), ("max", spec.max_batch)):
        shapes = (f"{tensor.name}:[{','.join(map(str, (batch, *tensor.shape)))}]" for tensor in spec.inputs)
        arguments += [f"--trt-{name}-shapes", *shapes]
    return arguments


def _split(spec: SamplerSpec, feeds: Any) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    noise = [np.asarray(feeds[tensor.name]) for tensor in spec.noise_inputs]
    return noise, {t.name: np.asarray(feeds[t.name]) for t in spec.conditioning_inputs}


def _load(read: Any, path: Path) -> Any:
    try:
        return read()
    except Exception as exc:  # exceptions of polygraphy have no common base class
        text = str(exc).strip() or type(exc).__name__
        raise ConfigError(f"{path} cannot be read: {text[:300]}. Expected a file that polygraphy wrote.") from exc


def _polygraphy() -> tuple[Any, Any]:
    parts = ("polygraphy.json", "polygraphy.comparator")
    json, comparator = (require(part, extra="polygraphy", purpose="a hand-over") for part in parts)
    return json, comparator
