"""Compare the images of candidate graphs with those of their float32 sampler while a precision is chosen.

Runs on the CPU with the seeds of ``inference.parity.reference.SELECTION``. The gate judges on other seeds, through the
backends of users (``scm-export validate``), and ``backend="auto"`` takes only artifacts that passed there.

Batches of a small graph run concurrently, each on one thread: its matrix products are too small to gain from a second
thread, and the images then do not depend on the number of cores.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from scm_sdk._util.files import scratch_folder
from scm_sdk._util.processor import usable_cores
from scm_sdk.errors import ConfigError, ParityError
from scm_sdk.inference.conditioning import Examples, read_examples
from scm_sdk.inference.parity.difference import Difference, difference, find_blank
from scm_sdk.inference.parity.reference import SELECTION
from scm_sdk.inference.request import make_example
from scm_sdk.inference.sources import open_source
from scm_sdk.spec import SamplerSpec

from ..graph.io import read_model
from .session import Session, open_session

if TYPE_CHECKING:
    import onnx_ir as ir

T = TypeVar("T")
U = TypeVar("U")


def feeds_of(spec: SamplerSpec, seeds: Sequence[int], examples: Examples | None = None) -> dict[str, np.ndarray]:
    """Return the inputs of a graph for some seeds, equal to those of ``Generator``.

    Other conditioning, such as prompt embeddings, is a row of ``examples`` or drawn: see ``make_example``.
    """
    noise, conditioning = make_example(spec, seeds, examples=examples).inputs(0, len(seeds))
    names = (tensor.name for tensor in spec.noise_inputs)
    return {**dict(zip(names, noise, strict=True)), **conditioning}


def bundle_examples(path: str | os.PathLike[str], prompts: Path) -> Examples:
    """Read conditioning examples for a bundle; text prompts are encoded by its text encoder.

    Raises:
        ScmError: As ``Bundle.open`` and ``read_examples`` do.
    """
    source = open_source(path, verify="none")
    return read_examples(prompts, source.spec(source.default_steps, unrolled=False), source.prompts())


NUM_SAMPLES = 32
RANKED_SAMPLES = 8
"""Maximum number of images that rank graphs."""
SMALL_GRAPH = 64 * 2**20
"""Largest weights of a graph, with its decoder, whose batches run concurrently, bytes."""
MOST_CONCURRENT = 8
"""Maximum number of concurrent batches or graphs; each takes memory."""
SMALL_SAMPLE = 2**14
"""Largest sample, number of elements, of a small graph; it bounds the memory of large concurrent batches."""


class Probe:
    """Holds the images of a float32 sampler and compares other graphs of the sampler with them.

    Args:
        reference: The float32 graph.
        spec: The sampler, whose output is compared.
        decoder: Graph of the decoder, for graphs that end in latents; None if they return the output of the sampler.
        num_samples: Number of compared seeds, from ``SELECTION.start``; labels are drawn from them. More seeds reduce
            overfitting of a plan.
        batch_size: Batch size, which limits memory; None is 8, and up to 32 for a small graph.
        examples: Conditioning inputs, for example prompts; None draws them from the seed.

    Attributes:
        num_threads: Threads of each run; None is the default of the library.

    Raises:
        BackendUnavailable: If onnxruntime or onnx_ir is not installed.
        ConfigError: If ``num_samples`` is less than 1.
    """

    def __init__(
        self,
        reference: ir.Model | Path,
        spec: SamplerSpec,
        *,
        decoder: Path | None = None,
        num_samples: int = NUM_SAMPLES,
        batch_size: int | None = None,
        examples: Examples | None = None,
    ) -> None:
        if num_samples < 1:
            raise ConfigError(f"num_samples is {num_samples}, expected 1 or more.")
        self.spec = spec
        self._reference, self._decoder = reference, decoder
        graphs = [reference] if decoder is None else [reference, decoder]
        is_small = math.prod(spec.image_shape) <= SMALL_SAMPLE and sum(map(_num_bytes, graphs)) <= SMALL_GRAPH
        self.num_threads = 1 if is_small else None
        self._concurrent = min(usable_cores(), MOST_CONCURRENT) if is_small else 1
        if batch_size is None:  # small graphs: as large as leaves one for each core
            batch_size = min(max(-(-num_samples // self._concurrent), RANKED_SAMPLES), 32 if is_small else 8)
        batch = min(batch_size, spec.max_batch)
        seeds = SELECTION[:num_samples]
        self._feeds = [
            feeds_of(spec, seeds[at : at + batch], examples) for at in range(0, num_samples, batch)
        ]  # drawn once: a search runs hundreds of graphs on them
        self.images = self.run(reference)

    def map(self, function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """Yield the results of a function that runs a graph, in order; concurrently for a small graph.

        Items are taken as they are measured, because each may be a graph.
        """
        items = iter(items)
        few = [] if self._concurrent == 1 else list(islice(items, 2))
        if len(few) < 2:
            yield from map(function, chain(few, items))
            return
        waiting = deque[Future[U]]()
        with ThreadPoolExecutor(self._concurrent, "scm-probe") as threads:
            try:
                for item in chain(few, items):
                    waiting.append(threads.submit(function, item))
                    if len(waiting) > self._concurrent:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                threads.shutdown(cancel_futures=True)

    def gate_db(self, model: ir.Model | Path | Session) -> float:
        """Return the PSNR that 95 % of a graph's images reach, dB; 0 for NaN, infinite if equal.

        Raises:
            UnsupportedGraphError: If ONNX Runtime cannot run the graph on a CPU.
        """
        return self._compare(self.run(model)).psnr_p05_db

    def rank_db(self, model: ir.Model | Path | Session) -> float:
        """Return the mean PSNR of single images of the first batch, dB, for ranking many graphs.

        An image that turns into another one has little influence, while it would dominate the PSNR over all images.

        Raises:
            UnsupportedGraphError: If ONNX Runtime cannot run the graph on a CPU.
        """
        images = self._run(model, [{name: array[:RANKED_SAMPLES] for name, array in self._feeds[0].items()}])
        return float(np.mean([self._compare(images[i : i + 1], i).psnr_db for i in range(len(images))]))

    def noise_rounding_db(self) -> float:
        """Return the PSNR that 95 % of the images reach if only the noise is rounded to float16, dB.

        It measures the amplification of rounding by the network; an FP16 graph is rarely better.
        """
        inputs = [dict(feeds) for feeds in self._feeds]
        for feeds in inputs:
            for tensor in self.spec.noise_inputs:
                feeds[tensor.name] = feeds[tensor.name].astype(np.float16).astype(np.float32)
        return self._compare(self._run(self._reference, inputs)).psnr_p05_db

    def check_not_blank(self, model: ir.Model | Path | Session, what: str) -> None:
        """Refuse a graph whose images are blank or all alike while those of the reference are not.

        Raises:
            ParityError: If they are, or are not finite.
            UnsupportedGraphError: If ONNX Runtime cannot run the graph on a CPU.
        """
        images = self.run(model)
        fault = find_blank(images, self.images) or ("" if np.isfinite(images).all() else "samples hold NaN or infinity")
        if fault:
            raise ParityError(
                f"{what}: {fault}. Nothing was added. Keep more layers in float32: scm-export quantize --exclude "
                "PATTERN, or take a higher precision."
            )

    def run(self, model: ir.Model | Path | Session) -> np.ndarray:
        """Return the images of a graph for the probe's seeds, ``(N, *image_shape)`` float32."""
        return self._run(model, self._feeds)

    def _run(self, model: ir.Model | Path | Session, inputs: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        with scratch_folder() as folder:
            session = model
            if not isinstance(session, Session):
                session = open_session(session, folder, num_threads=self.num_threads, cpu_bf16=True)
            outputs = list(self.map(lambda feeds: session.run(None, feeds)[0], inputs))
            if self._decoder is not None:
                decoder = open_session(self._decoder, folder, num_threads=self.num_threads)
                outputs = list(self.map(lambda latents: decoder.run(None, {"latents": latents})[0], outputs))
        return np.concatenate(outputs)

    def _compare(self, images: np.ndarray, first: int = 0) -> Difference:
        """Compare images with those of the reference from ``first``; non-finite images have 0 dB."""
        seeds = SELECTION[first : first + len(images)]
        found = difference(images, self.images[first : first + len(images)], seeds, self.spec)
        return found if found.finite else replace(found, psnr_db=0.0, psnr_p05_db=0.0)


def _num_bytes(graph: ir.Model | Path) -> int:
    """Return the size of the weights of a graph, bytes; those of a further image size are in the file of the first."""
    model = read_model(graph) if isinstance(graph, Path) else graph
    weights = (value.const_value for value in model.graph.initializers.values())
    return sum(weight.nbytes for weight in weights if weight is not None)
