"""Traces of requests: one span for each, with its id, and one for each of its parts. Extra: ``opentelemetry``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from .._util.lazy import require
from .._version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Attribute = str | int | float | bool


class Traces:
    """Disabled tracing: imports and sends nothing. ``OtelTraces`` sends spans."""

    def request(self, headers: Mapping[str, str]) -> AbstractContextManager[RequestSpan | None]:
        """Begin the span of a request, as a part of the trace that its ``traceparent`` header names."""
        return nullcontext()

    def part(self, name: str, attributes: Mapping[str, Attribute]) -> AbstractContextManager[object]:
        """Begin the span of a part of the current request."""
        return nullcontext()

    def close(self) -> None:
        """Send all remaining spans."""


class RequestSpan:
    """The span of a request, which ends with the request."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def trace_id(self) -> str:
        """The trace's id, 32 hexadecimal digits, for the log."""
        return format(self._span.get_span_context().trace_id, "032x")

    def finish(self, name: str, attributes: Mapping[str, Attribute], failure: BaseException | None) -> None:
        """Give the span its name and attributes, once the answer is known.

        Args:
            name: Method and route.
            attributes: By the names of OpenTelemetry's conventions for HTTP.
            failure: What the server failed with.
        """
        trace = require("opentelemetry.trace", extra="opentelemetry", purpose="traces")
        self._span.update_name(name)
        self._span.set_attributes(dict(attributes))
        if failure is not None:
            self._span.record_exception(failure)
        if failure is not None or attributes.get("http.response.status_code", 0) >= 500:  # type: ignore[operator]
            self._span.set_status(trace.StatusCode.ERROR)


class OtelTraces(Traces):
    """Sends spans to a collector by OTLP over HTTP, as OpenTelemetry's variables ``OTEL_*`` say.

    Raises:
        BackendUnavailable: If OpenTelemetry is not installed.
    """

    def __init__(self) -> None:
        def library(module: str) -> Any:
            return require(f"opentelemetry.{module}", extra="opentelemetry", purpose="--traces")

        export = library("sdk.trace.export")
        exporter = library("exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
        os.environ.setdefault("OTEL_SERVICE_NAME", "scm-serve")
        self._provider = library("sdk.trace").TracerProvider()
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("scm_sdk.serve", __version__)
        self._trace = library("trace")
        self._parent = library("trace.propagation.tracecontext").TraceContextTextMapPropagator()

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Iterator[RequestSpan]:
        """See ``Traces``."""
        above = self._parent.extract(headers)
        span = self._tracer.start_span("request", context=above, kind=self._trace.SpanKind.SERVER)
        with self._trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield RequestSpan(span)

    @contextmanager
    def part(self, name: str, attributes: Mapping[str, Attribute]) -> Iterator[object]:
        """See ``Traces``. The span does not become the current one: a generator may wait inside it."""
        span = self._tracer.start_span(name, attributes=dict(attributes))
        try:
            yield span
        finally:
            span.end()

    def close(self) -> None:
        """See ``Traces``."""
        self._provider.shutdown()
