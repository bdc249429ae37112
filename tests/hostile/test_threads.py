"""Many threads that call one generator get what a single call gives, and nothing grows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.campaign import Limits, Silent, Tally, run_campaign

pytestmark = pytest.mark.hostile
THREADS = 64
CALLS = int(os.environ.get("SCM_HOSTILE_CALLS", "2000"))
"""Of each thread."""
SEEDS = 32
_SLACK_BYTES = 48 << 20
"""Growth of memory between the first tenth of the calls and the last that is no leak: what allocators keep."""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_every_call_gives_what_a_single_one_gives(backend: str, material: Path, record: Any) -> None:
    setup = {"bundle": str(material / "plain"), "backend": backend}
    limits = Limits(cpu_seconds=7200, wall_seconds=7200, memory_bytes=16 << 30, open_files=1024)
    name = f"{THREADS} threads, {backend}"
    whole = run_campaign(name, "hostile.test_threads:prepare", [CALLS], setup=setup, limits=limits, workers=1)
    tally = Tally(name=name, counts=whole.counts, faults=whole.faults)
    if not tally.failed:
        tally.counts = {"right": THREADS * CALLS}
    record(tally)


def prepare(setup: dict[str, Any], scratch: Path) -> Callable[[int], None]:
    import torch

    from scm_sdk.inference.generator import Generator

    torch.set_num_threads(1)
    options = {"backend": setup["backend"], "num_inference_steps": 1, "num_threads": 1, "precision": "fp32"}

    def attempt(calls: int) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with Generator.from_pretrained(setup["bundle"], **options) as gen:
            right = [picture(gen, seed) for seed in range(SEEDS)]
            assert len(set(right)) == SEEDS, "pictures that differ"
            grown = storm(gen, right, calls)
        if grown > _SLACK_BYTES:
            raise Silent(f"memory grew by {grown >> 20} MiB")
        if threading.active_count() != 1 or len(os.listdir("/proc/self/fd")) > before + 8:
            raise Silent(f"{threading.active_count()} threads and {len(os.listdir('/proc/self/fd'))} files are open")

    return attempt


def picture(gen: Any, seed: int) -> bytes:
    """Return the bytes of one picture."""
    images: Any = gen(1, seed=seed, class_labels=seed % 3, output_type="raw").images
    return bytes(images.tobytes())


def storm(gen: Any, right: list[bytes], calls: int) -> int:
    """Call from many threads at once; return by how many bytes the process grew after the first tenth."""
    wrong: list[str] = []
    sizes: list[int] = []
    done = 0
    lock = threading.Lock()

    def call(number: int) -> None:
        nonlocal done
        for round_ in range(calls):
            seed = (number * 7 + round_) % SEEDS
            try:
                if picture(gen, seed) != right[seed]:
                    wrong.append(f"thread {number}, call {round_}: another picture")
            except Exception as exc:
                wrong.append(f"thread {number}, call {round_}: {type(exc).__name__}: {exc}")
            with lock:
                done += 1
                if done % max(1, THREADS * calls // 10) == 0:
                    sizes.append(resident_bytes())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise Silent(f"{len(wrong)} of {THREADS * calls} calls: {wrong[:3]}")
    return max(sizes[-2:]) - sizes[0]


def resident_bytes() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
