"""One backend that is open, and how it runs a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from .dispatch import Backend, Plan, PlanRow
from .output import GenerationInfo
from .request import Request
from .sources import Source
from .spec import SamplerSpec


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One backend that is open.

    Attributes:
        backend: It.
        row: The row of the plan that it came from.
        plan: The whole plan.
        spec: The sampler it runs.
        load_ms: How long opening took.
        fallback: What could not run in its place, if anything.
    """

    backend: Backend
    row: PlanRow
    plan: Plan
    spec: SamplerSpec
    load_ms: float
    fallback: str | None = None

    @property
    def device(self) -> str:
        """Where it runs, as the backend says."""
        return str(getattr(self.backend, "device", "cpu"))

    def run(
        self, request: Request, batch_size: int, report: Callable[[int], object] = lambda done: None
    ) -> tuple[np.ndarray, tuple[int, ...], dict[str, float]]:
        """Run a request batch by batch; the noise of a batch is drawn while the one before it runs.

        Returns:
            The images (N, *image_shape) float32 in data units, the size of each batch, and ``timings``: of the noise,
            what was waited for.
        """
        count = len(request)
        parts = [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        raw: np.ndarray | None = None
        noise_s = sample_s = 0.0
        began = perf_counter()
        for (start, stop), (noise, conditioning) in zip(parts, _inputs(request, parts), strict=True):
            drawn = perf_counter()
            images = self.backend.sample(noise, conditioning)
            if len(parts) == 1:
                raw = images
            else:
                raw = np.empty((count, *images.shape[1:]), np.float32) if raw is None else raw
                raw[start:stop] = images
            noise_s += drawn - began
            began = perf_counter()
            sample_s += began - drawn
            report(stop)
        assert raw is not None, "a request holds at least one image"
        timings = {"load_ms": self.load_ms, "noise_ms": noise_s * 1e3, "sample_ms": sample_s * 1e3}
        return raw, tuple(stop - start for start, stop in parts), timings

    def info(self, source: Source, *, batches: tuple[int, ...], timings: dict[str, float]) -> GenerationInfo:
        """Describe a run of this backend."""
        return GenerationInfo(
            backend=self.row.backend,
            device=self.device,
            precision=self.row.precision,
            artifact=self.row.artifact,
            sha256=source.sha256(self.row.artifact),
            build_id=source.build_id,
            model=source.status,
            num_inference_steps=self.spec.num_inference_steps,
            batches=batches,
            timings=timings,
            rejected=self.plan.rejected,
            fallback=self.fallback,
        )


def _inputs(
    request: Request, parts: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """Give noise and conditioning of each part, always one part ahead of who takes them."""
    if len(parts) == 1 or request.noise is not None:
        yield from (request.inputs(*part) for part in parts)
        return
    from concurrent.futures import ThreadPoolExecutor  # not needed for one picture, and slow to import

    with ThreadPoolExecutor(1, "scm-noise") as thread:
        ahead = thread.submit(request.inputs, *parts[0])
        for part in parts[1:]:
            ready, ahead = ahead, thread.submit(request.inputs, *part)
            yield ready.result()
        yield ahead.result()
