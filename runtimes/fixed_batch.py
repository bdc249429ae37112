"""The base of backends whose artifacts are made for one batch size: a batch is run in parts of that size.

Threads: ``sample`` may be called from many and runs one call at a time, because an interpreter holds its inputs and
outputs in memory of its own.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scm_sdk.errors import BackendFailure, BackendUnavailable, IntegrityError
from scm_sdk.spec import SamplerSpec, TensorSpec

from .base import check_artifact, check_images, check_inputs, check_num_threads, cuda_index

Port = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape, the batch included, of an input or output as a library reads it."""


class FixedBatchBackend(ABC):
    """One artifact of a fixed batch size; see ``Backend``.

    A subclass loads its library's model in ``load`` and runs one batch of that size in ``run``.

    Args:
        artifact_path: The artifact.
        spec: What the manifest says that it is.
        device: ``"cpu"`` or None.
        num_threads: CPU threads of one call; None is the library's choice.

    Raises:
        BackendUnavailable: If the library or the device is not here.
        IntegrityError: If the file is missing, damaged, or not of this sampler.
    """

    name: str
    device = "cpu"
    int64_as = "int64"
    """The dtype that the runtime gives int64 inputs."""

    def __init__(
        self, artifact_path: Path, spec: SamplerSpec, *, device: str | None = None, num_threads: int | None = None
    ) -> None:
        check_num_threads(num_threads)
        check_artifact(artifact_path)
        if cuda_index(device, backend=self.name) is not None:
            raise BackendUnavailable(
                f"device is {device!r}, but backend {self.name!r} runs on the CPU. Use device='cpu', or another one."
            )
        self.spec = spec
        self._lock = threading.Lock()
        self._is_open = True
        inputs, outputs = self.load(artifact_path, num_threads)
        self._batch = self._check(artifact_path, inputs, outputs)

    @abstractmethod
    def load(self, path: Path, num_threads: int | None) -> tuple[Sequence[Port], Sequence[Port]]:
        """Load the artifact and return its inputs and outputs."""

    @abstractmethod
    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one batch of the artifact's size, inputs by name in the spec's order; the result is the caller's."""

    @abstractmethod
    def unload(self) -> None:
        """Drop what ``load`` made."""

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        feeds = check_inputs(self.spec, noise, conditioning)
        feeds = {
            name: array.astype(self.int64_as) if array.dtype == np.int64 else array for name, array in feeds.items()
        }
        batch = len(noise[0])
        with self._lock:
            if not self._is_open:
                raise BackendFailure(f"this {self.name} backend was closed, expected an open one. Open it again.")
            try:
                parts = [self._part(feeds, start, batch) for start in range(0, batch, self._batch)]
            except Exception as exc:  # the libraries' exceptions share no base class
                raise BackendFailure(
                    f"{self.name} failed on a batch of {batch}: {exc}. Expected images; export the artifact again "
                    "(scm-export edge), and report it if that does not help."
                ) from exc
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return check_images(self.spec, images, batch, backend=self.name)

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._is_open = False
            self.unload()

    def _part(self, feeds: Mapping[str, np.ndarray], start: int, batch: int) -> np.ndarray:
        rows = np.minimum(np.arange(start, start + self._batch), batch - 1)  # the last part repeats its last sample
        return self.run({name: array[rows] for name, array in feeds.items()})[: batch - start]

    def _check(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> int:
        """Hold the artifact's inputs and outputs against the spec; return its batch size."""
        batch = outputs[0][2][0] if outputs and outputs[0][2] else 0
        output = TensorSpec(name=self.spec.output_name, shape=self.spec.image_shape)
        dtypes = {"float32": "float32", "int64": self.int64_as}
        wanted = [(t.name, dtypes[t.dtype], (batch, *t.shape)) for t in (*self.spec.inputs, output)]
        found = [*inputs, *outputs]
        if batch < 1 or sorted(found) != sorted(wanted):
            raise IntegrityError(
                f"{path} has inputs and outputs {_describe(found)}; expected {_describe(wanted)} from the manifest. "
                "The two are of different exports: make the artifact again with scm-export edge."
            )
        return batch


def cannot_load(backend: str, version: str, path: Path, exc: Exception) -> IntegrityError:
    """Return the error of an artifact that a library does not load."""
    said = " ".join(str(exc).split())[:400].rstrip(". ") or type(exc).__name__
    return IntegrityError(
        f"{backend} {version} cannot load {path}: {said}. Expected what scm-export "
        "edge wrote with a version of the library that is no newer; make the artifact again."
    )


def _describe(ports: Sequence[Port]) -> str:
    return ", ".join(f"{name}: {dtype} {shape}" for name, dtype, shape in ports) or "none"
