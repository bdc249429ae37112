"""Traces of requests: what a collector receives, and that nothing of OpenTelemetry is loaded without ``--traces``."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers.servers import answering, eventually, running
from scm_sdk.errors import BackendUnavailable
from scm_sdk.serve.options import ServeOptions
from scm_sdk.serve.service import Service

IMAGES = "/v1/images/generations"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Run a collector of OTLP over HTTP; give its address and the spans that it received."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with answering(Handler) as url:
        yield url, spans


def attributes(span: Any) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value"))
        for each in span.attributes
    }  # fmt: skip


def test_requests_are_traced_with_their_ids_and_parts(served_bundle: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra opentelemetry")
    with collector() as (address, spans):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "NO_PROXY": "127.0.0.1"}
        with running(served_bundle, "--traces", env=env) as server:
            headers = {"X-Request-Id": "order-7", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            assert server.http.post(IMAGES, json={"seed": 1}, headers=headers).status_code == 200
            assert server.http.post(IMAGES, json={"n": 0}).status_code == 400
            assert server.http.get("/healthz").status_code == 200
            assert server.end() == 0  # what was not sent is sent before the end
            eventually(lambda: any('"order-7"' in line for line in server.lines))
            (line,) = [json.loads(line) for line in server.lines if '"order-7"' in line]
    made, refused = sorted(
        (span for span in spans if span.name == f"POST {IMAGES}"), key=lambda s: s.start_time_unix_nano
    )
    assert (made.trace_id.hex(), made.parent_span_id.hex(), line["trace_id"]) == (TRACE, PARENT, TRACE)
    found = attributes(made)
    assert (found["scm.request_id"], found["http.response.status_code"], found["scm.images"]) == ("order-7", 200, 1)
    parts = {span.name: span for span in spans if span.parent_span_id == made.span_id}
    assert set(parts) == {"generate", "encode"}
    assert attributes(parts["generate"])["scm.num_inference_steps"] == 2
    assert all(made.start_time_unix_nano <= part.start_time_unix_nano for part in parts.values())
    assert all(part.end_time_unix_nano <= made.end_time_unix_nano for part in parts.values())
    assert attributes(refused)["error.type"] == "invalid_value" and refused.trace_id != made.trace_id
    assert {span.name for span in spans} == {f"POST {IMAGES}", "generate", "encode"}, "probes are not traced"


def test_a_server_whose_collector_is_absent_answers(served_bundle: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra opentelemetry")
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1", "NO_PROXY": "*"}
    with running(served_bundle, "--traces", env=env) as server:
        assert server.http.post(IMAGES, json={"seed": 1}).status_code == 200
        assert server.end() == 0


def test_traces_without_their_library_are_refused(served_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.sdk.trace", "opentelemetry.sdk.trace.export"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailable, match=r"--traces needs opentelemetry.*Install it with"):
        Service.open(ServeOptions(bundle=served_bundle, traces=True))


def test_nothing_of_opentelemetry_is_loaded_without_the_option(served_bundle: Path) -> None:
    code = """
import sys
from scm_sdk.serve import server, service, options
with service.Service.open(options.ServeOptions(bundle=sys.argv[1])): pass
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(served_bundle)], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout == "[]\n"
