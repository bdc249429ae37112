"""Run the application: the socket, time limits of connections, worker processes, logs, and the end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors import Multiprocess

from ..errors import BackendFailure, ConfigError, ScmError
from .app import LOG, make_app
from .limits import ApiKeys
from .metrics import MULTIPROCESS_VARIABLE
from .options import LogFormat, ServeOptions
from .service import Service

LARGEST_HEADERS = 1 << 14
"""Bytes of a request's line and headers."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""
IDLE_SECONDS = 30
"""For how long a connection is kept for its next request."""
WORKER_START_SECONDS = 30
"""Time for a worker process to load the model when SIGHUP replaces them, and to answer its supervisor."""
LATE_SECONDS = 0.2
"""When the server ends, an idle connection may hold a request that was sent and is not yet read: time to read it."""


def serve(options: ServeOptions, *, on_start: Callable[[str], object] = lambda address: None) -> None:
    """Serve a bundle until SIGTERM or SIGINT; then take no more connections and finish what was accepted.

    Args:
        options: What is served, and how.
        on_start: Called with the server's address once it listens: with one worker, when the model is loaded.

    Raises:
        ConfigError: If an option is wrong, or the address is taken.
        ScmError: If the model cannot be opened.
        BackendFailure: If a worker cannot start.
    """
    set_up_logs(options.log_format)
    keys = None if options.api_key_file is None else ApiKeys.read(options.api_key_file)
    _raise_file_limit(options.max_connections)
    with listen(options) as listening:
        if options.workers > 1:
            _serve_by_workers(options, listening, on_start)
            return
        with Service.open(options) as service:
            server = _Server(_Config(make_app(service, keys), options))
            on_start(_address(listening))
            try:
                server.run(sockets=[listening])
            except KeyboardInterrupt:  # the server has ended in good order and raises the signal again
                if not server.should_exit:
                    raise


def _serve_by_workers(options: ServeOptions, listening: socket.socket, on_start: Callable[[str], object]) -> None:
    """Serve by several processes that share the socket; one that dies is replaced."""
    with tempfile.TemporaryDirectory(prefix="scm-serve-") as shared:
        os.environ[MULTIPROCESS_VARIABLE] = shared
        try:
            supervisor = Multiprocess(_Config(partial(make_worker_app, options), options), sockets=[listening])
            on_start(_address(listening))
            supervisor.run()
        finally:
            del os.environ[MULTIPROCESS_VARIABLE]
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise BackendFailure("a worker process could not start, expected all to. The log above says why.")


def make_worker_app(options: ServeOptions) -> ASGIApp:
    """Open the model in a worker process and return its application."""
    set_up_logs(options.log_format)
    _raise_file_limit(options.max_connections)
    try:
        keys = None if options.api_key_file is None else ApiKeys.read(options.api_key_file)
        return make_app(Service.open(options), keys)
    except ScmError as exc:
        LOG.error("a worker could not start: %s", exc)
        sys.exit(STARTUP_FAILURE)  # any other code would start it again


class _Config(uvicorn.Config):
    """The settings of uvicorn.

    Args:
        app: The application, or what makes it in a worker process.
        options: Of the server.
    """

    def __init__(self, app: Callable[..., Any], options: ServeOptions) -> None:
        self.read_timeout = options.read_timeout
        self.ending = False
        super().__init__(
            app,
            factory=options.workers > 1,
            workers=options.workers,
            http=TimedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            limit_concurrency=options.max_connections,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_worker_healthcheck=WORKER_START_SECONDS,
            timeout_graceful_shutdown=max(1, round(options.drain_timeout)),
            h11_max_incomplete_event_size=LARGEST_HEADERS,
        )


class _Server(uvicorn.Server):
    """Also shuts down connections that are accepted while the shutdown begins, which uvicorn would keep open."""

    config: _Config

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; see ``TimedProtocol.shutdown``."""
        self.config.ending = True
        await super().shutdown(sockets)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn with the time limits that it lacks: for a request's headers, and for a client that reads."""

    config: _Config
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit for headers."""
        super().connection_made(transport)
        self._start()
        if self.config.ending:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limits."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read; wait for headers from the first byte of a request on until it is complete."""
        was_idle = self._is_idle
        super().data_received(data)
        if was_idle and not self._is_idle:
            self._stop()
        elif was_idle and self._timer is None:
            self._start()

    def pause_writing(self) -> None:
        """Start the time limit for the client to read the answer."""
        super().pause_writing()
        self._start()

    def resume_writing(self) -> None:
        """Cancel the time limit of ``pause_writing``, because the client has read."""
        self._stop()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close after the answer; close an idle connection after a short wait for a request in transit."""
        self.config.ending = True  # in a worker process, whose server is uvicorn's own
        if self._is_idle:
            self.loop.call_later(LATE_SECONDS, self._shutdown_now)
        else:
            super().shutdown()

    def _shutdown_now(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.config.read_timeout, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def listen(options: ServeOptions) -> socket.socket:
    """Return a socket that listens where the options say.

    Raises:
        ConfigError: If the address is not one of this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # The protocol is named so that asyncio knows it for TCP and sends without delay: uvicorn writes headers and body
    # apart, and the second would wait 40 ms for the client's acknowledgment of the first.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
        listening.listen(BACKLOG)
        return listening
    except OSError as exc:
        listening.close()
        raise ConfigError(
            f"the server cannot listen on {options.host} port {options.port} ({exc.strerror or exc}), expected an "
            "address of this machine and a free port. Choose another: --port 0 takes a free one"
        ) from exc


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_file_limit(connections: int) -> None:
    """Let this process open so many connections, as far as the system allows."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def set_up_logs(log_format: LogFormat) -> None:
    """Write the logs of this package and of uvicorn to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    for name in ("scm_sdk", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [handler]
