"""The base of all backends, and the checks between a caller and a library.

The protocol ``Backend`` is defined in ``scm_sdk.inference.backends``, because ``Generator`` uses it as well. A new
backend is one file with a class that uses this module and is also named ``open_backend``, and one entry in
``scm_sdk.inference.backends.BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk._util.files import unreadable
from scm_sdk._util.gpu import parse_device
from scm_sdk.errors import BackendFailure, ConfigError, IntegrityError, ShapeError
from scm_sdk.inference.backends import Backend
from scm_sdk.spec import SamplerSpec, TensorSpec

__all__ = [
    "SPEC_KEY",
    "Backend",
    "LoadedGraph",
    "check_artifact",
    "check_graph",
    "check_images",
    "check_inputs",
    "check_num_threads",
    "check_tensors",
    "cuda_index",
    "first_line",
    "name_inputs",
]

SPEC_KEY = "scm_spec"
"""Metadata key of a graph for the JSON of its spec."""


class LoadedGraph:
    """A graph that is no sampler, loaded by a library; see ``backends.Graph``.

    Args:
        path: The file, for messages.
        infer: Runs the graph: arrays by input name to the outputs in order. It holds the memory of the graph.
        library: Name of the library, for messages.
        errors: Exceptions of the library.
        explain: Returns the message of such an exception.
    """

    def __init__(
        self,
        path: Path,
        infer: Callable[[dict[str, np.ndarray]], list[np.ndarray]],
        *,
        library: str,
        errors: type[Exception],
        explain: Callable[[Exception], str],
    ) -> None:
        self._path, self._library, self._errors, self._explain = path, library, errors, explain
        self._infer: Callable[[dict[str, np.ndarray]], list[np.ndarray]] | None = infer

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for inputs of the declared shapes and dtypes, axis 0 is the batch.

        Raises:
            BackendFailure: If the library raised, or the graph is closed.
        """
        infer = self._infer
        if infer is None:
            raise BackendFailure(f"{self._path} was closed, expected an open graph. Open it again.")
        try:
            return infer({name: np.ascontiguousarray(array) for name, array in feeds.items()})
        except self._errors as exc:
            raise BackendFailure(
                f"{self._library} failed on {self._path}: {self._explain(exc)}. Expected an output; report it if "
                "memory suffices."
            ) from exc

    def close(self) -> None:
        """Release the graph and its memory."""
        self._infer = None


def check_inputs(
    spec: SamplerSpec, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Check inputs against ``spec``, for clearer errors than those of the libraries.

    Values (NaN, label range) are not checked; ``Generator`` checks them once per request.

    Args:
        spec: The sampler.
        noise: One ``(B, *sample_shape)`` float32 array per ``spec.noise_inputs``, 1 <= B <= ``spec.max_batch``.
        conditioning: Exactly the tensors of ``spec.conditioning_inputs`` by name, ``(B, *shape)``.

    Returns:
        Every input by name in the order of ``spec.inputs``, C-contiguous.

    Raises:
        ShapeError: If an array is missing, unexpected, or of another shape or dtype.
    """
    feeds = name_inputs(spec, noise, conditioning)
    batch = noise[0].shape[0] if noise[0].ndim else 0
    if not 1 <= batch <= spec.max_batch:
        raise ShapeError(
            f"noise_0 has shape {noise[0].shape}, a batch of {batch}; expected 1..{spec.max_batch}. "
            "Split larger requests, as Generator does."
        )
    for tensor in _tensors(spec)[2]:
        feeds[tensor.name] = _checked(tensor, feeds[tensor.name], batch)
    return feeds


def name_inputs(spec: SamplerSpec, noise: Sequence[Any], conditioning: Mapping[str, Any]) -> dict[str, Any]:
    """Return every input by name in the order of ``spec.inputs``; arrays of any library.

    Raises:
        ShapeError: If an input is missing or unexpected.
    """
    noise_inputs, conditioning_inputs, inputs = _tensors(spec)
    if len(noise) != len(noise_inputs):
        raise ShapeError(
            f"noise holds {len(noise)} arrays, expected {len(noise_inputs)}: "
            f"{', '.join(tensor.name for tensor in noise_inputs)}. scm_sdk.noise.draw_noise makes them."
        )
    wanted = {tensor.name for tensor in conditioning_inputs}
    if wanted != set(conditioning):
        raise ShapeError(f"conditioning holds {sorted(conditioning)}, expected exactly {sorted(wanted)}.")
    named = {tensor.name: array for tensor, array in zip(noise_inputs, noise, strict=True)} | dict(conditioning)
    return {tensor.name: named[tensor.name] for tensor in inputs}


def check_images(spec: SamplerSpec, images: object, batch: int, *, backend: str) -> np.ndarray:
    """Check that a library returned a float32 array ``(B, *image_shape)``, or raise ``BackendFailure``."""
    shape = (batch, *spec.image_shape)
    if not isinstance(images, np.ndarray) or images.shape != shape or images.dtype != np.float32:
        found = f"{images.shape} {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise BackendFailure(
            f"{backend} returned {found}, expected {shape} float32. "
            "The artifact does not do what its spec says: export it again."
        )
    return images


def check_graph(
    spec: SamplerSpec, found: Sequence[tuple[str, str, tuple[object, ...]]], spec_text: str, path: Path
) -> None:
    """Compare inputs, output and metadata of an ONNX graph with the spec of the manifest.

    Args:
        spec: The sampler in the manifest.
        found: Name, dtype and shape without the batch of each input, then of each output, as the library reads them.
        spec_text: Metadata of the graph under ``SPEC_KEY``, or nothing.
        path: The graph, for messages.

    Raises:
        IntegrityError: If they belong to different exports.
    """
    output = TensorSpec(name=spec.output_name, shape=spec.image_shape)
    expected = [_describe(t.name, t.dtype, t.shape) for t in (*spec.inputs, output)]
    described = [_describe(*each) for each in found]
    if described != expected:
        raise IntegrityError(
            f"{path} has inputs and output {', '.join(described)}; expected {', '.join(expected)} "
            "from the manifest. The two are of different exports: export the bundle again."
        )
    if not spec_text:
        raise IntegrityError(
            f"{path} has no {SPEC_KEY!r} in its metadata, expected the sampler's spec. Export it again."
        )
    if SamplerSpec.from_json(spec_text) != spec:
        raise IntegrityError(
            f"{path} carries the spec {spec_text}, expected the manifest's {spec.to_json()}. "
            "The two are of different exports: export the bundle again."
        )


def check_tensors(
    found: Sequence[tuple[str, str, tuple[object, ...]]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
) -> None:
    """Compare inputs and outputs of a graph that is no sampler with what they should be.

    Args:
        found: As in ``check_graph``.
        inputs: The expected inputs in order.
        outputs: The expected outputs in order.
        path: The graph, for messages.

    Raises:
        IntegrityError: If they differ.
    """
    expected = [_describe(t.name, t.dtype, t.shape) for t in (*inputs, *outputs)]
    described = [_describe(*each) for each in found]
    if described != expected:
        raise IntegrityError(
            f"{path} has inputs and outputs {', '.join(described)}, expected {', '.join(expected)}. Export the bundle "
            "again."
        )


def check_artifact(path: Path, *, is_folder: bool = False) -> None:
    """Raise ``IntegrityError`` unless the artifact of a backend exists and can be read."""
    if not (path.is_dir() if is_folder else path.is_file()):
        kind = "folder" if is_folder else "file"
        raise IntegrityError(f"{path} is not there, expected a {kind}. Export the bundle again or copy it whole.")
    try:
        files = list(path.iterdir() if is_folder else path.parent.glob(f"{escape(path.name)}*"))  # its external data
        for file in files:
            if file.is_file():
                open(file, "rb").close()
    except OSError as exc:  # the errors of the libraries are less precise
        raise unreadable(exc.filename or path, exc) from exc


def check_num_threads(num_threads: int | None) -> None:
    """Raise ``ConfigError`` unless ``num_threads`` is None (the library chooses) or at least 1."""
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"num_threads is {num_threads}, expected 1 or more, or None for the library's choice.")


def cuda_index(device: str | None, *, backend: str) -> int | None:
    """Return N of ``"cuda:N"``, 0 for ``"cuda"`` and None for ``"cpu"`` or None; else raise ``ConfigError``."""
    kind, index = parse_device(device or "cpu")
    if kind == "cpu" and index is None:
        return None
    if kind != "cuda":
        raise ConfigError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N' for backend {backend!r}.")
    return index or 0


def first_line(exc: Exception) -> str:
    """Return the first line of a library's message, without its full stop."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(". ")


def _describe(name: str, dtype: str, shape: Sequence[object]) -> str:
    return f"{name}: {dtype} (batch{''.join(f', {axis}' for axis in shape)})"


@lru_cache(maxsize=64)
def _tensors(spec: SamplerSpec) -> tuple[tuple[TensorSpec, ...], ...]:
    """Return noise inputs, conditioning inputs and all inputs of a spec; cached, because the properties build them."""
    return spec.noise_inputs, spec.conditioning_inputs, spec.inputs


def _checked(tensor: TensorSpec, array: np.ndarray, batch: int) -> np.ndarray:
    shape = (batch, *tensor.shape)
    if array.shape != shape or array.dtype != np.dtype(tensor.dtype):
        raise ShapeError(
            f"{tensor.name} is {array.shape} {array.dtype}, expected {shape} {tensor.dtype}: "
            "the batch first, the same for every input."
        )
    return np.ascontiguousarray(array)
