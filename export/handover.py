"""Let another tool check us: inputs and reference outputs as Polygraphy reads them, and its outputs as we judge them.

A machine without a GPU writes the hand-over; one with a GPU runs ``polygraphy run`` with no scm-sdk on it, on the
graph or an engine, and either compares there or sends its outputs back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._lazy import require
from scm_sdk.bundle import Bundle
from scm_sdk.errors import ConfigError, ParityError
from scm_sdk.evaluate.difference import Difference, difference
from scm_sdk.evaluate.gate import MIN_PSNR_DB
from scm_sdk.evaluate.parity import ROUNDING_FLOOR
from scm_sdk.generator import Generator
from scm_sdk.spec import SamplerSpec

from .feeds import feeds_of

INPUTS, REFERENCE = "inputs.json", "reference.json"
_RUNNER = "scm-sdk torch fp32"


@dataclass(frozen=True, kw_only=True)
class Handover:
    """What was written.

    Attributes:
        inputs: File for ``polygraphy run --load-inputs``.
        reference: File for ``--load-outputs``.
        command: What to run where the engine runs.
    """

    inputs: Path
    reference: Path
    command: str


def write_handover(
    path: str | os.PathLike[str], folder: Path, *, steps: int, num_samples: int = 32, batch: int = 8
) -> Handover:
    """Write inputs and PyTorch's outputs for some seeds.

    Args:
        path: The bundle.
        folder: Where the two files go.
        steps: Number of steps.
        num_samples: Seeds 0, 1, ...
        batch: Samples in one iteration of Polygraphy.

    Raises:
        BackendUnavailable: If polygraphy or torch is not installed.
        ConfigError: If the bundle has no such sampler.
    """
    json, comparator = _polygraphy()
    bundle = Bundle.open(path)
    spec = bundle.spec(steps)
    size = min(batch, spec.max_batch)
    feeds = [feeds_of(spec, range(at, min(at + size, num_samples))) for at in range(0, num_samples, size)]
    outputs = []
    with Generator.from_pretrained(path, backend="torch", num_inference_steps=steps, verify="none") as gen:
        backend = gen.opened().backend
        for each in feeds:
            images = backend.sample(*_split(spec, each))
            outputs.append(comparator.IterationResult(outputs={spec.output_name: images}, runner_name=_RUNNER))
    folder.mkdir(parents=True, exist_ok=True)
    json.save_json(feeds, str(folder / INPUTS), "inputs of scm-sdk")
    comparator.RunResults([(_RUNNER, outputs)]).save(str(folder / REFERENCE))
    graph = next(a.path for a in bundle.artifacts(format="onnx", precision="fp32") if a.num_inference_steps == steps)
    command = (
        f"polygraphy run {graph} --trt --load-inputs {INPUTS} --load-outputs {REFERENCE} --atol 1e-3 --rtol 1e-3 "
        "--save-outputs outputs.json"
    )
    return Handover(inputs=folder / INPUTS, reference=folder / REFERENCE, command=command)


def check_outputs(
    path: str | os.PathLike[str], outputs: Path, *, steps: int, precision: str = "fp32", inputs: Path | None = None
) -> dict[str, Difference]:
    """Judge the outputs that ``polygraphy run --save-outputs`` wrote.

    Args:
        path: The bundle.
        outputs: Its file, made from our inputs.
        steps: Number of steps.
        precision: What ran; decides the gate.
        inputs: The inputs; None looks for ``inputs.json`` beside the outputs.

    Returns:
        The difference from PyTorch for each of Polygraphy's runners.

    Raises:
        ConfigError: If the files do not belong together or to this sampler.
        ParityError: If a runner's outputs are too far off.
    """
    json, comparator = _polygraphy()
    spec = Bundle.open(path).spec(steps)
    feeds = _load(lambda: json.load_json(str(inputs or outputs.with_name(INPUTS))), inputs or outputs.with_name(INPUTS))
    results = _load(lambda: comparator.RunResults.load(str(outputs)), outputs)
    with Generator.from_pretrained(path, backend="torch", num_inference_steps=steps, verify="none") as gen:
        wanted = np.concatenate([gen.opened().backend.sample(*_split(spec, each)) for each in feeds])
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
        _gate(runner, found[runner], precision)
    return found


def _gate(runner: str, found: Difference, precision: str) -> None:
    least = MIN_PSNR_DB.get(precision)
    if not found.finite or (least is not None and found.psnr_db < least):
        raise ParityError(
            f"{runner} differs from torch with PSNR {found.psnr_db:.1f} dB, expected at least {least or 0:.0f} dB for "
            f"{precision} and finite numbers. Do not ship it; look at seed {found.worst_seed}."
        )
    if least is None and found.max_abs > (allowed := 100 * ROUNDING_FLOOR):
        raise ParityError(
            f"{runner} differs from torch by {found.max_abs:.1e} sigma_data, expected at most {allowed:.0e} between "
            f"two right fp32 programs. Do not ship it; look at seed {found.worst_seed}."
        )


def _split(spec: SamplerSpec, feeds: Any) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    noise = [np.asarray(feeds[tensor.name]) for tensor in spec.noise_inputs]
    return noise, {t.name: np.asarray(feeds[t.name]) for t in spec.conditioning_inputs}


def _load(read: Any, path: Path) -> Any:
    try:
        return read()
    except Exception as exc:  # polygraphy's exceptions share no base class
        text = str(exc).strip() or type(exc).__name__
        raise ConfigError(f"{path} cannot be read: {text[:300]}. Expected a file that polygraphy wrote.") from exc


def _polygraphy() -> tuple[Any, Any]:
    parts = ("polygraphy.json", "polygraphy.comparator")
    json, comparator = (require(part, extra="polygraphy", purpose="a hand-over") for part in parts)
    return json, comparator
