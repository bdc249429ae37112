"""Polygraphy re-checks us from files alone, and its outputs are judged by our gate: both ways, by its own command."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from scm_sdk.errors import ConfigError, ParityError
from scm_sdk.export.cli import main
from scm_sdk.export.handover import check_outputs, write_handover

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'scm-sdk[polygraphy]'")


@pytest.fixture(scope="module")
def folder(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("handover")
    run = CliRunner().invoke(main, ["handover", str(unet_bundle), "-o", str(path), "--num-samples", "7"])
    assert run.exit_code == 0 and "--load-inputs inputs.json" in run.stderr, run.output
    return path


def polygraphy(folder: Path, graph: Path, *more: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("polygraphy")
    command = [str(tool), "run", str(graph), "--onnxrt", "--load-inputs", "inputs.json", *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_polygraphy_accepts_our_reference_and_we_accept_its_outputs(unet_bundle: Path, folder: Path) -> None:
    graph = unet_bundle / "onnx/fp32/2step/model.onnx"
    compare = ("--load-outputs", "reference.json", "--atol", "1e-3", "--rtol", "1e-3")
    done = polygraphy(folder, graph, *compare, "--save-outputs", "outputs.json")
    assert done.returncode == 0, done.stdout + done.stderr
    run = CliRunner().invoke(main, ["handover", str(unet_bundle), "--check", str(folder / "outputs.json"), "--json"])
    assert run.exit_code == 0 and "pass  onnxrt" in run.stderr, run.output


def test_both_sides_notice_another_model(unet_bundle: Path, folder: Path) -> None:
    import onnx_ir as ir

    model = ir.load(unet_bundle / "onnx/fp32/2step/model.onnx")
    weight = model.graph.initializers["conv_in.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.5), name="conv_in.weight")
    ir.save(model, folder / "wrong.onnx")
    done = polygraphy(folder, folder / "wrong.onnx", "--load-outputs", "reference.json", "--atol", "1e-3")
    assert done.returncode != 0, "polygraphy fails it"
    polygraphy(folder, folder / "wrong.onnx", "--save-outputs", "wrong.json")
    with pytest.raises(ParityError, match=r"onnxrt.* differs from torch by .*look at seed"):
        check_outputs(unet_bundle, folder / "wrong.json", steps=2)
    with pytest.raises(ParityError, match="expected at least 60 dB for fp16"):
        check_outputs(unet_bundle, folder / "wrong.json", steps=2, precision="fp16")


def test_files_that_do_not_belong_together(unet_bundle: Path, folder: Path, tmp_path: Path) -> None:
    other = write_handover(unet_bundle, tmp_path, steps=2, num_samples=3)
    with pytest.raises(ConfigError, match=r"expected \(3, 3, 8, 8\), the samples of inputs.json"):
        check_outputs(unet_bundle, folder / "reference.json", steps=2, inputs=other.inputs)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken.json cannot be read"):
        check_outputs(unet_bundle, tmp_path / "broken.json", steps=2)
