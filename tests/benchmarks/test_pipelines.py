"""The tables of parity: what they compare exists, a difference is a fault, and one pipeline passes in every way."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

for library in ("torch", "diffusers", "onnxruntime", "openvino", "tokenizers"):
    pytest.importorskip(library)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks" / "fidelity"))
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def pipelines(benchmarks: None) -> ModuleType:
    import pipelines

    return pipelines


def test_the_tests_of_the_table_exist(benchmarks: None) -> None:
    import parity

    for path, (keywords, _) in parity.CASES.items():
        text = (ROOT / "tests" / f"{path}.py").read_text(encoding="utf-8")
        assert all(word in text for word in keywords.split(" or ")), path


def test_a_difference_a_blank_picture_and_a_refusal_are_faults(pipelines: Any) -> None:
    case = next(case for case in pipelines.all_cases() if case.name == "Flux2KleinPipeline")
    wanted = np.random.default_rng(0).random((2, 8, 8, 3))
    good = pipelines.Result(case, wanted, {way: wanted + 1e-6 for way, *_ in pipelines.WAYS})
    assert good.faults() == [] and pipelines.describe(good, "PyTorch") == "1.0e-06"
    assert pipelines.describe(good, "INT8") == "120.0 dB"
    good.notes["BF16, OpenVINO"] = pipelines.NO_KERNELS
    assert good.faults() == []
    bad = pipelines.Result(
        case, wanted, {"PyTorch": wanted + 2e-5, "OpenVINO": wanted + 2e-5, "INT4 weights": np.full_like(wanted, 0.5)},
        {"FP16": "ExportError: x"},
    )  # fmt: skip
    assert [fault.split(": ")[0] for fault in bad.faults()] == [
        f"Flux2KleinPipeline, {way}" for way in ("FP16", "PyTorch", "INT4 weights")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZImagePipeline", "AnyFlowPipeline"])
def test_a_pipeline_passes_in_every_way(pipelines: Any, name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(pipelines.main, ["--out", str(tmp_path), "--only", name])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "pipelines.json").read_bytes())
    assert [row["way"] for row in record["samples"]] == [way for way, *_ in pipelines.WAYS]
    assert all(row["max_abs"] is not None or row["precision"] == "bf16" for row in record["samples"])
    assert set(record["prompt_embeddings"]) == {name}
    assert f"`{name}`" in (tmp_path / "pipelines.md").read_text(encoding="utf-8")
    with Image.open(tmp_path / "pipelines.png") as picture:
        assert picture.width > 400
    assert (tmp_path / "pipelines.webp").is_file() == (name == "AnyFlowPipeline")
