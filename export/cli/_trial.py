"""``python -m scm_sdk.export.cli._trial BACKEND``: run a tiny sampler on one backend and print what happened.

With ``--gain`` it times matrix products instead and prints, as JSON, how many times as fast as in float32 each lower
precision is. It is a separate process because a broken library may crash it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from scm_sdk.errors import ScmError
from scm_sdk.inference.backends import BACKENDS, Backend, open_backend
from scm_sdk.spec import SamplerSpec, default_times

from .doctor import RUNS

if TYPE_CHECKING:
    from scm_sdk.bundle.engine_record import Flavor

SPEC = SamplerSpec(times=default_times(1), sample_shape=(1, 2, 2), max_batch=2)
"""Sampler of ``assets/trial.onnx``, whose image is ``GAIN`` times the noise."""
GAIN = 0.5
_ASSETS = {"litert": "trial.tflite", "executorch": "trial.pte"}
"""The same sampler in other formats, written by ``tests/export/edge/write_trials.py``."""
_GAIN_SHAPE, _GAIN_LAYERS, _GAIN_ROUNDS = (256, 1024), 4, 10


def try_backend(name: str) -> str:
    """Run the trial graph, or for PyTorch a tiny network; return ``RUNS`` or a description of the wrong result.

    Raises:
        ScmError: If the backend cannot run here.
    """
    if name == "torch":
        return _try_torch()
    asset = files("scm_sdk.assets") / _ASSETS.get(name, "trial.onnx")
    with as_file(asset) as artifact, tempfile.TemporaryDirectory() as temp:
        if BACKENDS[name].runs_engines:
            return _try_engine(name, artifact, Path(temp))
        if name == "openvino_ir":
            artifact = _as_ir(artifact, Path(temp))
        return _run(open_backend(name, artifact, SPEC))


def _as_ir(graph: Path, folder: Path) -> Path:
    """Convert a graph to OpenVINO IR for one sample."""
    from scm_sdk._util.lazy import require

    openvino = require("openvino", extra="openvino", purpose="backend 'openvino_ir'")
    model = openvino.Core().read_model(graph)
    model.reshape([1, *SPEC.sample_shape])
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


def _run(backend: Backend) -> str:
    noise = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, *SPEC.sample_shape)
    images = backend.sample([noise], {})
    backend.close()
    error = float(np.abs(images - GAIN * noise).max())
    return RUNS if error < 1e-2 else f"computes wrong numbers: {error:.1e} off, expected 0. Install it again"


def _try_engine(name: str, graph: Path, folder: Path) -> str:
    from scm_sdk._util.gpu import current_gpu
    from scm_sdk.engines.tensorrt import load_flavor, make_logger

    flavor: Flavor = "tensorrt" if name == "tensorrt" else "tensorrt_rtx"
    library = load_flavor(flavor, purpose=f"backend {name!r}")
    gpu = current_gpu()
    if gpu is None:
        if name == "tensorrt":
            return "builds and runs engines only on a GPU, and there is none here"
        library.Builder(make_logger(library))
        return "builds engines here, runs none: no GPU"
    from scm_sdk.bundle.engine_record import ENGINE_NAME

    from ..engines.engine import build_engine
    from ..engines.options import EngineOptions

    options = EngineOptions(flavor=flavor, compute_capabilities=(gpu.compute_capability,), batch=(1, 2, 2))
    build_engine(graph, folder / "engine", options)
    return _run(open_backend(name, folder / "engine" / ENGINE_NAME, SPEC, trust_engines=True))


def _try_torch() -> str:
    from scm_sdk._util.lazy import require

    torch = require("torch", extra="torch", purpose="backend 'torch'")
    from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
    from scm_sdk.model.networks.presets import PRESETS
    from scm_sdk.model.sampler import Sampler

    model = ConsistencyModel(ModelConfig(network=PRESETS["tiny"](num_classes=0, in_channels=1))).eval()
    spec = model.spec(1)
    with torch.inference_mode():
        images = Sampler(model, spec).eval()(torch.zeros(1, *spec.sample_shape))
    return RUNS if bool(torch.isfinite(images).all()) else "computes NaN. Install it again"


def gains(name: str) -> dict[str, float]:
    """Return how many times as fast as in float32 a backend computes matrix products on this CPU, by precision."""
    from scm_sdk._util.processor import BF16_CLASSES, INT8_CLASSES, cpu_class

    make = {"openvino": _openvino_products, "torch": _torch_products}.get(name)
    if make is None:
        return {}
    can_bf16 = cpu_class() in BF16_CLASSES and not BACKENDS[name].cannot_compute("bf16")
    wanted = ["bf16"] * can_bf16 + ["int8"] * (cpu_class() in INT8_CLASSES and name == "openvino")
    ways = {precision: make(precision) for precision in ("fp32", *wanted)}
    times: dict[str, list[float]] = {precision: [] for precision in ways}
    for _ in range(_GAIN_ROUNDS):
        for precision, run in ways.items():
            began = perf_counter()
            run()
            times[precision].append(perf_counter() - began)
    # The first round of each prepares its kernels.
    ratios = {p: [a / b for a, b in zip(times["fp32"][1:], times[p][1:], strict=True)] for p in wanted}
    return {precision: round(median(each), 2) for precision, each in ratios.items()}


def _openvino_products(precision: str) -> Callable[[], object]:
    import openvino
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    rows, width = _GAIN_SHAPE
    x = last = ops.parameter([rows, width], np.float32)
    for _ in range(_GAIN_LAYERS):
        weight = ops.constant(rng.standard_normal((width, width), np.float32) / np.float32(width**0.5))
        if precision == "int8":
            last = ops.fake_quantize(last, *map(np.float32, (-4, 4, -4, 4)), 256)
            weight = ops.fake_quantize(weight, *map(np.float32, (-0.2, 0.2, -0.2, 0.2)), 255)
        last = ops.matmul(last, weight, False, False)
    settings = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    model = openvino.Model([last], [x], "products")  # pyright: ignore[reportGeneralTypeIssues]
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    inputs = rng.standard_normal((rows, width), np.float32)
    return lambda: request.infer([inputs])


def _torch_products(precision: str) -> Callable[[], object]:
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator, (rows, width) = torch.Generator().manual_seed(0), _GAIN_SHAPE
    weights = [torch.randn(width, width, generator=generator).div(width**0.5).to(dtype) for _ in range(_GAIN_LAYERS)]
    x = torch.randn(rows, width, generator=generator).to(dtype)

    def run() -> object:
        last = x
        for weight in weights:
            last = last @ weight
        return last

    return run


if __name__ == "__main__":
    try:
        answer = json.dumps(gains(sys.argv[2])) if sys.argv[1] == "--gain" else try_backend(sys.argv[1])
    except ScmError as exc:
        answer = f"does not run: {exc}"
    except Exception as exc:  # of the library; its reason is what the user needs
        answer = f"does not run: {type(exc).__name__}: {exc}"
    print(" ".join(answer.split()), flush=True)
    os._exit(0)  # skip the clean-up of the library, which is not part of the trial
