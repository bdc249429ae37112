"""Serve a site on this machine: the files that its manifest lists, with the headers that threads and the page need."""

from __future__ import annotations

import os
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scm_sdk._util.files import read_regular
from scm_sdk.errors import BundleError, ConfigError

from .site import HEADERS, INDEX_NAME, SITE_NAME, read_site

HOST = "127.0.0.1"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".ts": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
}
_MAX_BYTES = 2 << 30


def open_server(folder: str | os.PathLike[str], port: int = 0) -> ThreadingHTTPServer:
    """Return a server for a site on the loopback interface; the caller runs ``serve_forever`` and closes it.

    Args:
        folder: The site.
        port: TCP port; 0 takes a free one, which ``server_address`` names.

    Raises:
        BundleError: If the folder is no site.
        ConfigError: If the port is taken.
    """
    root = Path(folder)
    paths = {f"{entry.path}.gz" if entry.gzip_size else entry.path for entry in read_site(root).files}
    paths.add(SITE_NAME)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "scm-sdk", ""
        timeout = 60

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (HOST, "localhost"):  # a page of another site under a name that was pointed here
                self._send(HTTPStatus.FORBIDDEN, _TYPES[".txt"], b"open this site as localhost\n", with_body)
                return
            path = unquote(urlsplit(self.path).path).removeprefix("/") or INDEX_NAME
            try:
                content = read_regular(root / path, most=_MAX_BYTES) if path in paths else None
            except OSError:
                content = None
            if content is None:
                self._send(HTTPStatus.NOT_FOUND, _TYPES[".txt"], b"no such file\n", with_body)
            else:
                kind = _TYPES.get(Path(path).suffix, "application/octet-stream")
                self._send(HTTPStatus.OK, kind, content, with_body)

        def _send(self, status: HTTPStatus, kind: str, content: bytes, with_body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-cache")
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                try:
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):  # the page was closed
                    self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the page shows what failed."""

    if not (root / INDEX_NAME).is_file():
        raise BundleError(f"{root} holds no {INDEX_NAME}, expected a site. Make it: scm-export web BUNDLE -o {root}")
    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as exc:
        raise ConfigError(f"port {port} cannot be opened: {exc.strerror}. Choose another; 0 is a free one.") from exc
