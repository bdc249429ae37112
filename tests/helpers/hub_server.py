"""A small stand-in for the Hugging Face hub: the endpoints that fetching and pushing use, over real HTTP."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class HubServer(ThreadingHTTPServer):
    """``repos`` maps an id to its files; ``asked`` lists what was requested."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.asked, self.claimed_sizes = {}, [], {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def sha(self, repo):
        text = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in self.repos[repo].items()})
        return hashlib.sha1(text.encode()).hexdigest()

    def size(self, name, data):
        return self.claimed_sizes.get(name, len(data))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        server = self.server
        server.asked.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = (api or file)[1] if api or file else ""
        if repo not in server.repos:
            return self.missing("RepoNotFound")
        files, sha = server.repos[repo], server.sha(repo)
        if (api[3] if api else file[2]) not in (None, "main", sha):
            return self.missing("RevisionNotFound")
        if file:
            data = files.get(file[3])
            if data is None:
                return self.missing("EntryNotFound")
            etag = hashlib.sha1(data).hexdigest()
            return self.answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})
        if api[2] == "tree":
            return self.answer([
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ])  # fmt: skip
        siblings = [{"rfilename": name, "size": server.size(name, data)} for name, data in files.items()]
        return self.answer(
            {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False}
        )

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(f"POST {path}")
        repos = self.server.repos
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            repos.setdefault(repo, {})
            return self.answer({"url": f"{self.server.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    repos[match[1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            sha = self.server.sha(match[1])
            return self.answer(
                {"commitUrl": f"{self.server.url}/{match[1]}/commit/{sha}", "commitOid": sha, "success": True}
            )
        return self.missing("EntryNotFound")


@contextmanager
def hub_server():
    """Serve until the block ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
