"""SANA-Sprint in lower precisions and as engines; their conditioning is a user's prompts, on record."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from helpers.bf16 import COMPUTES_BF16
from helpers.commands import invoke, run
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.calibration import Calibration
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
from scm_sdk.export.precision.probe import bundle_examples
from scm_sdk.export.precision.variants import add_precision

BLOCK = "step0/transformer.transformer_blocks.0"


def types_of(graph: Path) -> dict[str, str]:
    return {n.name or "": n.outputs[0].dtype.name for n in read_model(graph).graph if n.outputs[0].dtype is not None}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog on the moon\n\na fish\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("precision", "low"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_half_precision_keeps_its_sums_and_its_guards(sana_bundle_copy: Path, precision: Any, low: str) -> None:
    (variant,) = add_precision(sana_bundle_copy, default_plan(precision), steps=[1], num_samples=2)
    assert (variant.psnr_db is None) == (precision == "bf16" and not COMPUTES_BF16) and (variant.psnr_db or 99) > (
        20 if precision == "bf16" else 45
    )
    types = types_of(sana_bundle_copy / variant.path)
    full = [f"{BLOCK}.attn1/MatMul", f"{BLOCK}.attn1/Div", f"{BLOCK}.attn1.norm_q/ReduceMean"]
    full += [name for name in types if name.startswith("step0/flow_output/")]
    full += [name for name in types if name.startswith("decoder/") and name.endswith("attn/Div")]
    half = [f"{BLOCK}.attn1.to_q/MatMul", f"{BLOCK}.attn2/MatMul", f"{BLOCK}.ff.conv_inverted/Conv"]
    half += ["decoder/module.conv_out/Conv"]
    assert {types[name] for name in full} == {"FLOAT"} and len(full) >= 3 + 4 + 1
    assert {types[name] for name in half} == {low}


def test_int8_is_calibrated_on_prompts_and_says_so(sana_bundle_copy: Path, prompts: Path) -> None:
    options = QuantizeOptions(num_samples=4, equalize=False)
    (drawn,) = add_int8(sana_bundle_copy, options, steps=[1])
    assert any("standard normal: give --prompts" in note for note in drawn.notes)
    record = sana_bundle_copy / "calibration" / "int8-1step.json"
    first = Calibration.from_json(record.read_bytes())
    assert first.conditioning == "prompt_embeds, prompt_attention_mask: drawn from the seeds, standard normal"
    examples = bundle_examples(sana_bundle_copy, prompts)
    assert len(examples) == 3 and examples.rows([4])["prompt_embeds"].shape == (1, 16, 8)
    (told,) = add_int8(sana_bundle_copy, options, steps=[1], examples=examples)
    second = Calibration.from_json(record.read_bytes())
    assert not told.unchanged and not any("--prompts" in note for note in told.notes)
    assert second.conditioning == f"3 prompts of prompts.txt, sha256 {examples.sha256}"
    behind_the_prompt = f"{BLOCK}.ff.conv_inverted/Conv"
    assert first.ranges[behind_the_prompt] != second.ranges[behind_the_prompt]
    (again,) = add_int8(sana_bundle_copy, options, steps=[1], examples=examples)
    assert again.unchanged, "the same prompts make the same graph"


def test_the_command_refuses_a_file_without_prompts(sana_bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n", encoding="utf-8")
    done = invoke("quantize", sana_bundle_copy, "--prompts", tmp_path / "none.txt")
    assert done.exit_code == 2 and "holds 0 prompts, expected 1..4096, one a line" in done.output
    assert not (sana_bundle_copy / "onnx" / "int8").exists()


@pytest.mark.slow
@pytest.mark.shared_cache
def test_all_goes_on_from_an_import_to_engines(sana_bundle_copy: Path, prompts: Path) -> None:
    """Graphs of 1, 2 and 4 steps in each precision, engines for an A100 with their census, proof on the prompts."""
    precisions = [part for name in ("fp16", "bf16", "int8") for part in ("--precision", name)]
    arguments = ["all", sana_bundle_copy, "-o", sana_bundle_copy, "--target", "a100", *precisions]
    done = run(*arguments, "--prompts", prompts, "--no-validate")
    assert "exported already" in done.output
    bundle = Bundle.open(sana_bundle_copy)
    engines = [artifact for artifact in bundle.manifest.artifacts if artifact.path.startswith("engines/")]
    assert {(e.precision, e.num_inference_steps) for e in engines} == {
        (precision, steps) for precision in ("fp16", "bf16", "int8") for steps in (1, 2, 4)
    }
    for engine in engines:
        record = json.loads((bundle.file(engine.path).parent / "build.json").read_bytes())
        built = record["census"]["built"]["convolutions"]
        low = {"fp16": "Half", "bf16": "BFloat16", "int8": "Int8"}[engine.precision]
        assert not record["census"]["mismatches"] and built[low] == max(built.values()) and "Float" not in built
    reason = "a tiny random network magnifies rounding"
    able = [part for name in ("fp32", "fp16", "int8") for part in ("--precision", name)]
    able += ["--steps", 1, "--steps", 2]  # after four, fp16 in its decoder is off by more than any trained one may be
    found = json.loads(run("validate", sana_bundle_copy, "--prompts", prompts, "--num-seeds", 3, "--backend",
                           "onnxruntime", *able, "--min-psnr", 35, "--reason", reason, "--json").stdout)  # fmt: skip
    assert len(found["parity"]) == 3 * 2, "fp32, fp16 and int8: no CPU of ONNX Runtime computes bf16"
