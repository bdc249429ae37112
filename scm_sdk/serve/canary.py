"""The canary: a sampled share of the served images is computed again by the reference artifact and compared.

A server's graph, its library, its driver and its batches can all go wrong after the export was validated, and this
cannot be seen in a picture. Each sampled image is compared with the bound that the bundle records for what is served.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .._util.lazy import is_installed
from ..errors import ConfigError, ScmError
from ..inference.generator import Generator
from ..inference.output import GeneratorOutput
from ..inference.parity.compare import MIN_PSNR_DB
from ..inference.parity.difference import Difference, difference
from ..inference.session import GOLDEN_TOLERANCE
from .metrics import Metrics
from .options import ServeOptions

MOST_WAITING = 4
"""Images that may wait for the reference; further ones are not compared."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How far a served image may be from the reference.

    Attributes:
        gate: What decides, as in a parity record.
        limit: Minimum PSNR, dB, or largest difference, units of sigma_data.
        origin: Where it comes from.
    """

    gate: Literal["psnr_db", "max_abs"]
    limit: float
    origin: str

    @classmethod
    def of(cls, gen: Generator, steps: int) -> Bound:
        """Return the bound of a generator's artifact: from its parity record, or else from its precision."""
        row = gen.opened(steps).row
        records = [r for r in gen.source.parity if (r.artifact, r.backend) == (row.artifact, row.backend)]
        if records:
            gate: Literal["psnr_db", "max_abs"] = "max_abs" if records[0].gate == "max_abs" else "psnr_db"
            return cls(gate=gate, limit=records[0].threshold, origin="the bundle's parity record")
        if row.precision in MIN_PSNR_DB:
            return cls(gate="psnr_db", limit=MIN_PSNR_DB[row.precision], origin=f"the gate of {row.precision}")
        return cls(gate="max_abs", limit=GOLDEN_TOLERANCE, origin="the tolerance of recorded samples")

    def holds(self, found: Difference) -> bool:
        """Return whether an image is within the bound; one with NaN never is."""
        if not found.finite:
            return False
        return found.psnr_db >= self.limit if self.gate == "psnr_db" else found.max_abs <= self.limit


def open_reference(served: Generator, options: ServeOptions) -> Generator:
    """Open the reference for the served images: fp32 on ONNX Runtime, or PyTorch if the server runs that.

    Raises:
        ConfigError: If the bundle or this machine has nothing but what is served.
        ScmError: If it cannot be opened.
    """
    row = served.opened().row
    formats = {artifact.format for artifact in served.source.artifacts if artifact.precision == "fp32"}
    usable = {
        "onnxruntime": "onnx" in formats and is_installed("onnxruntime"),
        "torch": "safetensors" in formats and is_installed("torch"),
    }
    wanted = usable if options.shadow_backend == "auto" else {options.shadow_backend: usable[options.shadow_backend]}
    for backend, there in wanted.items():
        if there and (row.backend, row.precision) != (backend, "fp32"):
            return served.reopen(backend=backend, precision="fp32", num_threads=1, device="cpu", fallback="error")
    raise ConfigError(
        f"shadow has nothing to compare {row.backend} {row.precision} with, expected another backend with the fp32 "
        "graph (onnxruntime) or the checkpoint (torch) in the bundle and its library here. Serve another precision, "
        "keep the checkpoint in the bundle, or leave --shadow out."
    )


class Canary:
    """Compares a share of the served images, in a separate thread.

    Args:
        reference: Generator that computes the images again; closed with the canary.
        bounds: The bound for each number of steps.
        share: Of the images, 0..1.
        tolerated: Number of successive images out of bound at which the comparison fails. At a bound that 95 % of the
            images reach, five successive ones out of it have a probability of 3e-7.
        metrics: Receives the results.
    """

    def __init__(
        self, reference: Generator, bounds: Mapping[int, Bound], *, share: float, tolerated: int, metrics: Metrics
    ) -> None:
        self._reference, self._bounds, self._share, self._tolerated = reference, bounds, share, tolerated
        self._metrics = metrics
        self._waiting: queue.Queue[tuple[GeneratorOutput, int, dict[str, Any]] | None] = queue.Queue(MOST_WAITING)
        self._successive, self._largest, self.fault = 0, 0.0, ""
        for steps, bound in bounds.items():
            metrics.canary_bound.labels(str(steps), bound.gate).set(bound.limit)
        self._thread = threading.Thread(target=self._work, name="scm-canary", daemon=True)
        self._thread.start()

    def offer(self, output: GeneratorOutput, index: int, arguments: Mapping[str, Any]) -> None:
        """Queue an image for comparison, with the probability ``share``; never waits.

        Args:
            output: Of type ``raw``.
            index: Position of the image in it.
            arguments: Arguments of the request other than seed, label and steps.
        """
        if random.random() >= self._share:
            return
        try:
            self._waiting.put_nowait((output, index, dict(arguments)))
        except queue.Full:
            self._metrics.canary_samples.labels("dropped").inc()

    def close(self) -> None:
        """Compare nothing more; returns when the comparison that runs is done."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)
        self._thread.join()
        self._reference.close()

    def _work(self) -> None:
        if sys.platform == "linux":  # there a thread has its own priority, and requests come first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while (taken := self._waiting.get()) is not None:
            try:
                self._compare(*taken)
            except Exception as exc:
                self._metrics.canary_samples.labels("failed").inc()
                level = logging.WARNING if isinstance(exc, ScmError) else logging.ERROR
                _LOG.log(level, "the canary could not compare seed %d", taken[0].seeds[taken[1]], exc_info=exc)

    def _compare(self, output: GeneratorOutput, index: int, arguments: dict[str, Any]) -> None:
        steps, seed = output.info.num_inference_steps, output.seeds[index]
        label = None if output.class_labels is None else output.class_labels[index]
        wanted = self._reference(
            1, label, seed=[seed], num_inference_steps=steps, output_type="raw", **arguments
        ).images
        spec, bound = self._reference.opened(steps).spec, self._bounds[steps]
        found = difference(output.images[index : index + 1], wanted, [seed], spec)
        good = bound.holds(found)
        self._metrics.canary_samples.labels("in_bound" if good else "out_of_bound").inc()
        if found.finite:
            self._metrics.canary_psnr.observe(min(found.psnr_db, 1e3))
            self._largest = max(self._largest, found.max_abs)
            self._metrics.canary_max_abs.set(self._largest)
        self._successive = 0 if good else self._successive + 1
        if good:
            return
        text = (
            f"seed {seed} after {steps} steps: PSNR {found.psnr_db:.1f} dB, largest difference {found.max_abs:.1e}, "
            f"expected {'at least' if bound.gate == 'psnr_db' else 'at most'} {bound.limit:.3g} ({bound.origin})"
        )
        _LOG.warning("out of bound: %s", text)
        if self._successive >= self._tolerated and not self.fault:
            self.fault = f"{self._successive} successive images differ from the reference; the last: {text}"
            self._metrics.canary_failed.set(1)
            _LOG.error("the canary failed: %s", self.fault)
