"""Serve pictures under load, next to other servers: throughput and latency by number of clients, and an overload.

    python benchmarks/speed/serve.py scm-demo/avatars --json benchmarks/results/serve.json

``calls`` is ``gen(...)`` from as many threads of this process. The servers have processes of their own and are asked
over kept connections by one thread of this process, so that their clients take a share of the cores: ``server`` is
``scm-export serve``, and ``fastapi``, ``ray`` and ``triton`` are those of other_servers.py, each where it is installed;
the variable TRITON_ENVIRONMENT names the environment of Triton. All run the FP32 graph in ONNX Runtime, one thread a
call, and make the same pictures, which is checked of every answer. They are up together and measured in turn, several
times for each number of clients.

Then requests arrive at ``scm-export serve`` at three times its largest rate, whether or not it has answered: refusals,
latencies of both kinds of answers, answers after the deadline, memory by the second, and whether each picture is that
of its single call. It takes less than 6 minutes.
"""

import asyncio
import io
import itertools
import json
import os
import re
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
from other_servers import Served, free_port, open_generator, openai_request, python_server, started, triton
from PIL import Image

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.lazy import is_installed
from scm_sdk._util.machine import describe_machine
from scm_sdk.images import encode_picture

DEADLINE = 30.0
"""Seconds after which ``scm-export serve`` drops a request."""
SEEDS = 64
"""Seeds that are asked for in turn, whose pictures are known."""
REFUSED = (429, 503)
"""Answers of a server whose queue is full. Triton's is as long as ``scm-export triton`` sets it."""
SETTLE = 0.25
"""Share of a round that is not counted."""
Answer = tuple[float, float, int, bytes]
"""When a request began and ended, its status and its body."""


class Connection:
    """A kept HTTP/1.1 connection, with as little work for a request as can be."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, seed: int) -> tuple[int, bytes]:
        """Return status and PNG file for a seed; where it was refused, another body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._served.port)
        reader, writer = self._streams
        writer.write(self._served.request(seed))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
        assert length is not None, head
        status, body = int(head[9:12]), await reader.readexactly(int(length[1]))
        return status, self._served.picture(head, body) if status == 200 else body

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()


async def closed_loop(served: Served, clients: int, seconds: float, seeds: Iterator[int]) -> list[Answer]:
    """Let each client ask for one picture after the other."""
    answers: list[Answer] = []
    until = time.perf_counter() + seconds

    async def client() -> None:
        connection = Connection(served)
        while (start := time.perf_counter()) < until:
            status, body = await connection.ask(next(seeds) % SEEDS)
            answers.append((start, time.perf_counter(), status, body))
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(
    served: Served, rate: float, seconds: float, wanted: list[bytes]
) -> tuple[list[Answer], int, list[float]]:
    """Let requests arrive at a rate, whatever is answered.

    Returns:
        The answers, where 0 is the status of a connection that was refused or closed; how many pictures are wrong; and
        the server's memory by the second, MiB.
    """
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(memory_mib(served.pid))
            await asyncio.sleep(1)

    watching = asyncio.ensure_future(watch())
    answers: list[Answer] = []
    free: list[Connection] = []
    wrong = 0

    async def one(seed: int) -> None:
        nonlocal wrong
        connection = free.pop() if free else Connection(served)
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
    watching.cancel()
    return answers, wrong, memory


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
    """Return rate and latencies of the pictures after the settling time, and how many requests were refused."""
    from_ = min(start for start, *_ in answers) + SETTLE * seconds
    until = from_ + (1 - SETTLE) * seconds
    made = [(start, end) for start, end, status, _ in answers if status not in REFUSED]
    waits = [(end - start) * 1e3 for start, end in made if start >= from_]
    rate = sum(from_ <= end <= until for _, end in made) / (until - from_)
    p50, p95, p99 = (float(x) for x in np.percentile(waits or [np.nan], [50, 95, 99]))
    refused = len(answers) - len(made)
    return {"per_second": rate, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "requests": len(waits), "refused": refused}


@contextmanager
def server(bundle: Path, queue: int) -> Iterator[Served]:
    """Run ``scm-export serve``."""
    port = free_port()
    command = [
        sys.executable, "-m", "scm_sdk.export.cli", "serve", str(bundle), "--port", str(port), "--threads", "1",
        "--backend", "onnxruntime", "--precision", "fp32", "--max-queue", str(queue),
    ]  # fmt: skip
    with started(command, dict(os.environ), port, openai_request) as served:
        yield served


def memory_mib(pid: int) -> float:
    """Return the memory of a process and of all below it, each shared page counted in parts."""
    total, left = 0.0, [pid]
    while left:
        process = Path(f"/proc/{left.pop()}")
        with suppress(OSError):  # it has ended
            total += (
                int(
                    re.findall(r"^Pss:\s+(\d+)", (process / "smaps_rollup").read_text(encoding="utf-8"), re.MULTILINE)[
                        0
                    ]
                )
                / 1024
            )
            for task in (process / "task").iterdir():
                left += map(int, (task / "children").read_text(encoding="utf-8").split())
    return total


def other_servers(bundle: Path) -> dict[str, AbstractContextManager[Served]]:
    """Return the servers that are installed; say which are not."""
    found: dict[str, AbstractContextManager[Served]] = {}
    for name, module in (("fastapi", "fastapi"), ("ray", "ray.serve")):
        if is_installed(module):
            found[name] = python_server(name, bundle)
        else:
            print(f"without {name}: {module} is not installed")
    if environment := os.environ.get("TRITON_ENVIRONMENT"):
        found["triton"] = triton(Path(environment), bundle)
    else:
        print("without triton: TRITON_ENVIRONMENT is not set")
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--clients", type=click.IntRange(1), multiple=True, default=(1, 4, 16, 64, 256), show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Of a round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--overload-seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True)
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Queue in the overload, images.")
@click.option("--note", default="", help="Kept in the result.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the result.")
def main(
    bundle: Path, clients: tuple[int, ...], seconds: float, rounds: int, overload_seconds: float, queue: int,
    note: str, out: Path | None,
) -> None:  # fmt: skip
    """Ask servers of BUNDLE for pictures."""
    began, seeds, facts = time.perf_counter(), itertools.count(), dict[str, dict[str, float]]()
    results: list[dict[str, Any]] = []
    with open_generator(str(bundle)) as gen:
        arrays = [gen(seed=s, output_type="uint8").images[0] for s in range(SEEDS)]
        wanted = [encode_picture(array, ".png") for array in arrays]
        known = dict.fromkeys(wanted, True)

        def right(file: bytes) -> bool:
            """Another encoder may make other files of the same pictures."""
            if file not in known:
                known[file] = any(np.array_equal(np.asarray(Image.open(io.BytesIO(file))), a) for a in arrays)
            return known[file]

        with ExitStack() as stack:
            ways = {"server": server(bundle, max(*clients, queue)), **other_servers(bundle)}
            up = {name: stack.enter_context(way) for name, way in ways.items()}
            for name, served in up.items():
                asyncio.run(closed_loop(served, 4, 0.5, seeds))
                facts[name] = {"start_seconds": served.start_seconds, "memory_mib": memory_mib(served.pid)}
                print(f"{name}: start {served.start_seconds:.1f} s, {facts[name]['memory_mib']:.0f} MiB")
            print(
                f"{'clients':>7}  {'way':<8}{'images/s':>9}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'requests':>10}"
                f"{'refused':>9}"
            )
            for count in clients:
                found: dict[str, list[dict[str, float]]] = {name: [] for name in ("calls", *up)}
                for _ in range(rounds):
                    found["calls"].append(summary(plain_calls(gen, count, seconds, seeds), seconds))
                    for name, served in up.items():
                        answers = asyncio.run(closed_loop(served, count, seconds, seeds))
                        given = [(status, file) for _, _, status, file in answers if status not in REFUSED]
                        wrong = [status for status, file in given if status != 200 or not right(file)]
                        if wrong:
                            sys.exit(f"{name} gave {len(wrong)} wrong answers of {len(answers)} to {count} clients")
                        found[name].append(summary(answers, seconds))
                for way, runs in found.items():
                    row = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
                    results.append({"clients": count, "way": way, **row})
                    print(
                        f"{count:>7}  {way:<8}{row['per_second']:>9.1f}{row['p50_ms']:>9.1f}{row['p95_ms']:>9.1f}"
                        f"{row['p99_ms']:>9.1f}{row['requests']:>10.0f}{row['refused']:>9.0f}",
                        flush=True,
                    )
        capacity = max(row["per_second"] for row in results if row["way"] == "server")
        with server(bundle, queue) as served:
            asyncio.run(closed_loop(served, 4, 1.0, seeds))
            answers, wrong_pictures, memory = asyncio.run(open_loop(served, 3 * capacity, overload_seconds, wanted))
    counts = Counter(status for _, _, status, _ in answers)
    late = sum(status == 200 and end - start > DEADLINE for start, end, status, _ in answers)
    overload: dict[str, Any] = {
        "asked_per_second": 3 * capacity, "seconds": overload_seconds, "queue": queue,
        "arrived_per_second": len(answers) / overload_seconds, "answers": dict(counts), "late": late,
        "wrong_pictures": wrong_pictures, "memory_mib": memory,
    }  # fmt: skip
    for status in (200, 429):
        waits = [(end - start) * 1e3 for start, end, found_status, _ in answers if found_status == status]
        overload[f"ms_of_{status}"] = [float(x) for x in np.percentile(waits or [np.nan], [50, 95, 99])]
    shown = overload | {"memory_mib": [memory[0], max(memory), memory[-1]]}
    print(f"overload: {shown}\n{time.perf_counter() - began:.0f} s in all")
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "note": note,
            "machine": describe_machine(),
            "servers": facts,
            "results": results,
            "overload": overload,
        }
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
