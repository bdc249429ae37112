"""Polygraphy re-checks us from files alone, and its outputs are judged by our gate: both ways, by its own command."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import ParityRecord
from scm_sdk.errors import ConfigError, ParityError
from scm_sdk.export.cli import main
from scm_sdk.export.polygraphy import check_outputs, write_handover
from scm_sdk.export.precision.variants import add_cpu_form

pytest.importorskip("polygraphy", reason="polygraphy is not installed")


@pytest.fixture(scope="module")
def folder(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("handover")
    run = CliRunner().invoke(main, ["handover", str(unet_bundle), "-o", str(path), "--num-samples", "7"])
    assert run.exit_code == 0 and "--load-inputs inputs.json" in run.stderr, run.output
    return path


def polygraphy(folder: Path, graph: Path, *more: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("polygraphy")
    command = [str(tool), "run", str(graph), "--onnxrt", "--load-inputs", "inputs.json", *more]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=120)


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
    with pytest.raises(ParityError, match="expected at least 55 dB for fp16"):
        check_outputs(unet_bundle, folder / "wrong.json", steps=2, precision="fp16")


def test_files_that_do_not_belong_together(unet_bundle: Path, folder: Path, tmp_path: Path) -> None:
    other = write_handover(unet_bundle, tmp_path, steps=2, num_samples=3)
    with pytest.raises(ConfigError, match=r"expected \(3, 3, 8, 8\), the samples of inputs.json"):
        check_outputs(unet_bundle, folder / "reference.json", steps=2, inputs=other.inputs)
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.json cannot be read"):
        check_outputs(unet_bundle, tmp_path / "broken.json", steps=2)


def option(words: list[str], name: str) -> list[str]:
    """Return what follows an option, up to the next one."""
    rest = words[words.index(name) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


def test_the_command_builds_for_the_batches_that_it_feeds(unet_bundle: Path, tmp_path: Path) -> None:
    """Without a profile Polygraphy sets the batch to 1, and then refuses our inputs of several."""
    words = shlex.split(write_handover(unet_bundle, tmp_path, steps=2, num_samples=7).command)
    for name, batch in (("min", 1), ("opt", 5), ("max", 5)):
        image = f"[{batch},3,8,8]"
        wanted = [f"noise_0:{image}", f"noise_1:{image}", f"class_labels:[{batch}]"]
        assert option(words, f"--trt-{name}-shapes") == wanted
    (atol,) = option(words, "--atol")
    assert 5e-6 <= float(atol) < 5e-5, "the derived threshold, in data units"
    tool = str(Path(sys.executable).with_name("polygraphy"))
    done = subprocess.run([tool, *words[1:], "--gen-script", "-"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert "min=[1, 3, 8, 8], opt=[5, 3, 8, 8], max=[5, 3, 8, 8]" in done.stdout, done.stdout + done.stderr


def test_fp32_is_held_to_the_threshold_on_record(unet_copy: Path, folder: Path) -> None:
    polygraphy(folder, unet_copy / "onnx/fp32/2step/model.onnx", "--save-outputs", "right.json")
    (found,) = check_outputs(unet_copy, folder / "right.json", steps=2).values()
    assert 0 < found.max_abs < 1e-5, "by the threshold that is derived where none is recorded"
    record = ParityRecord(
        artifact="onnx/fp32/2step/model.onnx", reference="denoiser", backend="onnxruntime", threshold=1e-12,
        noise_floor=0, max_abs=0, num_samples=1, passed=True,
    )  # fmt: skip
    Bundle.open(unet_copy).with_parity(record)
    with pytest.raises(ParityError, match=r"expected at most 1\.0e-12"):
        check_outputs(unet_copy, folder / "right.json", steps=2)


@pytest.mark.parametrize("precision", ["fp32", "fp32-cpu"])
def test_the_printed_command_runs_where_the_files_are(
    graphs: Path, any_size: None, tmp_path: Path, precision: str
) -> None:
    """A graph for CPUs is run by ONNX Runtime; where no GPU is, so is the other."""
    bundle = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    if precision == "fp32-cpu":
        add_cpu_form(bundle, steps=[1], num_samples=0)
    written = write_handover(bundle, tmp_path / "there", steps=1, precision=precision, num_samples=3)
    words = shlex.split(written.command)
    assert words[:3] == ["polygraphy", "run", written.graph.name] and written.graph.is_file()
    if precision == "fp32":
        assert "--trt" in words
        words = ["polygraphy", "run", words[2], "--onnxrt", *words[words.index("--load-inputs") :]]
    assert "--trt" not in words
    done = subprocess.run(
        [sys.executable, str(Path(sys.executable).with_name("polygraphy")), *words[1:]],
        cwd=tmp_path / "there", capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert check_outputs(bundle, tmp_path / "there/outputs.json", steps=1, precision=precision)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {
        "inputs.json", "reference.json", "outputs.json", written.graph.name,
    }  # fmt: skip


def test_what_cannot_be_handed_over(unet_bundle: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision is 'fp61', expected one of fp32, "):
        check_outputs(unet_bundle, folder / "reference.json", steps=2, precision="fp61")
    with pytest.raises(ConfigError, match=r"has no fp16 graph of 2 steps \(it has fp32\)"):
        write_handover(unet_bundle, tmp_path, steps=2, precision="fp16")
    with pytest.raises(ConfigError, match=r"has no fp32 graph of 3 steps \(it has none\)"):
        write_handover(unet_bundle, tmp_path, steps=3)
