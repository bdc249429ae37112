"""A picture service in the standard library alone: many threads, one Generator, shared batches.

python examples/07_serve.py scm-demo/avatars 8000
curl -o red.png 'http://127.0.0.1:8000/?label=red&seed=7'
"""

import io
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

from scm_sdk import Generator
from scm_sdk.batcher import Batcher
from scm_sdk.errors import ConfigError, QueueFull, ScmError


class Handler(BaseHTTPRequestHandler):
    """One thread for each connection; all share the batcher."""

    batcher: Batcher

    def do_GET(self) -> None:
        """Answer /?label=NAME&seed=N with a PNG."""
        asked = parse_qs(urlparse(self.path).query)
        try:
            seed = int(asked.get("seed", ["0"])[0])
            out = self.batcher(seed=seed, class_labels=asked.get("label", [None])[0])
        except (ConfigError, ValueError) as exc:  # the caller's fault
            return self.answer(400, "text/plain", str(exc).encode())
        except QueueFull as exc:  # ours, and it passes
            return self.answer(503, "text/plain", str(exc).encode())
        except ScmError as exc:
            return self.answer(500, "text/plain", str(exc).encode())
        png = io.BytesIO()
        out.images[0].save(png, "PNG")
        return self.answer(200, "image/png", png.getvalue())

    def answer(self, status: int, kind: str, body: bytes) -> None:
        """Send one response. A seed names an image for ever, so a picture may be cached."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "immutable" if status == 200 else "no-store")
        self.end_headers()
        self.wfile.write(body)


def main(bundle: str, port: int) -> None:
    """Serve on this machine alone until interrupted, or told to end as a container is."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # One thread for each call, so that batches run side by side; leave it out for a model that needs all cores.
    with Generator.from_pretrained(bundle, num_threads=1) as gen, gen.batcher(max_waiting=64) as batcher:
        gen.warmup()
        Handler.batcher = batcher
        with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            print(f"http://127.0.0.1:{server.server_port}/?label={gen.opened().spec.class_names[0]}&seed=7", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("bye")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
