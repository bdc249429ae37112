"""Files for a Jetson Orin: the graph, recorded samples, and scripts that build an engine there and check it.

TensorRT builds an engine for a Jetson on the Jetson alone. The folder needs ``trtexec`` of JetPack and Python there,
nothing of this package. TensorRT 10 (JetPack 6) and 11 (JetPack 7.2.2) parse the graph; its types are its precision, so
the build is strongly typed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from scm_sdk._util.files import sha256_file
from scm_sdk._util.publish import atomic_folder
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import ConfigError, UnsupportedGraphError
from scm_sdk.spec import CPU_PRECISIONS, Precision, SamplerSpec

from ..graph.io import data_path_of, read_model
from ..graph.trace import OPSET
from .recorded import EXPECTED, write_recorded

ENGINE = "model.engine"
_PRINTED = 1e-5
"""trtexec writes outputs with six digits: the error of a number up to 10, data units."""


@dataclass(frozen=True, kw_only=True)
class OrinHandover:
    """Report of a written folder.

    Attributes:
        folder: The folder to copy to the Jetson.
        precision: Precision of the graph.
        num_inference_steps: Number of steps of the graph.
        bytes: Size of all files.
        command: Command to run in the folder on the Jetson.
    """

    folder: Path
    precision: Precision
    num_inference_steps: int
    bytes: int
    command: str


def write_orin(
    path: str | os.PathLike[str], folder: Path, *, steps: int, precision: Precision = "fp16"
) -> OrinHandover:
    """Write the folder, whole or not at all; an earlier one of this kind is replaced.

    Args:
        path: The bundle.
        folder: Destination folder.
        steps: Number of steps.
        precision: Precision of the graph; the engine computes in it.

    Raises:
        ConfigError: If the bundle has no such graph, no recorded samples of it, or the graph is made for CPUs.
        UnsupportedGraphError: If TensorRT 10.3 of JetPack 6 does not read the graph's opset.
        BundleError: If the bundle is damaged, or the folder cannot be written.
    """
    bundle = Bundle.open(path)
    bundle.check_not_split("a handover to a Jetson")
    spec = bundle.spec(steps)
    graph = _graph(bundle, steps, precision)
    with atomic_folder(folder, overwrite=True, marker=EXPECTED) as out:
        shutil.copyfile(graph, out / graph.name)
        if data_path_of(graph).exists():
            shutil.copyfile(data_path_of(graph), out / data_path_of(graph).name)
        count = write_recorded(bundle, spec, precision, out, printed=_PRINTED)
        for name, text in _scripts(spec, graph.name, count).items():
            (out / name).write_text(text, encoding="utf-8")
        sums = "".join(f"{sha256_file(each)}  {each.name}\n" for each in sorted(out.iterdir()))
        (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
        size = sum(each.stat().st_size for each in out.iterdir())
    return OrinHandover(
        folder=folder, precision=precision, num_inference_steps=steps, bytes=size, command="sh build.sh && sh check.sh"
    )


def _graph(bundle: Bundle, steps: int, precision: Precision) -> Path:
    found = [a for a in bundle.artifacts(format="onnx", precision=precision) if a.num_inference_steps == steps]
    if precision in CPU_PRECISIONS or not found:
        there = sorted({a.precision for a in bundle.artifacts(format="onnx")} - CPU_PRECISIONS)
        raise ConfigError(
            f"{bundle.path} has no {precision} graph of {steps} steps for a GPU, expected one of {', '.join(there)}. "
            f"Make it: scm-export precision, or scm-export quantize for int8.{bundle.manifest.cut_note}"
        )
    path = bundle.file(found[0].path)
    opset = read_model(path).opset_imports[""]
    if opset > OPSET:
        raise UnsupportedGraphError(
            f"the {precision} graph is of opset {opset}, expected at most {OPSET}: TensorRT 10.3 of JetPack 6 reads no "
            "later one. Take fp16 or int8."
        )
    return path


def _shapes(spec: SamplerSpec, batch: int) -> str:
    return ",".join(f"{t.name}:{'x'.join(map(str, (batch, *t.shape)))}" for t in spec.inputs)


def _scripts(spec: SamplerSpec, graph: str, count: int) -> dict[str, str]:
    values = {
        "GRAPH": graph,
        "ENGINE": ENGINE,
        "MIN": _shapes(spec, 1),
        "OPT": _shapes(spec, 1),
        "MAX": _shapes(spec, max(count, min(8, spec.max_batch))),
        "SHAPES": _shapes(spec, count),
        "INPUTS": ",".join(f"{t.name}:{t.name}.bin" for t in spec.inputs),
    }
    folder = files(__package__) / "orin_files"  # pyright: ignore[reportArgumentType]
    made = {}
    for name in ("README.md", "build.sh", "check.sh", "check.py"):
        text = (folder / name).read_text(encoding="utf-8")
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        made[name] = text
    return made
