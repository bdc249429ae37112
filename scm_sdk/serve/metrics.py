"""The metrics of a server, for Prometheus."""

from __future__ import annotations

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder in which worker processes share their metrics; set before this module is imported."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_DECIBELS = (10, 20, 25, 30, 35, 40, 45, 50, 55, 60, 70, 80, 100, 120)


class Metrics:
    """Every metric of one process, in a separate registry."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter(
            "scm_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=own
        )
        self.seconds = Histogram(
            "scm_request_seconds", "Seconds from a request's headers to the end of its answer.", ["endpoint"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.rejected = Counter(
            "scm_rejected", "Requests that were refused, by the error's code.", ["code"], registry=own
        )
        self.images = Counter("scm_images", "Images that were made.", registry=own)
        self.waiting = Gauge(
            "scm_waiting_images", "Images that were accepted and are not yet made.", registry=own,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.canceled = Counter("scm_canceled_images", "Images whose request had been canceled.", registry=own)
        self.batch_size = Histogram(
            "scm_image_batch_size", "Images in the batch in which each image was made.", buckets=_SIZES, registry=own
        )
        self.sample_seconds = Histogram(
            "scm_sample_seconds", "Seconds of the model's run in which each image was made.", buckets=_SECONDS,
            registry=own,
        )  # fmt: skip
        self.canary_samples = Counter(
            "scm_canary_samples", "Images for the reference by verdict: in_bound, out_of_bound, dropped, failed.",
            ["verdict"], registry=own,
        )  # fmt: skip
        self.canary_psnr = Histogram(
            "scm_canary_psnr_db", "PSNR of served images against the reference, dB.", buckets=_DECIBELS, registry=own
        )
        self.canary_max_abs = Gauge(
            "scm_canary_max_abs", "Largest difference from the reference so far, units of sigma_data.", registry=own,
            multiprocess_mode="max",
        )  # fmt: skip
        self.canary_bound = Gauge(
            "scm_canary_bound", "The bundle's bound by steps and gate: minimum PSNR (dB) or largest difference.",
            ["steps", "gate"], registry=own, multiprocess_mode="max",
        )  # fmt: skip
        self.canary_failed = Gauge(
            "scm_canary_failed", "1 after too many successive images were out of bound.", registry=own,
            multiprocess_mode="livemax",
        )  # fmt: skip
        self._shared = os.environ.get(MULTIPROCESS_VARIABLE)
        if not self._shared:
            ProcessCollector(registry=own)
            PlatformCollector(registry=own)

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format; of every worker where there are several."""
        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def close(self) -> None:
        """Remove this process from the gauges of live processes."""
        if self._shared:
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]
