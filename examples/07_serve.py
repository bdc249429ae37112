"""A picture service in the standard library alone: many threads, one Generator, shared batches.

python examples/07_serve.py scm-demo/avatars 8000
curl -o red.png 'http://127.0.0.1:8000/?label=red&seed=7'

``/healthz`` answers 200 while it takes requests. Where too many wait, one is answered 503 at once. SIGTERM ends it as a
container is ended: it takes no new connections, and every request that it has accepted is answered.
"""

import argparse
import io
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from scm_sdk import Batcher, ConfigError, Generator, QueueFull, ScmError


class Handler(BaseHTTPRequestHandler):
    """One thread for each connection; all share the batcher."""

    protocol_version = "HTTP/1.1"  # a connection is kept for the next request
    timeout = 15  # seconds without a byte, after which a connection is closed
    batcher: Batcher
    server: "Server"

    def setup(self) -> None:
        """Let the server know of the connection."""
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        """Forget the connection."""
        self.server.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        """Answer `/?label=NAME&seed=N` with a PNG, and /healthz."""
        try:
            url = urlsplit(self.path)
            asked = {name: values[0] for name, values in parse_qs(url.query, max_num_fields=8).items()}
            if url.path == "/healthz":
                return self.answer(200, "text/plain", b"ok\n")
            if url.path != "/":
                return self.answer(404, "text/plain", b"expected / or /healthz\n")
            # A few may wait: who cannot be answered in good time should ask another.
            out = self.batcher(seed=int(asked.get("seed", "0")), class_labels=asked.get("label"), timeout=0)
        except (ConfigError, ValueError) as exc:  # the caller's fault
            return self.answer(400, "text/plain", str(exc).encode())
        except QueueFull as exc:  # ours, and it passes
            return self.answer(503, "text/plain", str(exc).encode(), **{"Retry-After": "1"})
        except ScmError as exc:
            return self.answer(500, "text/plain", str(exc).encode())
        png = io.BytesIO()
        out.images[0].save(png, "PNG")
        # A seed names its image within one precision, so a picture may be cached for a year.
        return self.answer(200, "image/png", png.getvalue(), **{"Cache-Control": "public, max-age=31536000, immutable"})

    def answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        """Send one response; the last of its connection when the service ends."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        if self.server.ending.is_set():
            self.send_header("Connection", "close")  # which also sets close_connection
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Waits for its connections' threads when it is closed."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Handler)
        self.ending = threading.Event()
        self.connections: set[socket.socket] = set()

    def end(self, *_: object) -> None:
        """Answer what was asked, take no more: for a signal."""
        self.ending.set()
        threading.Thread(target=self.shutdown).start()  # it waits for the loop, which this thread runs

    def drain(self) -> None:
        """Take the connections that wait to be accepted; let each end when its last request is answered."""
        while select.select([self], [], [], 0.1)[0]:
            self.handle_request()
        for connection in tuple(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closed its connection; print any other error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def main(bundle: str, port: int) -> None:
    """Serve on this machine alone until interrupted or terminated."""
    # One thread for each call, so that batches run concurrently; leave it out for a model that needs all cores.
    with Generator.from_pretrained(bundle, num_threads=1) as gen, gen.batcher(max_queue_size=64) as batcher:
        gen.warmup()
        Handler.batcher = batcher
        with Server(("127.0.0.1", port)) as server:
            signal.signal(signal.SIGTERM, server.end)
            signal.signal(signal.SIGINT, server.end)
            print(f"http://127.0.0.1:{server.server_port}/?label={gen.opened().spec.class_names[0]}&seed=7", flush=True)
            server.serve_forever()
            server.drain()
        print("bye")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve pictures over HTTP on this machine.")
    parser.add_argument("bundle", help="folder of a bundle")
    parser.add_argument("port", nargs="?", type=int, default=8000, help="TCP port (8000)")
    arguments = parser.parse_args()
    main(arguments.bundle, arguments.port)
