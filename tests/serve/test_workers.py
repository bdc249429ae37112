"""Several worker processes behind one address."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from helpers.servers import eventually, running
from scm_sdk.inference.generator import Generator

pytestmark = pytest.mark.slow
IMAGES = "/v1/images/generations"


def workers(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"Started server process \[(\d+)\]", line))]


def test_workers_share_the_address_and_their_metrics_and_one_that_dies_is_replaced(
    served_bundle: Path, local: Generator
) -> None:
    with running(served_bundle, "--workers", "2") as server:

        def ask(seed: int) -> httpx.Response:
            # A connection of its own: one connection belongs to one worker.
            return httpx.post(server.url + IMAGES, json={"seed": seed}, headers={"Accept": "image/png"}, timeout=600)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(40)))
        assert [answer.status_code for answer in answers] == [200] * 40
        assert len({answer.content for answer in answers}) == 40
        eventually(lambda: len(workers(server.lines)) == 2)
        assert server.metric("scm_images_total") == 40, "of both"
        os.kill(workers(server.lines)[0], signal.SIGKILL)
        eventually(lambda: len(workers(server.lines)) == 3)
        eventually(lambda: ask(1).status_code == 200)
        before = workers(server.lines)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(workers(server.lines)) == len(before) + 2)
        assert ask(2).status_code == 200
        assert server.end() == 0


def test_workers_that_cannot_start_end_the_server(served_bundle: Path) -> None:
    with running(served_bundle, "--workers", "2", "--precision", "bf16") as server:
        assert server.process.wait(600) == 1  # one that dies before it answers is noticed late
        eventually(lambda: any("a worker process could not start" in line for line in server.lines))
        assert any("precision" in line and "bf16" in line for line in server.lines)
