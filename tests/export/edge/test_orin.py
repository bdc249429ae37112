"""The folder for a Jetson: a graph that TensorRT's parser takes, inputs, samples, and scripts that need no package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import ConfigError, UnsupportedGraphError
from scm_sdk.export.cli import main
from scm_sdk.export.edge.orin import write_orin

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")


@pytest.fixture(params=["fp32", "fp16"])
def folder(request: pytest.FixtureRequest, graphs: Path, tmp_path: Path) -> Path:
    out = tmp_path / request.param
    arguments = ["handover", str(graphs), "--target", "orin", "--steps", "1", "--precision", request.param]
    done = CliRunner().invoke(main, [*arguments, "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["command"] == "sh build.sh && sh check.sh"
    return out


def inputs(folder: Path) -> dict[str, np.ndarray]:
    """Read the inputs as check.sh names them: names, shapes and files."""
    text = (folder / "check.sh").read_text("utf-8")
    shapes = dict(part.split(":") for part in re.search(r"--shapes=(\S+)", text)[1].split(","))  # type: ignore[index]
    files = dict(part.split(":") for part in re.search(r"--loadInputs=(\S+)", text)[1].split(","))  # type: ignore[index]
    assert shapes.keys() == files.keys()
    kinds = {"class_labels": np.int64}
    return {
        name: np.fromfile(folder / files[name], kinds.get(name, np.float32)).reshape([int(d) for d in shape.split("x")])
        for name, shape in shapes.items()
    }


def outputs_of(folder: Path, scale: float = 1.0) -> dict:
    """Return what trtexec would write: six digits, from the graph in the folder."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.run(["images"], inputs(folder))
    values = [float(f"{value:.6g}") for value in (images * scale).ravel()]  # pyright: ignore[reportOperatorIssue]
    return {"name": "images", "dimensions": "x".join(map(str, images.shape)), "values": values}


def check(folder: Path, *outputs: dict) -> subprocess.CompletedProcess[str]:
    (folder / "outputs.json").write_text(json.dumps(outputs), encoding="utf-8")
    command = [sys.executable, "-I", "-S", "check.py", "outputs.json"]  # -S: without any package
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=900)


def test_the_recorded_samples_come_out_and_faults_are_found(folder: Path) -> None:
    right = check(folder, outputs_of(folder))
    assert right.returncode == 0 and right.stdout.count("pass  sample") == 4, right.stdout + right.stderr
    wrong = check(folder, outputs_of(folder, scale=1.02))
    assert wrong.returncode == 3 and "do not ship this engine" in wrong.stdout
    nan = outputs_of(folder)
    nan["values"][5] = float("nan")
    assert check(folder, nan).returncode == 3
    assert check(folder).returncode == 3, "no such output"
    short = outputs_of(folder)
    short["values"].pop()
    assert check(folder, short).returncode == 3


def test_inputs_are_those_of_the_recorded_seeds(folder: Path, graphs: Path) -> None:
    golden = Bundle.open(graphs).goldens()[1]
    found = inputs(folder)
    np.testing.assert_array_equal(found["class_labels"], golden.class_labels)
    np.testing.assert_array_equal(np.fromfile(folder / "images.bin", "<f4"), golden.images.ravel())


TRTEXEC = """#!/bin/sh
if [ "$1" = --help ]; then echo "{help}"; exit 0; fi
echo "$@" >> "$0.log"
"""


@pytest.mark.parametrize(("help_text", "typed"), [("--stronglyTyped  Create", True), ("--noTF32", False)])
def test_build_checks_the_files_and_types_the_engine_strongly(folder: Path, help_text: str, typed: bool) -> None:
    """There is no trtexec here: a stand-in records its arguments. TensorRT 10 knows the option, 11 is always so."""
    tool = folder.parent / "trtexec"
    tool.write_text(TRTEXEC.format(help=help_text), encoding="utf-8")
    tool.chmod(0o755)
    env = os.environ | {"TRTEXEC": str(tool)}
    done = subprocess.run(
        ["sh", folder / "build.sh", "--verbose"], env=env, capture_output=True, encoding="utf-8", timeout=900
    )
    assert done.returncode == 0, done.stderr
    told = tool.with_name("trtexec.log").read_text("utf-8").split()
    assert ("--stronglyTyped" in told) == typed and "--onnx=model.onnx" in told and told[-1] == "--verbose"
    assert "--minShapes=noise_0:1x3x8x8,class_labels:1" in told
    (batch,) = {int(n) for n in re.findall(r"--maxShapes=noise_0:(\d+)x", " ".join(told))}
    assert batch >= 4, "the recorded samples fit"
    graph = bytearray((folder / "model.onnx").read_bytes())
    graph[-1] ^= 1
    (folder / "model.onnx").write_bytes(graph)
    damaged = subprocess.run(["sh", folder / "build.sh"], env=env, capture_output=True, encoding="utf-8", timeout=900)
    assert damaged.returncode != 0 and "model.onnx" in damaged.stdout + damaged.stderr


def test_the_parser_takes_the_graph(folder: Path) -> None:
    """The parser of TensorRT-RTX is that of TensorRT 11; the opset is what that of 10.3, in JetPack 6, reads."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(folder / "model.onnx")), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    assert [network.get_input(i).name for i in range(network.num_inputs)] == list(inputs(folder))
    import onnx_ir as ir

    assert ir.load(folder / "model.onnx").opset_imports[""] <= 20


def test_what_cannot_be_handed_over_is_said(graphs: Path, unet_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no fp16 graph of 2 steps for a GPU"):
        write_orin(graphs, tmp_path / "out", steps=2)
    with pytest.raises(ConfigError, match=r"no int8-cpu graph"):
        write_orin(graphs, tmp_path / "out", steps=1, precision="int8-cpu")
    with pytest.raises(UnsupportedGraphError, match=r"bf16 graph is of opset 22, expected at most 20.*JetPack 6"):
        write_orin(graphs, tmp_path / "out", steps=1, precision="bf16")
    assert not (tmp_path / "out").exists()
    write_orin(unet_bundle, tmp_path / "out", steps=1, precision="fp32")
    write_orin(unet_bundle, tmp_path / "out", steps=2, precision="fp32")
    assert "noise_1" in (tmp_path / "out" / "check.sh").read_text("utf-8"), "an earlier folder of this kind is replaced"
