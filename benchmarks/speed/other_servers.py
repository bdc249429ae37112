"""The graph of a bundle in the hands of other servers, for serve.py: FastAPI, Ray Serve and NVIDIA Triton.

    python benchmarks/speed/other_servers.py fastapi BUNDLE PORT

Each answers a request for the picture of a seed with the PNG file of ``Generator``. FastAPI calls the generator in its
pool of threads, one picture a call. Ray Serve has a replica for each core and collects batches with ``@serve.batch``.
Triton runs the repository of ``scm-export triton``; the wheel that brings it has no backend for ONNX Runtime, so its
Python backend runs the graph. In Triton 2.51 some calls from one Python model to another take 500 ms longer, as its
p95 shows; calls of the graph's model alone do not.
"""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scm_sdk import Generator
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.export.triton_repository import write_triton_repository
from scm_sdk.images import encode_picture

PATH = "/v1/images/generations"
STAND_IN = """
import json, os
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.scalars = {each["name"] for each in config["input"] if "reshape" in each}
        self.output = config["output"][0]["name"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options)

    def execute(self, requests):
        answers = []
        for request in requests:
            feeds = {each.name(): each.as_numpy() for each in request.inputs()}
            for name in self.scalars & set(feeds):
                feeds[name] = feeds[name].reshape(-1)
            output = pb_utils.Tensor(self.output, self.session.run([self.output], feeds)[0])
            answers.append(pb_utils.InferenceResponse([output]))
        return answers
"""
"""The graph in Triton's Python backend."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers.

    Attributes:
        port: Its port on this machine.
        pid: Its process; it may have others below it.
        start_seconds: From the start of the process to the first answer.
        request: Returns the bytes of the request for a seed's picture.
        picture: Returns the PNG file of an answer's head and body.
    """

    port: int
    pid: int
    start_seconds: float
    request: Callable[[int], bytes]
    picture: Callable[[bytes, bytes], bytes]


def openai_request(seed: int) -> bytes:
    """Return a request of OpenAI's images API for one PNG file."""
    return post(PATH, b'{"seed": %d}' % seed, b"Accept: image/png\r\n")


def post(path: str, body: bytes, headers: bytes = b"") -> bytes:
    """Return a request as bytes."""
    return (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
        % (path.encode(), headers, len(body), body)
    )


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def answers(port: int, request: bytes) -> bool:
    """Return whether a server answers a request with 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(request)
            return client.recv(64).split(b" ")[1:2] == [b"200"]
    except OSError:
        return False


@contextmanager
def python_server(kind: str, bundle: Path) -> Iterator[Served]:
    """Run this file as a server."""
    port = free_port()
    command = [sys.executable, __file__, kind, str(bundle.resolve()), str(port)]
    variables = os.environ | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    with started(command, variables, port, openai_request) as served:
        yield served


def run_graph_in_python(repository: Path, name: str) -> None:
    """Let Triton's Python backend run the graph of a repository's model."""
    core = repository / f"{name}_core"
    config = (core / "config.pbtxt").read_text(encoding="utf-8")
    (core / "config.pbtxt").write_text(config.replace('backend: "onnxruntime"', 'backend: "python"'), encoding="utf-8")
    (core / "1" / "model.py").write_text(STAND_IN, encoding="utf-8")


def triton_command(environment: Path, repository: Path, backends: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command and the variables that serve a repository by the tritonserver of a Python environment.

    Args:
        environment: It holds nvidia-pytriton, numpy<2 and onnxruntime.
        repository: The models.
        backends: Folder for the server's Python backend.
        port: Of HTTP, on this machine.
    """
    (site,) = environment.glob("lib/python*/site-packages")
    server = site / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(server / "backends" / "python", backends / "python", dirs_exist_ok=True)
    shutil.copy(stub / "triton_python_backend_stub", backends / "python")
    variables = os.environ | {
        # The stub's Python finds its packages by the first python3 of PATH.
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{Path(sys.base_prefix) / 'lib'}",
    }
    variables.pop("PYTHONPATH", None)
    command = [
        str(server / "bin" / "tritonserver"), f"--model-repository={repository}", "--allow-grpc", "false",
        f"--backend-directory={backends}", "--http-address", "127.0.0.1", "--http-port", str(port),
        "--allow-metrics", "false", "--model-control-mode=none", "--disable-auto-complete-config",
    ]  # fmt: skip
    return command, variables


@contextmanager
def triton(environment: Path, bundle: Path) -> Iterator[Served]:
    """Run the tritonserver of a Python environment that holds nvidia-pytriton, numpy<2 and onnxruntime."""
    port, name = free_port(), Bundle.open(bundle).manifest.name
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        write_triton_repository(bundle, repository, precision="fp32")
        run_graph_in_python(repository, name)
        command, variables = triton_command(environment, repository, Path(folder) / "backends", port)

        def request(seed: int) -> bytes:
            body = (
                b'{"inputs":[{"name":"seed","shape":[1,1],"datatype":"UINT64","data":[%d]}],'
                b'"outputs":[{"name":"png","parameters":{"binary_data":true}}]}' % seed
            )
            return post(f"/v2/models/{name}/infer", body)

        def picture(head: bytes, body: bytes) -> bytes:
            found = re.search(rb"inference-header-content-length: (\d+)", head, re.IGNORECASE)
            assert found is not None, head
            return body[int(found[1]) + 4 :]  # after the length of the one text

        with started(command, variables, port, request, picture) as served:
            yield served


@contextmanager
def started(
    command: list[str], variables: dict[str, str], port: int, request: Callable[[int], bytes],
    picture: Callable[[bytes, bytes], bytes] = lambda head, body: body,
) -> Iterator[Served]:  # fmt: skip
    """Run a server until the context ends; give it when it answers."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, env=variables, stdout=log, stderr=log) as process:
        try:
            while not answers(port, request(0)):
                if process.poll() is not None or time.perf_counter() - begin > 300:
                    log.seek(0)
                    sys.exit(f"{command} does not answer:\n{log.read()[-4000:].decode(errors='replace')}")
                time.sleep(0.05)
            ready = time.perf_counter() - begin
            yield Served(port=port, pid=process.pid, start_seconds=ready, request=request, picture=picture)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def run_fastapi(bundle: str, port: int) -> None:
    """Serve a bundle as a FastAPI application does that knows nothing of batches."""
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool

    gen, app = open_generator(bundle), FastAPI()

    def make(seed: int) -> bytes:
        return encode_picture(gen(seed=seed, output_type="uint8").images[0], ".png")

    async def generate(request: Request) -> Response:
        asked = await request.json()
        return Response(await run_in_threadpool(make, asked["seed"]), media_type="image/png")

    app.add_api_route(PATH, generate, methods=["POST"])
    uvicorn.run(app, port=port, access_log=False)


def run_ray(bundle: str, port: int) -> None:
    """Serve a bundle by Ray Serve, with batches."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from starlette.requests import Request
    from starlette.responses import Response

    class Pictures:
        def __init__(self) -> None:
            self.gen = open_generator(bundle)

        @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.002)  # type: ignore[untyped-decorator, unused-ignore]
        async def make(self, seeds: list[int]) -> list[bytes]:
            out = await asyncio.to_thread(self.gen, len(seeds), seed=seeds, output_type="uint8")
            return [encode_picture(image, ".png") for image in out.images]

        async def __call__(self, request: Request) -> Response:
            return Response(await self.make((await request.json())["seed"]), media_type="image/png")

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    options: dict[str, Any] = {
        "num_replicas": os.cpu_count(), "max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": 0.5},
    }  # fmt: skip
    serve.run(serve.deployment(**options)(Pictures).bind())
    threading.Event().wait()


def open_generator(bundle: str) -> Generator:
    """Return the generator that every server of Python has."""
    return Generator.from_pretrained(bundle, backend="onnxruntime", precision="fp32", num_threads=1)


if __name__ == "__main__":
    {"fastapi": run_fastapi, "ray": run_ray}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
