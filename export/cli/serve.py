"""``serve``: a bundle over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, plural, print_json, say
from .libraries import requires
from .located import model_argument
from .names import BACKEND_OR_AUTO, PRECISION_OR_AUTO


@click.command()
@model_argument("bundle", one_size=True)
@click.option("--host", default="127.0.0.1", help="Address to listen on; other than loopback needs --api-key-file.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="TCP port; 0 takes a free one.")
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE",
              help="File of accepted API keys, one per line: KEY or NAME KEY.")  # fmt: skip
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME",
              help="Further host name that requests may be sent to; may be repeated.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=1, help="Number of processes, each with the model.")
@click.option("--backend", type=BACKEND_OR_AUTO, default="auto", help="Library that runs the model.")
@click.option("--precision", type=PRECISION_OR_AUTO, default="auto", help="Precision of the artifact that runs.")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N; the CPU when absent, for engines the first GPU.")
@click.option("--threads", "num_threads", type=click.IntRange(1),
              help="CPU threads of one call; the library's choice when absent.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), multiple=True,
              help="Number of steps to offer; may be repeated; all of the bundle when absent.")  # fmt: skip
@click.option(
    "--max-queue", type=click.IntRange(1), default=64, help="Images that may wait; beyond it requests get 429."
)
@click.option("--max-images", type=click.IntRange(1), default=10, help="Images of one request.")
@click.option("--max-images-per-key", type=click.IntRange(1),
              help="Images of one API key that may wait; --max-queue when absent.")  # fmt: skip
@click.option("--deadline", type=click.FloatRange(0, min_open=True), default=30.0,
              help="Seconds from a request to its answer; what waits longer is dropped.")  # fmt: skip
@click.option("--max-body", type=click.IntRange(1),
              help="Bytes of a request's body; 1 MiB, and room for an image to start from, when absent.")  # fmt: skip
@click.option("--read-timeout", type=click.FloatRange(0, min_open=True), default=10.0,
              help="Seconds for a request's headers, for its body, and for a client to read.")  # fmt: skip
@click.option("--max-connections", type=click.IntRange(1), default=2048, help="Open connections.")
@click.option("--drain-timeout", type=click.FloatRange(0, min_open=True), default=30.0,
              help="Seconds after SIGTERM in which accepted requests are finished.")  # fmt: skip
@click.option("--shadow", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE",
              help="Share of the images that the reference artifact computes again, to be compared.")  # fmt: skip
@click.option("--shadow-backend", type=click.Choice(["auto", "onnxruntime", "torch"]), default="auto",
              help="Library that runs the reference, fp32.")  # fmt: skip
@click.option("--shadow-samples", type=click.IntRange(1), default=5,
              help="Successive images out of bound that fail /readyz.")  # fmt: skip
@click.option("--shadow-warn", is_flag=True, help="Log images out of bound, but stay ready.")
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", help="Form of the log on stderr.")
@click.option("--traces", is_flag=True,
              help="Send a trace of each request by OpenTelemetry, to where the variables OTEL_* say.")  # fmt: skip
@click.option("--trust-engines", is_flag=True, help="Run TensorRT engines that were not built on this machine.")
@json_option
@requires("starlette", "uvicorn", "prometheus_client", "python_multipart")
def serve(
    bundle: Path, host: str, port: int, api_key_file: Path | None, allowed_hosts: tuple[str, ...], workers: int,
    backend: str, precision: str, device: str | None, num_threads: int | None, steps: tuple[int, ...], max_queue: int,
    max_images: int, max_images_per_key: int | None, deadline: float, max_body: int | None, read_timeout: float,
    max_connections: int, drain_timeout: float, shadow: float, shadow_backend: str, shadow_samples: int,
    shadow_warn: bool, log_format: str, traces: bool, trust_engines: bool, as_json: bool,
) -> None:  # fmt: skip
    """Serve a bundle over HTTP.

    OpenAI's images API, the Open Inference Protocol v2, metrics for Prometheus, probes, and a page to try the model.
    SIGTERM ends it after the accepted requests. With --json it prints its address when it listens.

    \b
    scm-export serve avatars
    curl -H 'Content-Type: application/json' -H 'Accept: image/png' -o red.png \\
      -d '{"prompt": "red", "seed": 7}' http://127.0.0.1:8000/v1/images/generations
    """
    from scm_sdk.serve.options import ServeOptions
    from scm_sdk.serve.server import serve as run

    options = ServeOptions(
        bundle=bundle, host=host, port=port, api_key_file=api_key_file, allowed_hosts=allowed_hosts, workers=workers,
        backend=backend, precision=precision, device=device, num_threads=num_threads, steps=steps,
        max_queue=max_queue, max_images=max_images, max_images_per_key=max_images_per_key, deadline=deadline,
        max_body=max_body, read_timeout=read_timeout, max_connections=max_connections, drain_timeout=drain_timeout,
        shadow=shadow, shadow_backend=shadow_backend, shadow_samples=shadow_samples,  # type: ignore[arg-type]
        shadow_warn=shadow_warn, log_format=log_format, traces=traces,  # type: ignore[arg-type]
        trust_engines=trust_engines,
    )  # fmt: skip
    who = "everyone on this machine" if api_key_file is None else "holders of an API key"

    def started(address: str) -> None:
        say(f"{address} serves {bundle} to {who}, {plural(workers, 'worker')}.")
        if as_json:
            print_json({"address": address, "bundle": str(bundle), "workers": workers})

    run(options, on_start=started)
