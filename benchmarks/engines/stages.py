"""What benchmarks that go stage by stage share: one stage in a process of its own, and the stages that are the same."""

import json
import os
import sys
import time
from collections.abc import Iterable
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


def walk(name: str, stages: Iterable[str], folder: Path, out: Path | None) -> None:
    """Run each stage that is not done, with this script's own arguments, and keep what it took.

    Args:
        name: Row of the table.
        stages: Names; ``--stage NAME`` runs one and leaves ``NAME.partial.json`` in the folder.
        folder: Files of this row.
        out: JSON file that keeps the table; it is added to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        done = folder / f"{stage}.json"
        if done.exists():
            continue
        found = run_stage([*sys.argv, "--stage", stage], folder / f"{stage}.partial.json")
        found["peak_gib"] = round(found.pop("peak_bytes") / 2**30, 2)
        done.write_text(json.dumps(found), encoding="utf-8")
        say(f"{stage}: {json.dumps(found)}")
        if out is not None:
            _keep(name, [folder / f"{each}.json" for each in stages], out)


def _keep(name: str, stages: Iterable[Path], out: Path) -> None:
    from scm_sdk import __version__
    from scm_sdk._util.machine import describe_machine

    table = json.loads(out.read_bytes()) if out.exists() else {}
    found = {path.stem: json.loads(path.read_bytes()) for path in stages if path.exists()}
    table[name] = {"machine": describe_machine(), "scm_sdk": __version__, **found}
    out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def describe_graph(report: Any) -> dict[str, Any]:
    """Return what a report of an import says of its one graph."""
    (graph,) = report.graphs
    return {
        "seconds_by_part": dict(graph.seconds),
        "num_parameters": graph.num_parameters,
        "num_nodes": graph.num_nodes,
        "graph_bytes": graph.bytes + graph.data_bytes,
    }


def recorded(bundle: Path, steps: int) -> tuple[Any, Any]:
    """Return PyTorch's own sample in a bundle, and the sampler."""
    from scm_sdk.bundle.bundle import Bundle

    opened = Bundle.open(bundle, verify="none")
    return opened.goldens()[steps], opened.spec(steps)


def run_graph(bundle: Path, steps: int) -> dict[str, Any]:
    """Draw the recorded sample with ONNX Runtime, one thread and no memory arena, and hold it to PyTorch's."""
    import onnxruntime

    from scm_sdk.export.precision.probe import feeds_of

    golden, spec = recorded(bundle, steps)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it keeps what it took for the largest layer
    path = bundle / "onnx" / "fp32" / f"{steps}step" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    (samples,) = session.run([spec.output_name], feeds_of(spec, golden.seeds.tolist()))
    return {"seconds_of_call": round(time.perf_counter() - start, 1), **difference(samples, golden.images)}


def difference(samples: Any, reference: Any) -> dict[str, float]:
    """Return how far samples are from those of a reference, data units."""
    import numpy as np

    return {
        "max_abs_difference": float(np.abs(samples - reference).max()),
        "largest": float(np.abs(reference).max()),
        "standard_deviation": float(reference.std()),
    }


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
