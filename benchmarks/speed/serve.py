"""`scm-export serve` under load: throughput and latency by number of clients, and three times what it carries.

    python benchmarks/speed/serve.py scm-demo/avatars --json benchmarks/results/serve.json

``calls`` is ``gen(...)`` from as many threads of this process; ``server`` is the server in a process of its own, asked
over kept connections by one thread of this process, so that its clients take a share of the cores. Both make the same
PNG files. Then requests arrive at three times the largest rate of the server, whether or not it has answered: refusals,
latencies of both kinds of answers, memory, and whether each picture is that of its single call.
"""

import asyncio
import itertools
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.images import encode_picture

SEEDS = 64
"""Seeds that are asked for in turn, whose pictures are known."""
SETTLE = 0.25
"""Share of a round that is not counted."""
Answer = tuple[float, float, int, bytes]
"""When a request began and ended, its status and its body."""


class Connection:
    """A kept HTTP/1.1 connection, with as little work for a request as can be."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, seed: int) -> tuple[int, bytes]:
        """Return status and body for the picture of a seed."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = b'{"seed": %d}' % seed
        writer.write(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Accept: image/png\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None, head
        return int(head[9:12]), await reader.readexactly(int(length[1]))

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()


async def closed_loop(port: int, clients: int, seconds: float, seeds: Iterator[int]) -> list[Answer]:
    """Let each client ask for one picture after the other."""
    answers: list[Answer] = []
    until = time.perf_counter() + seconds

    async def client() -> None:
        connection = Connection(port)
        while (start := time.perf_counter()) < until:
            status, body = await connection.ask(next(seeds) % SEEDS)
            answers.append((start, time.perf_counter(), status, body))
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(port: int, rate: float, seconds: float, wanted: list[bytes]) -> tuple[list[Answer], int]:
    """Let requests arrive at a rate, whatever is answered; return the answers and how many pictures are wrong.

    The status of a connection that was refused or closed is 0.
    """
    answers: list[Answer] = []
    free: list[Connection] = []
    wrong = 0

    async def one(seed: int) -> None:
        nonlocal wrong
        connection = free.pop() if free else Connection(port)
        start = time.perf_counter()
        try:
            status, body = await connection.ask(seed)
        except (OSError, asyncio.IncompleteReadError):
            connection.close()
            answers.append((start, time.perf_counter(), 0, b""))
            return
        answers.append((start, time.perf_counter(), status, b""))
        wrong += status == 200 and body != wanted[seed]
        free.append(connection)

    began, tasks = time.perf_counter(), set[asyncio.Task[None]]()
    for i in itertools.count():
        if (due := began + i / rate) > began + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.ensure_future(one(i % SEEDS))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return answers, wrong


def plain_calls(gen: Generator, clients: int, seconds: float, seeds: Iterator[int]) -> list[Answer]:
    """Let so many threads call the generator and make PNG files."""
    answers: list[Answer] = []
    until = time.perf_counter() + seconds

    def client() -> None:
        while (start := time.perf_counter()) < until:
            out = gen(seed=next(seeds) % SEEDS, output_type="uint8")
            answers.append((start, time.perf_counter(), 200, encode_picture(out.images[0], ".png")))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def summary(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Return rate and latencies of the answers after the settling time."""
    from_ = min(start for start, *_ in answers) + SETTLE * seconds
    until = from_ + (1 - SETTLE) * seconds
    waits = [(end - start) * 1e3 for start, end, *_ in answers if start >= from_]
    rate = sum(from_ <= end <= until for _, end, *_ in answers) / (until - from_)
    p50, p95, p99 = (float(x) for x in np.percentile(waits or [np.nan], [50, 95, 99]))
    return {"per_second": rate, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "requests": len(waits)}


@contextmanager
def server(bundle: Path, backend: str, queue: int) -> Iterator[tuple[int, int, float]]:
    """Run the server; give its port, its process id and the seconds that its start took."""
    command = [sys.executable, "-m", "scm_sdk.export.cli", "serve", str(bundle), "--port", "0", "--threads", "1"]
    start = time.perf_counter()
    options = ["--backend", backend, "--max-queue", str(queue)]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        found = next(m for line in lines if (m := re.match(r"http://127.0.0.1:(\d+) ", line)))
        ready = time.perf_counter() - start
        reader = threading.Thread(target=lambda: deque(lines, maxlen=0))
        reader.start()
        try:
            yield int(found[1]), process.pid, ready
        finally:
            process.terminate()
            reader.join()


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--clients", type=click.IntRange(1), multiple=True, default=(1, 4, 16, 64, 256), show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=4.0, show_default=True, help="Of a round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--overload-seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True)
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Queue in the overload, images.")
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--note", default="", help="Kept in the result.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the result.")
def main(
    bundle: Path, clients: tuple[int, ...], seconds: float, rounds: int, overload_seconds: float, queue: int,
    backend: str, note: str, out: Path | None,
) -> None:  # fmt: skip
    """Ask a server of BUNDLE for pictures."""
    seeds = itertools.count()
    results: list[dict[str, Any]] = []
    print(f"{'clients':>7}  {'way':<8}{'images/s':>9}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'requests':>10}")
    with Generator.from_pretrained(bundle, backend=backend, num_threads=1) as gen:
        wanted = [encode_picture(gen(seed=s, output_type="uint8").images[0], ".png") for s in range(SEEDS)]
        with server(bundle, backend, max(clients)) as (port, pid, start_seconds):
            memory = memory_mib(pid)
            for count in clients:
                found: dict[str, list[dict[str, float]]] = {"calls": [], "server": []}
                for _ in range(rounds):
                    found["calls"].append(summary(plain_calls(gen, count, seconds, seeds), seconds))
                    answers = asyncio.run(closed_loop(port, count, seconds, seeds))
                    assert all(status == 200 and body in wanted for _, _, status, body in answers)
                    found["server"].append(summary(answers, seconds))
                for way, runs in found.items():
                    row = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
                    results.append({"clients": count, "way": way, **row})
                    print(
                        f"{count:>7}  {way:<8}{row['per_second']:>9.1f}{row['p50_ms']:>9.1f}{row['p95_ms']:>9.1f}"
                        f"{row['p99_ms']:>9.1f}{row['requests']:>10.0f}",
                        flush=True,
                    )
        capacity = max(row["per_second"] for row in results if row["way"] == "server")
        with server(bundle, backend, queue) as (port, pid, _):
            asyncio.run(closed_loop(port, 4, 1.0, seeds))
            before = memory_mib(pid)
            answers, wrong = asyncio.run(open_loop(port, 3 * capacity, overload_seconds, wanted))
            after = memory_mib(pid)
    counts = Counter(status for _, _, status, _ in answers)
    overload: dict[str, Any] = {
        "asked_per_second": 3 * capacity, "seconds": overload_seconds, "queue": queue, "answers": dict(counts),
        "wrong_pictures": wrong, "memory_mib": [before, after],
    }  # fmt: skip
    for status in (200, 429):
        waits = [(end - start) * 1e3 for start, end, found_status, _ in answers if found_status == status]
        overload[f"ms_of_{status}"] = [float(x) for x in np.percentile(waits or [np.nan], [50, 95, 99])]
    print(f"start {start_seconds:.1f} s, {memory:.0f} MiB; overload: {overload}")
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "note": note,
            "machine": describe_machine(),
            "backend": backend,
            "start_seconds": start_seconds,
            "memory_mib": memory,
            "results": results,
            "overload": overload,
        }
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
