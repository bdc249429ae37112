r"""Compare the runtimes of phones, NPUs and browsers with native ONNX Runtime: difference, size, time in pairs.

    make .venv-edge/.ready-test-edge VENV=.venv-edge EXTRAS=test-edge CONSTRAINTS=constraints-edge.txt
    for runtime in litert executorch openvino_ir; do .venv-edge/bin/scm-export edge scm-demo/avatars -r $runtime; done
    taskset -c 1 env OMP_NUM_THREADS=1 .venv-edge/bin/python benchmarks/speed/edge.py scm-demo/avatars \
        --json benchmarks/results/edge-avatars.json

Rows are all that the bundle has and this machine runs: graphs by ONNX Runtime, artifacts of ``scm-export edge`` by
their backends, and the graphs by onnxruntime-web's WebAssembly in Node, where it has one thread. What is left out is
named.

Differences are from PyTorch's images of the same noise, units of ``sigma_data``. Times are wall time of one image,
noise given: each round calls each row once, first another one each round, and a ratio is to ONNX Runtime's fp32 graph
of as many steps in the same round. ``taskset`` gives all of them one core; ExecuTorch has no option for its threads.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from result_files import check_class

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.lazy import installed_version
from scm_sdk._util.machine import describe_machine
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import files_of
from scm_sdk.errors import BackendUnavailable
from scm_sdk.inference.backends import BACKENDS
from scm_sdk.inference.parity.difference import difference
from scm_sdk.inference.request import Request, make_example
from scm_sdk.spec import Precision, SamplerSpec

SEEDS = 32
REFERENCE = "onnxruntime"
WEB = "onnxruntime-web wasm"
LIBRARIES = ("scm-sdk", "torch", "onnxruntime", "openvino", "ai-edge-litert", "executorch")
NODE = """
import { createInterface } from "node:readline";
import { readFileSync, writeFileSync } from "node:fs";
const [site, folder] = process.argv.slice(1);
const { Generator } = await import(`${site}/scm.js`);
const gen = await Generator.load(`${site}/`);
for await (const line of createInterface({ input: process.stdin })) {
  const { name, conditioning, ...request } = JSON.parse(line);
  const own = {};
  for (const [key, path] of Object.entries(conditioning)) {
    const { buffer, byteOffset, byteLength } = readFileSync(path);
    const bytes = buffer.slice(byteOffset, byteOffset + byteLength);
    own[key] = path.endsWith("float32") ? new Float32Array(bytes) : new BigInt64Array(bytes);
  }
  const samples = await gen.generate({ ...request, conditioning: own, batchSize: 1 });
  if (name) writeFileSync(`${folder}/${name}`, samples.images);
  console.log(samples.info.runMs);
}
"""


@dataclass(frozen=True)
class Row:
    """One artifact on one runtime.

    Attributes:
        runtime: Name of the runtime.
        precision: Precision of the artifact.
        steps: Number of network calls.
        bytes: Size of its files.
        images: Returns the images of all seeds.
        once: Runs one image and returns its wall time, ms.
    """

    runtime: str
    precision: Precision
    steps: int
    bytes: int
    images: Callable[[], np.ndarray]
    once: Callable[[], float]


def example_of(spec: SamplerSpec) -> Request:
    """Return the noise and the inputs of all seeds."""
    labels = np.arange(SEEDS) % spec.num_classes if spec.num_classes else None
    return make_example(spec, list(range(SEEDS)), class_labels=labels)


def native_row(gen: Generator, example: Request, runtime: str, precision: Precision, steps: int, size: int) -> Row:
    """Return the row of a backend of this package."""
    backend = gen.opened(steps).backend
    one = example.inputs(0, 1)

    def images() -> np.ndarray:
        return np.concatenate([np.asarray(backend.sample(*example.inputs(i, i + 1))) for i in range(SEEDS)])

    def once() -> float:
        began = time.perf_counter()
        backend.sample(*one)
        return (time.perf_counter() - began) * 1e3

    return Row(runtime, precision, steps, size, images, once)


def native_rows(bundle: Bundle, stack: ExitStack, left_out: list[str]) -> list[Row]:
    """Open each artifact of the bundle with the backend of its format."""
    rows = []
    for artifact in bundle.artifacts():
        names = (
            [REFERENCE]
            if artifact.format == "onnx"
            else [n for n in BACKENDS if (artifact.format,) == BACKENDS[n].opens]
        )
        if artifact.format in ("safetensors", "tensorrt", "tensorrt_rtx") or artifact.precision not in ("fp32", "fp16"):
            continue
        steps, precision = artifact.num_inference_steps, artifact.precision
        size = sum(entry.size for entry in files_of(bundle.manifest, artifact.path))
        for name in names or [""]:
            if not name:
                left_out.append(f"{artifact.path}: {artifact.format} has no backend here")
                continue
            options: dict[str, Any] = {} if name == "executorch" else {"num_threads": 1}
            try:
                gen = stack.enter_context(Generator.from_pretrained(
                    bundle.path, backend=name, precision=precision, num_inference_steps=steps, verify="none", **options
                ))  # fmt: skip
            except BackendUnavailable as exc:
                left_out.append(f"{artifact.path}: {exc}")
                continue
            rows.append(native_row(gen, example_of(bundle.spec(steps)), name, precision, steps, size))
    return rows


def web_rows(bundle: Bundle, stack: ExitStack, left_out: list[str]) -> list[Row]:
    """Make a site of the bundle and return a row for each of its graphs, run in one Node process."""
    from scm_sdk.export.edge.site import write_site

    node = shutil.which("node")
    if node is None:
        left_out.append(f"{WEB}: node is not installed")
        return []
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scm-edge-")))
    write_site(bundle.path, folder / "site", devices=["wasm"])
    command = [node, "--input-type=module", "--eval", NODE, (folder / "site").as_uri(), str(folder)]
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    )
    stack.callback(process.kill)

    def ask(request: dict[str, Any]) -> float:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise click.ClickException("node ended; its error is above")
        return float(line)

    def row(precision: Precision, steps: int, size: int) -> Row:
        spec = bundle.spec(steps)
        example = example_of(spec)

        def request(count: int) -> dict[str, Any]:
            _, inputs = example.inputs(0, count)
            paths = {}
            for tensor in spec.conditioning:
                array = inputs[tensor.name]
                paths[tensor.name] = str(folder / f"{count}.{tensor.name}.{array.dtype}")
                array.tofile(paths[tensor.name])
            asked: dict[str, Any] = {"seeds": [str(seed) for seed in range(count)], "conditioning": paths}
            asked |= {"precision": precision, "steps": steps}
            if "class_labels" in inputs:
                asked["classLabels"] = inputs["class_labels"].tolist()
            if "guidance_scale" in inputs:
                asked["guidanceScale"] = float(inputs["guidance_scale"][0])
            return asked

        one = request(1)

        def images() -> np.ndarray:
            ask(request(SEEDS) | {"name": "images"})
            return np.fromfile(folder / "images", "<f4").reshape(SEEDS, *spec.image_shape)

        return Row(WEB, precision, steps, size, images, lambda: ask(one))

    graphs = [a for a in bundle.artifacts(format="onnx") if a.precision in ("fp32", "fp16")]
    return [
        row(a.precision, a.num_inference_steps, sum(e.size for e in files_of(bundle.manifest, a.path))) for a in graphs
    ]


def measure(rows: list[Row], rounds: int) -> list[list[float]]:
    """Return the times of each row, ms, one for each round; the first round is not counted."""
    times: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds + 1):
        for i in range(len(rows)):
            at = (i + turn) % len(rows)
            found = rows[at].once()
            if turn:
                times[at].append(found)
    return times


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(5), default=60, show_default=True, help="Calls of each row.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the result.")
def main(path: Path, rounds: int, out: Path | None) -> None:
    """Compare the runtimes that run BUNDLE's artifacts."""
    check_class(out)
    bundle, left_out = Bundle.open(path), list[str]()
    with ExitStack() as stack:
        reference = stack.enter_context(
            Generator.from_pretrained(path, backend="torch", precision="fp32", num_threads=1)
        )
        wanted: dict[int, np.ndarray] = {}
        rows = [*native_rows(bundle, stack, left_out), *web_rows(bundle, stack, left_out)]
        rows.sort(key=lambda row: (row.steps, row.runtime != REFERENCE, row.runtime, row.precision != "fp32"))
        found = []
        for row in rows:
            spec = bundle.spec(row.steps)
            if row.steps not in wanted:
                example = example_of(spec)
                backend = reference.opened(row.steps).backend
                parts = [np.asarray(backend.sample(*example.inputs(i, i + 1))) for i in range(SEEDS)]
                wanted[row.steps] = np.concatenate(parts)
            found.append(difference(row.images(), wanted[row.steps], list(range(SEEDS)), spec))
        times = measure(rows, rounds)
    base = {row.steps: times[i] for i, row in enumerate(rows) if (row.runtime, row.precision) == (REFERENCE, "fp32")}
    table = []
    click.echo("| runtime | precision | steps | largest difference | PSNR, dB | MB | ms | time, quartiles |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for row, each, ms in zip(rows, found, times, strict=True):
        ratios = sorted(a / b for a, b in zip(ms, base[row.steps], strict=True))
        low, median, high = statistics.quantiles(ratios, n=4)
        table.append({
            "runtime": row.runtime, "precision": row.precision, "steps": row.steps, "bytes": row.bytes,
            "max_abs": each.max_abs, "psnr_db": each.psnr_db, "median_ms": statistics.median(ms),
            "ratio": {"median": median, "quartiles": [low, high]},
        })  # fmt: skip
        click.echo(
            f"| {row.runtime} | {row.precision} | {row.steps} | {each.max_abs:.1e} | {each.psnr_db:.1f} | "
            f"{row.bytes / 1e6:.2f} | {statistics.median(ms):.2f} | {median:.2f} ({low:.2f} to {high:.2f}) |"
        )
    for line in left_out:
        click.echo(f"left out: {line}", err=True)
    if out is not None:
        result = {
            "bundle": bundle.manifest.name, "build_id": bundle.manifest.build_id, "seeds": SEEDS, "rounds": rounds,
            "machine": describe_machine(), "libraries": {name: installed_version(name) for name in LIBRARIES},
            "rows": table, "left_out": left_out,
        }  # fmt: skip
        atomic_write_bytes(out, json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
