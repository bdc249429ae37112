"""MNN: the sampler as an ``.mnn`` file, converted from the graph in the form that MNN computes right.

Its converter reports success for graphs that it gets wrong, and ends the process for some. So it runs in a process of
its own, and what it wrote has to compute the recorded samples before it goes into the bundle.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from scm_sdk._util.files import scratch_folder
from scm_sdk._util.lazy import installed_version
from scm_sdk.errors import ExportError, ParityError

from ..graph.io import read_model, save_apart
from .portability import portable_form
from .recorded import IMAGES, write_recorded
from .runtimes import EdgeSource

LEAST_DB = 80.0
"""Minimum PSNR of the recorded samples, dB. Wrong operators give less than 40, another order of sums more than 100."""
_CONVERT = """
import sys
import _tools
source, target = sys.argv[1:]
_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--bizCode", "scm", "--modelFile", source, "--MNNModel", target])
"""
_RUN = """
import sys
import numpy as np
import MNN.expr as F
import MNN.nn as nn
path, folder, output, *names = sys.argv[1:]
net = nn.load_module_from_file(path, names, [output])
images = []
arrays = np.load(f"{folder}/feeds.npz")
for i in range(len(arrays[names[0]])):
    feeds = []
    for name in names:
        one = arrays[name][i : i + 1]
        kind = F.int if one.dtype.kind == "i" else F.float
        feeds.append(F.const(one.ravel().tolist(), list(one.shape), F.NCHW, kind))
    image = F.convert(net.forward(feeds)[0], F.NCHW)
    images.append(np.array(image.read(), np.float32).reshape(image.shape))
np.save(f"{folder}/found.npy", np.concatenate(images))
"""


def export(source: EdgeSource, path: Path) -> tuple[str, ...]:
    """Convert the graph with MNN's converter and run the recorded samples; see ``Exporter``.

    Raises:
        UnsupportedGraphError: If the graph holds what MNN gets wrong and no form avoids.
        ParityError: If what was written does not compute the recorded samples.
    """
    spec = source.spec
    with scratch_folder() as folder:
        save_apart(portable_form(read_model(source.path), "mnn"), folder / "model.onnx")
        _run(_CONVERT, folder / "model.onnx", path)
        if not path.is_file():
            raise ExportError(f"MNN {installed_version('MNN')} wrote no file, expected {path.name}. {_REMEDY}")
        count = write_recorded(source.bundle, spec, source.precision, folder)
        kinds = {"float32": "<f4", "int64": "<i8"}
        feeds = {
            t.name: np.fromfile(folder / f"{t.name}.bin", kinds[t.dtype]).reshape(count, *t.shape) for t in spec.inputs
        }
        narrow = {name: a.astype(np.int32) if a.dtype.kind == "i" else a for name, a in feeds.items()}
        np.savez(folder / "feeds.npz", **narrow)  # type: ignore[arg-type]
        _run(_RUN, path, folder, spec.output_name, *feeds)
        found = np.load(folder / "found.npy")
        wanted = np.fromfile(folder / IMAGES, "<f4").reshape(count, *spec.image_shape)
    if found.shape != wanted.shape:
        raise ParityError(f"MNN returned {found.shape} for the recorded samples, expected {wanted.shape}. {_REMEDY}")
    gap = np.abs(found.astype(np.float64) - wanted)
    width = spec.value_range[1] - spec.value_range[0]
    psnr = 10 * np.log10(width**2 / max(float((gap**2).mean()), 1e-30))
    if not psnr >= LEAST_DB:  # NaN, too
        raise ParityError(
            f"MNN {installed_version('MNN')} computes the recorded samples with {psnr:.1f} dB, expected at least "
            f"{LEAST_DB:.0f} dB. Nothing was added. {_REMEDY}"
        )
    labels = ["labels: int32 in this file"] if any(t.dtype == "int64" for t in spec.inputs) else []
    return (f"recorded samples: largest difference {gap.max():.1e}, PSNR {psnr:.1f} dB", *labels)


_REMEDY = "Run the ONNX graph with another runtime, and report it."


def _run(code: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-2:])[:400]
        raise ExportError(f"MNN {installed_version('MNN')} failed: {said or f'exit {done.returncode}'}. {_REMEDY}")
