"""What benchmarks that go stage by stage share: one stage in a process of its own, and the stages that are the same."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from scm_sdk._util.events import Silent


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


class Stages(Silent):
    """Prints stages with the time of day, and nothing else."""

    def stage(self, title: str, /) -> None:
        """Print the title."""
        say(title)


def run_stage(command: list[str], partial: Path) -> dict[str, Any]:
    """Run one stage in a process and return what it took and what it printed.

    Args:
        command: Arguments of this Python.
        partial: The file in which the process leaves what it says, JSON; it is taken away.
    """
    start = time.perf_counter()
    _, status, usage = os.wait4(os.posix_spawn(sys.executable, [sys.executable, *command], os.environ), 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} ended with {code}; run the same command again to continue.")
    found = {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        **json.loads(partial.read_bytes()),
    }
    partial.unlink()
    return found


def add_fp16(bundle: Path) -> dict[str, Any]:
    """Add the FP16 graph; its pictures are not looked at."""
    from scm_sdk.export.precision.half import default_plan
    from scm_sdk.export.precision.variants import add_precision

    (variant,) = add_precision(bundle, default_plan("fp16"), num_samples=0, events=Stages())
    if variant.graph is None:
        return {}
    return {"graph_bytes": variant.graph.bytes + variant.graph.data_bytes, "nodes": dict(variant.nodes)}


def add_engine(bundle: Path) -> dict[str, Any]:
    """Add an engine for the A100 from the FP16 graph."""
    from scm_sdk.engines.targets import resolve_targets
    from scm_sdk.export.engines.add import add_engines

    (built,) = add_engines(bundle, resolve_targets(["a100"]), precisions=["fp16"], events=Stages())
    record = built.record
    return {
        "seconds_by_part": dict(record.seconds),
        "engine_bytes": record.engine_bytes,
        "library_peak_bytes": record.peak_memory_bytes,
        "census": record.census,
    }
