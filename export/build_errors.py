"""What the builder's own words mean for the one who reads them."""

from __future__ import annotations

from collections.abc import Sequence

from scm_sdk.errors import BackendUnavailable, ConfigError, ExportError, IncompatibleEngineError, ScmError
from scm_sdk.errors import UnsupportedGraphError as Unsupported

_NO_GPU = "no GPU is here. TensorRT builds on the GPU that runs the engine; --flavor tensorrt_rtx builds ahead of time"
_WEIGHTS_APART = "the graph's weights are not beside it. Copy <name>_data too"
_MEANINGS: tuple[tuple[str, type[ScmError], str], ...] = (
    ("HW-specific datatypes", Unsupported,
     "the target cannot compute a type in the graph. BF16 needs compute capability 8.0, FP8 8.9: choose fp16 or int8"),
    ("FP32 GEMM is not supported", Unsupported,
     "TensorRT-RTX has no float32 matrix product for Turing (7.5). Use fp16 or int8 there, or --flavor tensorrt"),
    ("CUDA driver version is insufficient", BackendUnavailable, _NO_GPU),
    ("no CUDA-capable device", BackendUnavailable, _NO_GPU),
    ("Non-zero zero point", Unsupported,
     "the graph is quantized with shifted zero points. Quantize symmetrically (scm-export quantize does)"),
    ("has type Int32 but must have type", Unsupported,
     "the graph has quantized biases. Keep them in floating point (scm-export quantize does)"),
    ("Plugin not found", Unsupported, "the graph has an operator that TensorRT does not know"),
    ("must have same input types", Unsupported,
     "the graph mixes types in one operator. Put a Cast where an island ends (scm-export precision does)"),
    ("dedicated kernel", Unsupported,
     "an attention block has no kernel. Use opset 20 to 22, where attention is written out"),
    ("length out of range", ExportError, "the graph's weights are cut short. Copy or export it again"),
    ("Failed to open file", ExportError, _WEIGHTS_APART),
    ("Failed to import initializer", ExportError, _WEIGHTS_APART),
    ("MODEL_DESERIALIZE_FAILED", ExportError, "the file is no ONNX graph, or is damaged. Export it again"),
    ("cannot be found, or is not a regular file", ExportError, "the file is not there"),
    ("optimization profile", ConfigError, "the batch sizes do not fit. Expected min <= opt <= max"),
    ("libnvinfer_lean", IncompatibleEngineError,
     "such an engine needs TensorRT's lean runtime: install tensorrt-lean, or leave --version-compatible out"),
    ("graph_jit", BackendUnavailable, "this kind of engine can only be built with a GPU"),
    ("out of memory", ExportError, "the builder ran out of memory. Lower --workspace or the largest batch"),
    ("UNSUPPORTED_NODE", Unsupported, "the graph has an operator that this builder cannot run"),
)  # fmt: skip


def explain(texts: Sequence[str], *, doing: str) -> ScmError:
    """Return the error that a builder's messages amount to, the most telling one first.

    Args:
        texts: What the parser and the logger said, errors only.
        doing: What was being done; the subject of the message.
    """
    for sign, error, meaning in _MEANINGS:
        for text in texts:
            if sign in text:
                return error(f"{doing} failed: {meaning}. The builder said: {_short(text)}")
    said = _short(texts[0]) if texts else "nothing"
    return ExportError(f"{doing} failed, expected an engine. The builder said: {said}")


def _short(text: str) -> str:
    return " ".join(text.split())[:400]
