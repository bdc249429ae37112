"""Options, API keys, hosts and origins, the queue of images; and a server that other machines may reach."""

import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from helpers.servers import running
from scm_sdk.errors import ConfigError
from scm_sdk.serve.app import make_app
from scm_sdk.serve.limits import Admission, ApiKeys, check_caller, check_host, check_origin
from scm_sdk.serve.options import ServeOptions
from scm_sdk.serve.schemas import RequestError
from scm_sdk.serve.server import listen
from scm_sdk.serve.service import Service

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def keys_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_addresses_that_others_reach_need_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="api_key_file"):
        ServeOptions(bundle="b", host=host)
    assert not ServeOptions(bundle="b", host=host, api_key_file="keys").is_loopback
    assert ServeOptions(bundle="b", host="::1").is_loopback


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0}, {"max_queue": 0}, {"max_images": 65}, {"max_images_per_key": 1}, {"deadline": 0.0},
        {"deadline": float("nan")}, {"port": 1 << 16}, {"shadow": 1.5}, {"log_format": "xml"},
        {"shadow_backend": "openvino"},
    ],
)  # fmt: skip
def test_options_out_of_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is "):
        ServeOptions(bundle="b", **wrong)


def test_keys_are_read_by_line_with_and_without_names(tmp_path: Path) -> None:
    keys = ApiKeys.read(keys_file(tmp_path, f"# of the shop\n\nshop {KEY}\n{OTHER}\n"))
    assert len(keys) == 2
    assert (keys.find(KEY), keys.find(OTHER), keys.find(KEY[:-1]), keys.find("")) == ("shop", "key-4", None, None)
    assert check_caller(keys, f"Bearer {KEY}") == "shop"
    for header in ("", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer ü"):
        with pytest.raises(RequestError, match="Bearer") as caught:
            check_caller(keys, header)
        assert caught.value.code == "invalid_api_key"
    assert check_caller(None, "") == "anyone"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no API key"), ("short\n", "5 characters"), (f"a b {KEY}\n", "3 words"), (f"{KEY}\n{KEY}\n", "repeats"),
        (f"a {KEY}\na {OTHER}\n", "repeats"), ("ü" * 20, "ASCII"), ("a" * (1 << 20) + "\n", "1 MiB"),
    ],
)  # fmt: skip
def test_wrong_files_of_keys_are_refused(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        ApiKeys.read(keys_file(tmp_path, text))


def test_files_of_keys_that_others_write_or_that_are_none_are_refused(tmp_path: Path) -> None:
    path = keys_file(tmp_path, KEY)
    path.chmod(0o620)
    with pytest.raises(ConfigError, match="mode 620"):
        ApiKeys.read(path)
    for other in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=str(other)):
            ApiKeys.read(other)


def test_hosts_are_addresses_localhost_and_named_ones() -> None:
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost", "LOCALHOST:1", "10.1.2.3", "Shop.example:8000"):
        check_host(host, ["shop.example"])
    for host in (
        "",
        "evil.example",
        "a@localhost",
        "localhost/x",
        "localhost:x",
        "[::1",
        "127.0.0.1.evil.example",
        "?",
    ):
        with pytest.raises(RequestError, match="Host"):
            check_host(host, ["shop.example"])
    check_origin(None, "localhost:8000")
    check_origin("http://localhost:8000", "localhost:8000")
    for origin in ("http://localhost:8001", "null", "", "http://[", "http://evil.example"):
        with pytest.raises(RequestError, match="Origin"):
            check_origin(origin, "localhost:8000")


def test_the_queue_counts_images_of_all_and_of_each_key() -> None:
    queue = Admission.of(10, 6)
    queue.take(6, "a", retry_after=1)
    for images, key, code in ((1, "a", "key_limit"), (5, "b", "queue_full")):
        with pytest.raises(RequestError) as caught:
            queue.take(images, key, retry_after=2)
        assert (caught.value.code, caught.value.status, caught.value.retry_after) == (code, 429, 2)
    queue.take(4, "b", retry_after=1)
    queue.release(6, "a")
    assert (queue.images, dict(queue.by_key)) == (4, {"b": 4})


def test_a_server_for_others_asks_for_a_key_everywhere_but_in_probes_and_the_page(
    served_bundle: Path, tmp_path: Path
) -> None:
    options = ("--host", "0.0.0.0", "--api-key-file", str(keys_file(tmp_path, f"shop {KEY}\n{OTHER}\n")))
    with running(served_bundle, *options, "--allowed-host", "shop.example", "--log-format", "text") as server:
        for path in ("/healthz", "/readyz", "/", "/openapi.json"):
            assert server.http.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/v2", "/v2/models/linear"):
            answer = server.http.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        named = httpx.Headers({"Authorization": f"Bearer {KEY}", "Host": "shop.example"})
        assert server.http.post("/v1/images/generations", json={}, headers=named).status_code == 200
        assert server.http.post("/v1/images/generations", json={}).json()["error"]["code"] == "invalid_api_key"
        named["Host"] = "other.example"
        assert server.http.get("/v1/models", headers=named).status_code == 421
        assert not [line for line in server.lines if KEY in line]


def test_a_mounted_application_knows_its_probes_open_paths_and_protocols(served_bundle: Path) -> None:
    with Service.open(ServeOptions(bundle=served_bundle)) as service:
        app = Starlette(routes=[Mount("/pictures", make_app(service, ApiKeys({"shop": KEY})))])

        async def ask(path: str, **headers: str) -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get(f"/pictures{path}", headers=headers)

        assert asyncio.run(ask("/healthz", Host="probe")).status_code == 200
        assert asyncio.run(ask("/openapi.json")).status_code == 200
        assert asyncio.run(ask("/openapi.json", Host="other.example")).status_code == 421
        assert asyncio.run(ask("/v1/models")).json()["error"]["code"] == "invalid_api_key"
        wrong = asyncio.run(ask("/v2/models/other", Authorization=f"Bearer {KEY}"))
        assert wrong.status_code == 404 and "'other'" in wrong.json()["error"]
        found = re.findall(r'endpoint="([^"]+)",status="(\d+)"', service.metrics.render().decode())
        assert ("/v2/models/{model}", "404") in found


def test_answers_are_sent_without_delay(served_bundle: Path) -> None:
    """Else asyncio leaves Nagle's algorithm on, and each answer waits 40 ms for an acknowledgment."""
    with listen(ServeOptions(bundle=served_bundle, port=0)) as listening:
        assert listening.proto == socket.IPPROTO_TCP
