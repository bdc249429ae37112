"""A bundle's recorded samples as plain files, for checks on machines without this package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import ConfigError
from scm_sdk.inference.parity.compare import FLOOR_FACTOR, MIN_PSNR_DB, ROUNDING_FLOOR
from scm_sdk.inference.request import make_example
from scm_sdk.spec import Precision, SamplerSpec

EXPECTED, IMAGES = "expected.json", "images.bin"


def write_recorded(
    bundle: Bundle, spec: SamplerSpec, precision: Precision, folder: Path, *, printed: float = 0.0
) -> int:
    """Write the inputs (``NAME.bin``), the images and what is allowed (``expected.json``) of the recorded samples.

    Args:
        bundle: The bundle.
        spec: The sampler.
        precision: Precision that the runtime computes in; it decides the gate.
        folder: Destination of the files.
        printed: Rounding error of a runtime that writes outputs as text, data units.

    Returns:
        Number of samples.

    Raises:
        ConfigError: If the bundle has no recorded samples of this number of steps.
    """
    golden = bundle.goldens().get(spec.num_inference_steps)
    if golden is None:
        steps = spec.num_inference_steps
        raise ConfigError(f"{bundle.path} has no recorded samples of {steps} steps, expected some. Export it again.")
    count = len(golden.seeds)
    request = make_example(spec, golden.seeds.tolist(), class_labels=golden.class_labels)
    noise, conditioning = request.inputs(0, count)
    feeds = {t.name: a for t, a in zip(spec.noise_inputs, noise, strict=True)} | dict(conditioning)
    for name, array in feeds.items():
        np.ascontiguousarray(array).tofile(folder / f"{name}.bin")
    golden.images.astype("<f4").tofile(folder / IMAGES)
    gates = [record for record in bundle.manifest.parity if record.gate == "max_abs"]
    floor = FLOOR_FACTOR * max((record.noise_floor for record in gates), default=0.0)
    threshold = min((record.threshold for record in gates), default=max(ROUNDING_FLOOR, floor))
    facts = {
        "output": spec.output_name,
        "shape": [count, *spec.image_shape],
        "inputs": {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in spec.inputs},
        "width": spec.value_range[1] - spec.value_range[0],
        "max_abs": threshold * spec.sigma_data + printed if precision == "fp32" else None,
        "min_psnr_db": None if precision == "fp32" else MIN_PSNR_DB[precision],
    }
    atomic_write_bytes(folder / EXPECTED, json.dumps(facts, indent=2).encode() + b"\n")
    return count
