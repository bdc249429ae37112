"""INT8 for ONNX Runtime on CPUs, by ONNX Runtime's own quantizer: another file than the engines' INT8.

Engines want symmetric int8 everywhere. A CPU without VNNI adds pairs of such products in 16 bits and
saturates, silently wrong; unsigned activations and unsigned weights do not. ONNX Runtime also fuses a
layer only when its output is quantized, which engines do not need. So the two never share a file.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scm_sdk._lazy import require
from scm_sdk.errors import ConfigError
from scm_sdk.spec import SamplerSpec

from .calibration import calibration_seeds
from .feeds import feeds_of
from .precision import PRECISION_KEY
from .quantize import QuantizePlan, choose_layers
from .write import read_model

if TYPE_CHECKING:
    import onnx_ir as ir


def quantize_for_cpu(
    graph: Path,
    spec: SamplerSpec,
    plan: QuantizePlan,
    *,
    num_samples: int = 128,
    seed: int = 0,
    batch_size: int = 8,
) -> ir.Model:
    """Return the int8 form of a float32 graph for ONNX Runtime's CPU kernels: unsigned, min-max ranges.

    Args:
        graph: The float32 sampler graph.
        spec: Its sampler.
        plan: What is not quantized.
        num_samples: Pictures to calibrate on, drawn as ``calibrate`` draws them.
        seed: Which ones.
        batch_size: Pictures at once.

    Raises:
        ConfigError: If the plan does not fit the graph, or leaves no layer to quantize.
        BackendUnavailable: If onnxruntime is not installed.
    """
    quantization = require("onnxruntime.quantization", extra="onnxruntime", purpose="quantizing for CPUs")
    source = read_model(graph)
    layers = choose_layers(source, plan)
    if not layers.quantized:  # to its quantizer an empty list means every node
        raise ConfigError("the plan leaves no layer to quantize, expected at least one. Exclude fewer layers.")
    seeds = calibration_seeds(spec, num_samples=num_samples, seed=seed, batch_size=batch_size)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.feeds = _feeds(spec, seeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, _without_advice():
        target = Path(folder) / "model.onnx"
        kinds: Any = quantization.QuantType
        quantization.quantize_static(
            str(graph),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=kinds.QUInt8,
            weight_type=kinds.QUInt8,
            per_channel=False,  # unsigned weights have a zero point; its kernels take one for the whole tensor
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_quantize=list(layers.quantized),
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
        model = read_model(target)
        for value in model.graph.initializers.values():  # into memory: the folder goes away
            if value.const_value is not None:
                value.const_value.numpy()
    model.metadata_props.update(source.metadata_props)
    model.metadata_props[PRECISION_KEY] = "int8-cpu"
    return model


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep its quantizer's advice off the root logger: pre-processing would inline what export left whole."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root = logging.getLogger()
    root.addFilter(from_elsewhere)
    try:
        yield
    finally:
        root.removeFilter(from_elsewhere)


def _feeds(spec: SamplerSpec, seeds: Sequence[range]) -> Iterator[dict[str, np.ndarray]]:
    for some in seeds:
        yield feeds_of(spec, some)
