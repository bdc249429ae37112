"""Python model of a Triton repository: seeds and labels in, pictures out.

A copy of this file is ``NAME/1/model.py``. Triton's Python backend runs it; it needs NumPy and nothing of scm-sdk. It
draws the noise of each seed by the contract ``scm-noise-v1`` (stated in ``scm_sdk/noise.py``), calls the sampler, a
model of the same repository, once for all requests of a batch, and turns its samples into 8-bit pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOW32, _SHIFT32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def standard_normal(seed: int, step: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return the noise of one sample.

    Args:
        seed: 0 <= seed < 2**64.
        step: Which noise tensor of the sampler.
        shape: Shape of one sample.
    """
    count = math.prod(shape)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    words = [blocks, np.full_like(blocks, step), np.zeros_like(blocks), np.zeros_like(blocks)]
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for round_ in range(10):  # Philox4x32-10, Salmon et al. 2011
        keys = np.uint64((low + 0x9E3779B9 * round_) & 0xFFFFFFFF), np.uint64((high + 0xBB67AE85 * round_) & 0xFFFFFFFF)
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> _SHIFT32) ^ words[1] ^ keys[0],
            second & _LOW32,
            (first >> _SHIFT32) ^ words[3] ^ keys[1],
            first & _LOW32,
        ]
    uniform = [(word.astype(np.float64) + 0.5) / 2.0**32 for word in words]
    normal = np.empty((len(blocks), 4))
    for i in (0, 2):  # Box-Muller
        radius, angle = np.sqrt(-2.0 * np.log(uniform[i])), 2.0 * math.pi * uniform[i + 1]
        normal[:, i], normal[:, i + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return normal.astype(np.float32).ravel()[:count].reshape(tuple(shape))


def draw_label(seed: int, num_classes: int) -> int:
    """Return the label of an image for which none is asked."""
    digest = hashlib.sha256(f"scm-label-v1:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % num_classes


def to_uint8(samples: NDArray[np.float32], value_range: Sequence[float]) -> NDArray[np.uint8]:
    """Return samples (N, C, H, W) in data units as pictures (N, H, W, C)."""
    low, high = value_range
    levels = (samples.astype(np.float64) - low) * (255.0 / (high - low))
    return np.ascontiguousarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def to_offset(images: NDArray[np.uint8], value_range: Sequence[float], factor: float) -> NDArray[np.float32]:
    """Return what images (N, H, W, C) add to the first noise, (N, C, H, W)."""
    low, high = value_range
    data = images.astype(np.float32) / np.float32(255) * np.float32(high - low) + np.float32(low)
    return np.float32(factor) * data.transpose(0, 3, 1, 2)


def to_png(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture (H, W, C) with C 1 or 3 as a PNG file."""
    height, width, channels = picture.shape
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class TritonPythonModel:
    """What Triton's Python backend loads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters that the exporter wrote into config.pbtxt."""
        self._pb = import_module("triton_python_backend_utils")
        parameters = json.loads(args["model_config"])["parameters"]
        self._core: str = parameters["core"]["string_value"]
        self._sampler: dict[str, Any] = json.loads(parameters["sampler"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Make the images of all requests with one call of the sampler; an error is its own request's."""
        answers: list[Any] = [None] * len(requests)
        good: list[tuple[int, dict[str, NDArray[Any]], list[int]]] = []
        for i, request in enumerate(requests):
            try:
                good.append((i, *self._inputs(request)))
            except ValueError as exc:
                answers[i] = self._pb.InferenceResponse(error=self._pb.TritonError(str(exc)))
        if good:
            tensors = [
                self._pb.Tensor(name, np.concatenate([inputs[name] for _, inputs, _ in good])) for name in good[0][1]
            ]
            output = self._sampler["output"]
            call = self._pb.InferenceRequest(
                model_name=self._core, requested_output_names=[output], inputs=tensors
            ).exec()
            start = 0
            for i, _, seeds in good:
                if call.has_error():
                    answers[i] = self._pb.InferenceResponse(error=self._pb.TritonError(call.error().message()))
                    continue
                samples = self._pb.get_output_tensor_by_name(call, output).as_numpy()
                answers[i] = self._answer(requests[i], samples[start : start + len(seeds)])
                start += len(seeds)
        return answers

    def _inputs(self, request: Any) -> tuple[dict[str, NDArray[Any]], list[int]]:
        """Return the sampler's inputs for a request, and its seeds."""
        sampler = self._sampler
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        seeds = [int(seed) for seed in given.pop("seed").ravel()]
        inputs: dict[str, NDArray[Any]] = {
            name: np.stack([standard_normal(seed, step, sampler["sample_shape"]) for seed in seeds])
            for step, name in enumerate(sampler["noise_inputs"])
        }
        if "image" in given:  # the config has it where the sampler starts from images
            offset = to_offset(given.pop("image"), sampler["value_range"], sampler["offset_factor"])
            inputs[sampler["noise_inputs"][0]] += offset
        if sampler["num_classes"]:
            drawn = [[draw_label(seed, sampler["num_classes"])] for seed in seeds]
            labels = given.pop("class_labels", np.array(drawn, np.int64))
            if not ((labels >= 0) & (labels < sampler["num_classes"])).all():
                raise ValueError(f"class_labels holds {labels.ravel()[:8]}, expected 0..{sampler['num_classes'] - 1}.")
            inputs["class_labels"] = labels
        if sampler["guidance_range"] is not None:
            low, high = sampler["guidance_range"]
            usual = sampler["default_guidance"]
            if usual is None and "guidance_scale" not in given:
                raise ValueError(f"guidance_scale is missing, expected a number in {low}..{high}.")
            scales = given.pop("guidance_scale", np.full((len(seeds), 1), usual or 0.0, np.float32))
            if not ((scales >= low) & (scales <= high)).all():
                raise ValueError(f"guidance_scale holds {scales.ravel()[:8]}, expected {low}..{high}.")
            inputs["guidance_scale"] = scales
        return inputs | given, seeds

    def _answer(self, request: Any, samples: NDArray[np.float32]) -> Any:
        if not np.isfinite(samples).all():
            return self._pb.InferenceResponse(error=self._pb.TritonError("the sampler returned NaN or infinity."))
        outputs = []
        if not self._sampler["value_range"]:
            outputs.append(self._pb.Tensor("samples", samples))
        else:
            pictures = to_uint8(samples, self._sampler["value_range"])
            outputs.append(self._pb.Tensor("images", pictures))
            if "png" in request.requested_output_names():
                files = [[to_png(picture)] for picture in pictures]
                outputs.append(self._pb.Tensor("png", np.array(files, dtype=np.object_)))
        return self._pb.InferenceResponse(output_tensors=outputs)
