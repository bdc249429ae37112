"""Open Inference Protocol, version 2: metadata, and tensors as JSON or, by its binary extension, as bytes.

A request names images by ``seed`` and the model's other inputs, each (N,), and holds what they start from in ``image``
(N, H, W, C) uint8; the answer holds ``images`` (N, H, W, C), or clips (N, T, H, W, C), uint8, ``samples``
(N, *image_shape) float32 in data units, ``seed`` and ``class_labels``. N images are one batch of requests like any
other. Numbers of a binary tensor are little-endian.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and the extension
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..inference.prompts import EMBEDS
from ..spec import SamplerSpec
from .schemas import MAX_PROMPT, RequestError

HEADER_LENGTH = "inference-header-content-length"
"""Header with the bytes of JSON before the binary tensors."""
VERSION = "1"
"""The one version of a model."""
EXTENSIONS = ("binary_tensor_data",)
DTYPES: Mapping[str, np.dtype[Any]] = {
    "UINT64": np.dtype("<u8"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "UINT8": np.dtype("u1"),
}
"""Data types of the protocol that models take and give, in addition to BYTES."""


class Tensor(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A tensor of a request or an answer, or its description.

    Attributes:
        name: Name of the tensor.
        datatype: One of the protocol's.
        shape: With the batch axis; -1 in a description.
        parameters: ``binary_data_size`` where the data follows the JSON.
        data: The numbers in row-major order, flat or nested, where they do not follow.
    """

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class AskedOutput(msgspec.Struct, kw_only=True):
    """An output that a request names.

    Attributes:
        name: Name of the tensor.
        parameters: ``binary_data`` true asks for bytes.
    """

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, kw_only=True):
    """The JSON of a request.

    Attributes:
        inputs: Tensors.
        id: Returned as it is.
        parameters: ``num_inference_steps``, ``start_time`` (radians), ``timeout`` (microseconds),
            ``binary_data_output``.
        outputs: The requested outputs; () is the default ones.
    """

    inputs: list[Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[AskedOutput] = []


class InferResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The JSON of an answer."""

    model_name: str
    model_version: str
    outputs: list[Tensor]
    id: str = ""


class Metadata(msgspec.Struct, kw_only=True):
    """Inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def describe(name: str, platform: str, spec: SamplerSpec, *, takes_image: bool = False) -> Metadata:
    """Return a model's metadata."""
    inputs = [_described("seed", "UINT64")]
    if spec.num_classes:
        inputs.append(_described("class_labels", "INT64"))
    if spec.guidance_range is not None:
        inputs.append(_described("guidance_scale", "FP32"))
    if takes_prompt(spec):
        inputs.append(_described("prompt", "BYTES"))
    if takes_image:
        inputs.append(_described("image", "UINT8", shown_shape(spec)))
    outputs = [_described("images", "UINT8", shown_shape(spec))] if is_picture(spec) or is_clip(spec) else []
    outputs += [_described("samples", "FP32", spec.image_shape), _described("seed", "UINT64")]
    outputs += [_described("class_labels", "INT64")] if spec.num_classes else []
    return Metadata(name=name, versions=[VERSION], platform=platform, inputs=inputs, outputs=outputs)


def is_picture(spec: SamplerSpec) -> bool:
    """Return whether a sampler's outputs can be shown as 8-bit pictures."""
    return spec.output == "pixels" and len(spec.image_shape) == 3 and spec.image_shape[0] in (1, 3)


def is_clip(spec: SamplerSpec) -> bool:
    """Return whether a sampler's outputs can be shown as clips of 8-bit pictures."""
    return spec.output == "pixels" and len(spec.image_shape) == 4 and spec.image_shape[0] in (1, 3)


def shown_shape(spec: SamplerSpec) -> tuple[int, ...]:
    """Return height, width and channels of a sampler's pictures, after the number of frames where they are clips."""
    channels, *rest = spec.image_shape
    return (*rest, channels)


def takes_prompt(spec: SamplerSpec) -> bool:
    """Return whether a sampler makes pictures of a text."""
    return any(tensor.name == EMBEDS for tensor in spec.conditioning)


def _described(name: str, datatype: str, shape: Sequence[int] = ()) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=[-1, *shape])


def decode(body: bytes, header_length: str | None, known: Metadata) -> tuple[InferRequest, dict[str, Any]]:
    """Read a request.

    Args:
        body: JSON, and binary tensors behind it.
        header_length: The header ``HEADER_LENGTH``: bytes of the JSON; None where all of it is JSON.
        known: The model's metadata.

    Returns:
        The request, and its inputs by name: arrays (N, ...), and a list of N texts for ``prompt``.

    Raises:
        RequestError: ``invalid_json`` or ``invalid_value``.
    """
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and int(header_length[:12]) <= len(body)):
            raise RequestError(
                "invalid_value",
                f"{HEADER_LENGTH} is {header_length[:40]!r}, expected a number up to {len(body)}, the body.",
            )
        length = int(header_length)
    try:
        request = msgspec.json.decode(body[:length], type=InferRequest)
    except msgspec.ValidationError as exc:
        raise RequestError("invalid_value", f"{exc}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise RequestError("invalid_json", f"the body is no JSON ({exc}), expected an inference request.") from None
    rest, found = memoryview(body)[length:], dict[str, Any]()
    inputs = {tensor.name: tensor for tensor in known.inputs}
    for tensor in request.inputs:
        if tensor.name not in inputs or tensor.name in found:
            raise _wrong(tensor.name, f"input {tensor.name[:100]!r} is", f"each of {', '.join(inputs)} at most once")
        wanted = inputs[tensor.name]
        if (
            tensor.datatype != wanted.datatype
            or tensor.shape[1:] != wanted.shape[1:]
            or min(tensor.shape[:1], default=0) < 1
        ):
            raise _wrong(
                tensor.name, f"input {tensor.name} is {tensor.datatype[:20]} {tensor.shape[:8]}",
                f"{wanted.datatype} [{', '.join(['N', *map(str, wanted.shape[1:])])}], N >= 1",
            )  # fmt: skip
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            found[tensor.name] = _from_json(tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise _wrong(tensor.name, f"binary_data_size of {tensor.name} is {size!r:.40}", "bytes of the body")
            found[tensor.name] = _from_bytes(tensor, rest[:size])
            rest = rest[size:]
    if len(rest):
        raise RequestError("invalid_value", f"{len(rest)} bytes follow the last tensor, expected none.")
    counts = {len(values) for values in found.values()}
    if len(counts) != 1:
        raise RequestError(
            "invalid_value",
            f"inputs hold {sorted(counts)} values, expected the same number of each, one input or more.",
        )
    return request, found


def _from_json(tensor: Tensor) -> Any:
    data = _flat(tensor.data or [], len(tensor.shape))
    if len(data) != math.prod(tensor.shape):
        raise _wrong(tensor.name, f"data of {tensor.name} holds {len(data)} values", f"{math.prod(tensor.shape)}")
    if tensor.datatype == "BYTES":
        if not all(isinstance(text, str) and len(text) <= MAX_PROMPT for text in data):
            raise _wrong(
                tensor.name, f"data of {tensor.name} holds other values", f"texts of at most {MAX_PROMPT} characters"
            )
        return data
    dtype = DTYPES[tensor.datatype]
    kinds = (int, float) if dtype.kind == "f" else (int,)
    if not all(type(value) in kinds for value in data):
        raise _wrong(tensor.name, f"data of {tensor.name} holds other values", f"numbers of {tensor.datatype}")
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    if not all(limits.min <= value <= limits.max for value in data):  # NumPy 1 would wrap them around
        raise _wrong(tensor.name, f"data of {tensor.name} holds a larger number", f"numbers of {tensor.datatype}")
    return np.array(data, dtype).reshape(tensor.shape)


def _flat(data: list[Any], rank: int) -> list[Any]:
    """Return the values of a list that is nested to a depth of at most ``rank``."""
    for _ in range(rank - 1):
        if data and all(isinstance(each, list) for each in data):
            data = [value for each in data for value in each]
    return data


def _from_bytes(tensor: Tensor, data: memoryview) -> Any:
    count = math.prod(tensor.shape)
    if tensor.datatype != "BYTES":
        if len(data) != count * DTYPES[tensor.datatype].itemsize:
            raise _wrong(tensor.name, f"{tensor.name} has {len(data)} bytes", f"{count} numbers of {tensor.datatype}")
        return np.frombuffer(data, DTYPES[tensor.datatype]).reshape(tensor.shape)
    texts: list[str] = []
    while len(data) >= 4:
        size = int.from_bytes(data[:4], "little")
        if size > 4 * MAX_PROMPT or size > len(data) - 4:
            break
        texts.append(bytes(data[4 : 4 + size]).decode(errors="replace")[:MAX_PROMPT])
        data = data[4 + size :]
    if len(data) or len(texts) != count:
        raise _wrong(
            tensor.name, f"{tensor.name} holds {len(texts)} texts", f"{count}, each after its length in 4 bytes"
        )
    return texts


def asked_outputs(request: InferRequest, known: Metadata) -> dict[str, bool]:
    """Return the outputs to send, each with whether it is sent as bytes.

    Raises:
        RequestError: ``invalid_value`` for an output that the model does not have.
    """
    names = [tensor.name for tensor in known.outputs]
    binary = bool(request.parameters.get("binary_data_output", False))
    if not request.outputs:
        return {name: binary for name in names if name != "samples" or names[0] == "samples"}
    for output in request.outputs:
        if output.name not in names:
            raise _wrong(output.name, f"output {output.name[:100]!r} is asked for", f"some of {', '.join(names)}")
    return {output.name: bool(output.parameters.get("binary_data", binary)) for output in request.outputs}


def encode(
    name: str, request_id: str, arrays: Mapping[str, NDArray[Any]], binary: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON where bytes follow it.

    Args:
        name: The model's.
        request_id: The request's.
        arrays: The outputs.
        binary: Which of them are sent as bytes.
    """
    tensors, parts = [], []
    for key, array in arrays.items():
        datatype = next(kind for kind, dtype in DTYPES.items() if dtype == array.dtype)
        tensor = Tensor(name=key, datatype=datatype, shape=list(array.shape))
        if binary[key]:
            parts.append(np.ascontiguousarray(array, DTYPES[datatype]).tobytes())
            tensor.parameters = {"binary_data_size": len(parts[-1])}
        else:
            tensor.data = array.ravel().tolist()
        tensors.append(tensor)
    head = msgspec.json.encode(InferResponse(model_name=name, model_version=VERSION, outputs=tensors, id=request_id))
    return b"".join([head, *parts]), len(head) if parts else None


def _wrong(param: str, found: str, expected: str) -> RequestError:
    return RequestError("invalid_value", f"{found}, expected {expected}.", param=param[:100])
