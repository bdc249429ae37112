"""Parts of a model, such as text encoder, denoiser and decoder: all open, or one at a time where memory is short.

``Part`` is one of them. ``PartsBackend`` runs a sampler graph, and the graph of its decoder if that is another one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..errors import BackendFailure
from ..spec import SamplerSpec
from .backends import Backend, Graph


class Closes(Protocol):
    """Something that holds memory until it is closed."""

    def close(self) -> None:
        """Release the memory."""
        ...


T = TypeVar("T", bound=Closes)
Sample = Callable[[Sequence[np.ndarray], Mapping[str, np.ndarray]], np.ndarray]
"""``Backend.sample``."""


class Part(Generic[T]):
    """One part of a model, opened on first use; thread-safe.

    Args:
        open: Opens it.
        turn: Lock of all parts that are loaded in turn: the part is opened for each use, and closed after it. None
            keeps it open.
    """

    def __init__(self, open: Callable[[], T], turn: threading.Lock | None) -> None:
        self._open, self._turn = open, turn
        self._held: T | None = None
        self._closed = False
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @contextmanager
    def use(self) -> Iterator[T]:
        """Provide the open part; do not use another part meanwhile.

        Raises:
            BackendFailure: If the part is closed. Otherwise as ``open``.
        """
        if self._turn is None:
            yield self._keep()
            return
        with self._turn:
            self._check_open()
            part = self._open()
            try:
                yield part
            finally:
                part.close()

    def close(self) -> None:
        """Release the memory; later uses fail. In a forked process the memory is the parent's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed, held, self._held = True, self._held, None
        if held is not None:
            held.close()

    def _keep(self) -> T:
        with self._lock:
            self._check_open()
            if self._held is None:
                self._held = self._open()
            return self._held

    def _check_open(self) -> None:
        if self._closed:
            raise BackendFailure("this part of the model was closed, expected an open one. Open the generator again.")


class PartsBackend:
    """A sampler of one or two parts; see ``Backend``.

    Args:
        spec: The sampler, whose output is that of the last part.
        sampler: The graph or engine of the sampler.
        decoder: The graph that decodes its latents; None if the sampler does.
    """

    def __init__(self, spec: SamplerSpec, sampler: Part[Backend], decoder: Part[Graph] | None) -> None:
        self.spec, self._sampler, self._decoder = spec, sampler, decoder
        with sampler.use() as backend:  # parts that cannot be loaded fail here, where there may be a fallback
            self.name = str(getattr(backend, "name", type(backend).__name__))
            self.device = str(getattr(backend, "device", "cpu"))
        if decoder is not None:
            with decoder.use():
                pass

    @property
    def decodes(self) -> bool:
        """Whether the decoder is a separate part."""
        return self._decoder is not None

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        with self.sampling() as sample:
            out = sample(noise, conditioning)
        if not self.decodes:
            return out
        with self.decoding() as decode:
            return decode(out)

    @contextmanager
    def sampling(self) -> Iterator[Sample]:
        """Provide the sampler; its output is latents if ``decodes``."""
        with self._sampler.use() as backend:
            yield backend.sample

    @contextmanager
    def decoding(self) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
        """Provide the decoder: from latents ``(B, *sample_shape)`` to images ``(B, *image_shape)``, float32.

        Raises:
            BackendFailure: If its library raised, or it returned another shape.
        """
        assert self._decoder is not None, "asked only where decodes is true"
        with self._decoder.use() as decoder:

            def decode(latents: np.ndarray) -> np.ndarray:
                (images,) = decoder.run({"latents": latents})
                if images.shape != (wanted := (len(latents), *self.spec.image_shape)):
                    raise BackendFailure(
                        f"the decoder returned {images.shape}, expected {wanted}. Export the bundle again."
                    )
                return images

            yield decode

    def close(self) -> None:
        """Release the sampler; the decoder belongs to the caller, who may have other samplers of it."""
        self._sampler.close()
