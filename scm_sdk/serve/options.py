"""``ServeOptions``: model, address and limits of a server."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..errors import ConfigError

LogFormat = Literal["json", "text"]
ShadowBackend = Literal["auto", "onnxruntime", "torch"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of ``scm-export serve``. Limits hold for each worker process.

    Attributes:
        bundle: Folder of a bundle, a ``.scmz`` file, or ``hf:owner/name``.
        host: Address to listen on. Only a loopback address may do without ``api_key_file``.
        port: TCP port; 0 takes a free one.
        api_key_file: File of the accepted API keys, one per line: ``KEY`` or ``NAME KEY``. None asks for none.
        allowed_hosts: Further host names that requests may name in ``Host``, in addition to IP addresses and localhost.
        workers: Processes, each with the model.
        backend: As for ``Generator.from_pretrained``.
        precision: As for ``Generator.from_pretrained``.
        device: As for ``Generator.from_pretrained``.
        num_threads: CPU threads of one call; None is the library's choice.
        trust_engines: As for ``Generator.from_pretrained``.
        steps: Numbers of steps to load and offer; () is every one of the bundle.
        max_queue: Images that are accepted and not yet made.
        max_images: Images of one request.
        max_images_per_key: Images of one API key that are accepted and not yet made; None is ``max_queue``.
        deadline: Seconds from a request to its answer. What waits longer is dropped and answered with 503.
        max_body: Bytes of a request's body; None is 1 MiB, and for a model that starts from images as much more as one
            takes.
        read_timeout: Seconds for a request's headers, for its body, and for a client to read what was sent.
        max_connections: Open connections; further ones are answered with 503.
        drain_timeout: Seconds after SIGTERM in which accepted requests are finished.
        shadow: Share of the images, 0..1, that the reference artifact computes again.
        shadow_backend: What runs the reference: ``auto`` is ONNX Runtime's fp32 graph unless that is what is served,
            then PyTorch.
        shadow_samples: Successive images out of bound that fail the readiness check.
        shadow_warn: Only warn in the log and the metrics; stay ready.
        log_format: ``json`` lines or ``text``, on stderr.
        traces: Send a span of each request to the collector that the variables ``OTEL_*`` name.
    """

    bundle: str | os.PathLike[str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | os.PathLike[str] | None = None
    allowed_hosts: tuple[str, ...] = ()
    workers: int = 1
    backend: str = "auto"
    precision: str = "auto"
    device: str | None = None
    num_threads: int | None = None
    trust_engines: bool = False
    steps: tuple[int, ...] = ()
    max_queue: int = 64
    max_images: int = 10
    max_images_per_key: int | None = None
    deadline: float = 30.0
    max_body: int | None = None
    read_timeout: float = 10.0
    max_connections: int = 2048
    drain_timeout: float = 30.0
    shadow: float = 0.0
    shadow_backend: ShadowBackend = "auto"
    shadow_samples: int = 5
    shadow_warn: bool = False
    log_format: LogFormat = "json"
    traces: bool = False

    is_loopback: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_loopback", is_loopback(self.host))
        if not self.is_loopback and self.api_key_file is None:
            raise ConfigError(
                f"host is {self.host!r}, which other machines can reach, and there are no API keys; expected 127.0.0.1 "
                "or api_key_file (--api-key-file FILE, one key per line). Make a key: openssl rand -hex 32"
            )
        counts = ("workers", "max_queue", "max_images", "max_connections", "shadow_samples")
        for name in (*counts, *(() if self.max_body is None else ("max_body",))):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        for name in ("deadline", "read_timeout", "drain_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected seconds greater than 0.")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port is {self.port}, expected 0..65535.")
        if not 0 <= self.shadow <= 1:
            raise ConfigError(f"shadow is {self.shadow}, expected a share of the images, 0..1.")
        if self.max_images > self.max_queue:
            raise ConfigError(
                f"max_images is {self.max_images}, expected at most max_queue = {self.max_queue}: a longer request "
                "would never be accepted."
            )
        if self.max_images_per_key is not None and self.max_images_per_key < self.max_images:
            raise ConfigError(
                f"max_images_per_key is {self.max_images_per_key}, expected at least max_images = {self.max_images}."
            )
        for name, known in (("log_format", LogFormat), ("shadow_backend", ShadowBackend)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(known))}.")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address; a name other than ``localhost`` is not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
