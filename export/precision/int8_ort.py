"""INT8 graphs for ONNX Runtime and OpenVINO on CPUs, from ONNX Runtime's quantizer.

Engines need symmetric int8. A CPU without VNNI sums pairs of such products in 16 bits and silently saturates; unsigned
activations with 7-bit weights cannot saturate. (Unsigned 8-bit weights cannot either, but have one scale per tensor:
1.6 dB worse on the avatars.) Both libraries fuse a layer only if its output is quantized, which engines do not need.
The two forms are therefore separate files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from scm_sdk._util.files import scratch_folder
from scm_sdk._util.lazy import require
from scm_sdk.errors import ConfigError
from scm_sdk.inference.conditioning import Examples
from scm_sdk.spec import SamplerSpec

from ..graph.io import read_model, write_model
from .calibration import calibration_seeds
from .half import PRECISION_KEY
from .int8 import QuantizePlan, choose_layers
from .probe import feeds_of

if TYPE_CHECKING:
    import onnx_ir as ir


def quantize_for_cpu(
    model: ir.Model,
    spec: SamplerSpec,
    plan: QuantizePlan,
    *,
    num_samples: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    examples: Examples | None = None,
) -> ir.Model:
    """Return the int8 form of a float32 graph for CPU kernels: unsigned, min-max ranges.

    Args:
        model: The float32 sampler graph; it is not changed.
        spec: Its sampler.
        plan: The plan of excluded layers.
        num_samples: Number of calibration samples, drawn as in ``calibrate``.
        seed: Random seed of the calibration samples.
        batch_size: Batch size.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.

    Raises:
        ConfigError: If the plan does not match the graph, or excludes every layer.
        BackendUnavailable: If onnxruntime is not installed.
    """
    quantization = require("onnxruntime.quantization", extra="onnxruntime", purpose="quantizing for CPUs")
    layers = choose_layers(model, plan)
    if not layers.quantized:  # the quantizer treats an empty list as every node
        raise ConfigError("the plan leaves no layer to quantize, expected at least one. Exclude fewer layers.")
    seeds = calibration_seeds(spec, num_samples=num_samples, seed=seed, batch_size=batch_size)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.feeds = _feeds(spec, seeds, examples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with scratch_folder() as folder, _without_advice():
        source, target = folder / "source.onnx", folder / "model.onnx"
        write_model(model, source)
        kinds: Any = quantization.QuantType
        quantization.quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=kinds.QUInt8,
            weight_type=kinds.QInt8,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_quantize=list(layers.quantized),
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
        quantized = read_model(target)
        for value in quantized.graph.initializers.values():  # loaded into memory, because the folder is deleted
            if value.const_value is not None:
                value.const_value.numpy()
    quantized.metadata_props.update(model.metadata_props)
    quantized.metadata_props[PRECISION_KEY] = "int8-cpu"
    return quantized


@contextmanager
def _without_advice() -> Iterator[None]:
    """Suppress the quantizer's advice to pre-process on the root logger, which does not apply to these graphs."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root = logging.getLogger()
    root.addFilter(from_elsewhere)
    try:
        yield
    finally:
        root.removeFilter(from_elsewhere)


def _feeds(spec: SamplerSpec, seeds: Sequence[range], examples: Examples | None) -> Iterator[dict[str, np.ndarray]]:
    for some in seeds:
        yield feeds_of(spec, some, examples)
