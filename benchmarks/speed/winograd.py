"""Find the size from which Winograd is faster than a direct 3x3 convolution on this CPU, in pairs of calls.

    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/speed/winograd.py --json winograd-avx512_bf16.json

Chains of four convolutions, each with filters of its own, as they are and as ``scm-export precision --to fp32-cpu``
rewrites them, with one thread of ONNX Runtime and of OpenVINO. Times are of the processor; the ratio is the median over
rounds, above 1 where the products are faster. ``export/precision/winograd.py`` rewrites what this shows to gain.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import onnx_ir as ir
from result_files import check_class

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.export.precision import winograd

LAYERS = 4
SIZES = [  # channels, side, batch
    (256, 32, 1), (256, 32, 8), (256, 16, 1), (256, 16, 8), (256, 8, 1), (256, 8, 8), (128, 32, 1), (128, 16, 1),
    (64, 32, 1), (64, 32, 8), (192, 64, 1), (128, 128, 1), (256, 128, 1),
    (512, 64, 1), (384, 32, 1), (576, 16, 1), (768, 8, 1), (768, 8, 8),
]  # fmt: skip
Run = Callable[[np.ndarray], np.ndarray]


def chain(channels: int, side: int, rng: np.random.Generator) -> ir.Model:
    """Return so many convolutions one after the other, each with a bias."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    shape = ir.Shape(["batch", channels, side, side])
    last = x = ir.Value(name="x", shape=shape, type=kind)
    nodes, weights = [], []
    for i in range(LAYERS):
        filters = rng.standard_normal((channels, channels, 3, 3), np.float32) / np.float32(3 * channels**0.5)
        arrays = {f"weight_{i}": filters, f"bias_{i}": np.zeros(channels, np.float32)}
        own = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
        out = ir.Value(name=f"y_{i}", shape=shape, type=kind)
        pads = [ir.AttrInt64s("pads", [1, 1, 1, 1])]
        nodes.append(ir.Node("", "Conv", [last, *own], pads, outputs=[out], name=f"conv_{i}"))
        weights += own
        last = out
    graph = ir.Graph([x], [last], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="chain")
    return ir.Model(graph, ir_version=10)


def on_onnxruntime(model: bytes) -> Run:
    """One thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(session.run(None, {"x": x})[0])


def on_openvino(model: bytes, batch: int) -> Run:
    """One thread, compiled for the batch, in float32."""
    import openvino as ov

    core = ov.Core()
    read = core.read_model(model, b"")
    (port,) = read.inputs
    read.reshape([batch, *list(port.partial_shape)[1:]])
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    return lambda x: np.array(request.infer({0: x})[0])


def compare(channels: int, side: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time both forms on both libraries, ms."""
    rng = np.random.default_rng(0)
    plain = chain(channels, side, rng)
    with mock.patch.multiple(winograd, LEAST_CHANNELS=0, LEAST_TILES=0, LEAST_PRODUCT=0, CHANNELS_PER_SIDE=0):
        products = plain.clone()
        winograd.products_for_convolutions(products)
    texts = {name: ir.to_proto(model).SerializeToString() for name, model in (("conv", plain), ("products", products))}
    x = rng.standard_normal((batch, channels, side, side), np.float32)
    rows = []
    for library, load in (("onnxruntime", on_onnxruntime), ("openvino", lambda text: on_openvino(text, batch))):
        ways = {name: load(text) for name, text in texts.items()}
        images = {name: way(x) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(rounds):
            for name in list(ways)[:: 1 if i % 2 else -1]:
                began = time.process_time()
                ways[name](x)
                times[name].append((time.process_time() - began) * 1e3)
        gain = statistics.median(a / b for a, b in zip(times["conv"], times["products"], strict=True))
        error = float(np.abs(images["products"] - images["conv"]).max() / np.abs(images["conv"]).max())
        rows.append(
            {"channels": channels, "side": side, "batch": batch, "library": library, "gain": gain, "error": error}
            | {f"{name}_ms": [round(ms, 3) for ms in samples] for name, samples in times.items()}
        )
    return rows


@click.command()
@click.option("--rounds", type=click.IntRange(3), default=9, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the raw samples.")
def main(rounds: int, out: Path | None) -> None:
    """Time both forms of a 3x3 convolution over sizes."""
    check_class(out)
    print(f"{'channels side batch':<22}{'library':<14}{'conv ms':>9}{'products ms':>13}{'gain':>7}{'error':>10}")
    rows = []
    for size in SIZES:
        for row in compare(*size, rounds):
            conv, products = (statistics.median(row[f"{name}_ms"]) for name in ("conv", "products"))
            size_text = f"{row['channels']:>8} {row['side']:>4} {row['batch']:>5}"
            print(
                f"{size_text:<22}{row['library']:<14}{conv:>9.2f}{products:>13.2f}{row['gain']:>7.2f}{row['error']:>10.1e}",
                flush=True,
            )
            rows.append(row)
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "clock": "processor time of the process",
            "results": rows,
        }
        atomic_write_bytes(out, json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
