"""Bundles that are served in a moment, and servers of ``scm-export serve`` in a process of their own."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from helpers.toy_bundles import write_linear_graph
from scm_sdk.bundle.bundle import publish_bundle, write_bundle
from scm_sdk.bundle.manifest import Artifact, ParityRecord
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec, default_times

if TYPE_CHECKING:
    import httpx

NAMES = ("cat", "dog", "robot")
SHAPE = (3, 8, 8)


def write_served_bundle(
    path: Path,
    *,
    steps: tuple[int, ...] = (1, 2),
    matmuls: int = 0,
    half_gain: float | None = None,
    start_time: float | None = None,
    **changes: Any,
) -> Path:
    """Write a bundle of linear graphs, labels cat, dog and robot, largest batch 4.

    Args:
        path: The folder.
        steps: One graph for each.
        matmuls: Each batch first multiplies so many 512x512 matrices, some milliseconds each.
        half_gain: Gain of a further graph that the manifest calls fp16 and records as compared; right is 0.5.
        start_time: First time of the sampler of one step, radians, which then starts from images.
        changes: Fields of the specs.
    """
    fields = {"sample_shape": SHAPE, "num_classes": 3, "class_names": NAMES, "max_batch": 4} | changes
    times = {count: default_times(count) for count in steps} | ({1: (start_time,)} if start_time else {})
    specs = [SamplerSpec(times=times[count], **fields) for count in steps]
    gains = {"fp32": 0.5} | ({} if half_gain is None else {"fp16": half_gain})
    artifacts, parity = [], []
    with publish_bundle(path) as folder:
        for precision, gain in gains.items():
            for spec in specs:
                relative = f"onnx/{precision}/{spec.num_inference_steps}step/model.onnx"
                write_linear_graph(folder / relative, spec, gain=gain)
                if matmuls:
                    slow_down(folder / relative, matmuls)
                artifacts.append(
                    Artifact(
                        path=relative, format="onnx", precision=precision, num_inference_steps=spec.num_inference_steps
                    )
                )
                exact = precision == "fp32"
                parity.append(
                    ParityRecord(
                        artifact=relative,
                        reference="checkpoint",
                        backend="onnxruntime",
                        gate="max_abs" if exact else "psnr_p05_db",
                        threshold=1e-5 if exact else 55.0,
                        noise_floor=1e-6,
                        max_abs=1e-6,
                        num_samples=32,
                        passed=True,
                    )
                )
        write_bundle(folder, name="linear", samplers=specs, artifacts=artifacts, parity=parity)
    return path


def slow_down(graph: Path, matmuls: int) -> None:
    """Let a linear graph multiply matrices of 512x512 that depend on its noise and change nothing."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(graph))
    body, last = model.graph, "work_0"
    body.initializer.append(numpy_helper.from_array(np.full((512, 512), 1 / 512, np.float32), "ones_512"))
    body.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    nodes = [
        helper.make_node("ReduceMax", [body.input[0].name], ["largest"], keepdims=0),
        helper.make_node("Mul", ["ones_512", "largest"], [last]),
    ]
    for i in range(matmuls):
        nodes.append(helper.make_node("MatMul", [last, "ones_512"], [f"work_{i + 1}"]))
        last = f"work_{i + 1}"
    nodes += [
        helper.make_node("ReduceMax", [last], ["result"], keepdims=0),
        helper.make_node("Mul", ["result", "zero"], ["nothing"]),
    ]
    final = body.node[-1]  # Identity
    nodes.append(helper.make_node("Add", [final.input[0], "nothing"], ["with_nothing"]))
    final.input[0] = "with_nothing"
    rest = list(body.node)[:-1]
    del body.node[:]
    body.node.extend([*rest, *nodes, final])
    onnx.save(model, str(graph))


@dataclass(kw_only=True)
class Server:
    """A server that listens.

    Attributes:
        url: Its address.
        http: A client of it, for any number of threads.
    """

    url: str
    http: "httpx.Client"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        """Return an open connection."""
        return socket.create_connection(self.address, timeout=600)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.http.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@dataclass(kw_only=True)
class RunningServer(Server):
    """A server in a process of its own.

    Attributes:
        process: It.
        lines: What it wrote on stderr so far.
    """

    process: subprocess.Popen[str]
    lines: list[str]

    def end(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(600)


class Held:
    """Lets a model make as many batches as a test says, so that no machine is too fast."""

    def __init__(self) -> None:
        self._changed, self._allowed = threading.Condition(), 0.0

    def let(self, batches: float = math.inf) -> None:
        """Let the model make so many more batches."""
        with self._changed:
            self._allowed += batches
            self._changed.notify_all()

    def hold(self, gen: Generator) -> Generator:
        """Let each batch of an open generator wait for ``let``."""
        backend = gen.opened().backend
        sample = backend.sample

        def wait(*inputs: Any) -> Any:
            with self._changed:
                assert self._changed.wait_for(lambda: self._allowed > 0, 600)
                self._allowed -= 1
            return sample(*inputs)

        backend.sample = wait  # type: ignore[method-assign]
        return gen


@dataclass(kw_only=True)
class HeldServer(Server):
    """A server in a thread of this process whose model waits for the test.

    Attributes:
        model: Lets it make batches.
    """

    model: Held


@contextmanager
def held(bundle: Path, **options: Any) -> Iterator[HeldServer]:
    """Serve a bundle of one number of steps in this process, by the server of ``scm-export serve``, until the end."""
    import httpx

    from scm_sdk.serve.app import make_app
    from scm_sdk.serve.metrics import Metrics
    from scm_sdk.serve.options import ServeOptions
    from scm_sdk.serve.server import _Config, _Server, listen
    from scm_sdk.serve.service import Service

    chosen = ServeOptions(bundle=bundle, port=0, **{"deadline": 600.0, "read_timeout": 600.0} | options)
    model = Held()
    gen = model.hold(Generator.from_pretrained(bundle))
    with listen(chosen) as listening, Service(gen, chosen, None, Metrics()) as service:
        server = _Server(_Config(make_app(service), chosen))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            eventually(lambda: server.started)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with httpx.Client(base_url=url, limits=httpx.Limits(max_connections=None), timeout=600) as http:
                yield HeldServer(url=url, http=http, model=model)
        finally:
            model.let()
            server.should_exit = True
            thread.join()


@contextmanager
def running(
    bundle: Path, *options: str, timeout: float = 600, env: Mapping[str, str] = MappingProxyType({})
) -> Iterator[RunningServer]:
    """Run ``scm-export serve BUNDLE`` on a free port of this machine until the context ends.

    Args:
        bundle: The bundle.
        options: Further options; the time limits are minutes unless they say otherwise.
        timeout: Seconds for the start.
        env: Further variables of its environment.
    """
    import httpx

    command = [sys.executable, "-m", "scm_sdk.export.cli", "serve", str(bundle), "--port", "0", "--threads", "1"]
    command += ["--deadline", "600", "--read-timeout", "600", "--drain-timeout", "600"]
    lines: list[str] = []
    with subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        encoding="utf-8",
        env=os.environ | dict(env),
    ) as process:
        assert process.stderr is not None
        stderr, started = process.stderr, threading.Event()

        def read() -> None:
            for line in stderr:
                lines.append(line.rstrip())
                if re.match(r"http://\S+ serves ", line):
                    started.set()
            started.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            assert started.wait(timeout), lines
            found = next((m for line in lines if (m := re.match(r"(http://\S+) serves ", line))), None)
            assert found, "\n".join(lines)
            url = found[1].replace("0.0.0.0", "127.0.0.1")
            limits = httpx.Limits(max_connections=None)
            with httpx.Client(base_url=url, limits=limits, timeout=600) as http:
                yield RunningServer(url=url, http=http, process=process, lines=lines)
        finally:
            process.kill()
            reader.join()


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer HTTP requests on a free port of this machine until the context ends; give the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def eventually(check: Any, *, timeout: float = 600) -> None:
    """Wait until a check is true."""
    until = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < until, "it did not become true"
        time.sleep(0.02)


def open_files() -> int:
    """Return how many files this process may open."""
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
