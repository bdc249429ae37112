"""The conditioning of checks and calibrations: a user's prompts or tensors, in turn by seed; wrong files."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scm_sdk.errors import ConfigError, ScmError, ShapeError
from scm_sdk.export.precision.calibration import describe_conditioning
from scm_sdk.inference.conditioning import Examples, read_examples
from scm_sdk.inference.prompts import Prompts
from scm_sdk.inference.request import make_example
from scm_sdk.spec import SamplerSpec, TensorSpec

SPEC = SamplerSpec(
    times=(1.5,),
    sample_shape=(3, 4, 4),
    conditioning=(
        TensorSpec(name="prompt_embeds", shape=(2, 3)),
        TensorSpec(name="prompt_attention_mask", shape=(2,), dtype="int64", kind="mask"),
    ),
)
PLAIN = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))
EMBEDS = np.arange(18, dtype=np.float32).reshape(3, 2, 3)
MASK = np.array([[1, 1], [1, 0], [1, 1]], np.int64)


def test_rows_are_taken_in_turn_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    save_file({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, path)
    examples = read_examples(path, SPEC, Prompts(None))
    request = make_example(SPEC, [4, 2, (1 << 40) + 3], examples=examples)
    rows = [4 % 3, 2, ((1 << 40) + 3) % 3]
    np.testing.assert_array_equal(request.conditioning["prompt_embeds"], EMBEDS[rows])
    np.testing.assert_array_equal(request.conditioning["prompt_attention_mask"], MASK[rows])
    assert describe_conditioning(SPEC, examples) == f"3 rows of rows.safetensors, sha256 {examples.sha256}"


def test_a_mask_may_be_left_out_and_noise_is_the_same(tmp_path: Path) -> None:
    save_file({"prompt_embeds": EMBEDS}, tmp_path / "rows.safetensors")
    told = make_example(SPEC, [5], examples=read_examples(tmp_path / "rows.safetensors", SPEC, Prompts(None)))
    drawn = make_example(SPEC, [5])
    assert told.conditioning["prompt_attention_mask"].all()
    np.testing.assert_array_equal(told.inputs(0, 1)[0][0], drawn.inputs(0, 1)[0][0])
    assert not np.array_equal(told.conditioning["prompt_embeds"], drawn.conditioning["prompt_embeds"])


def test_the_record_says_what_was_drawn() -> None:
    assert describe_conditioning(PLAIN, None) == ""
    assert describe_conditioning(SPEC, None).endswith("drawn from the seeds, standard normal")
    made = Examples(tensors={"prompt_embeds": EMBEDS}, source="3 prompts of p.txt", sha256="ab")
    assert describe_conditioning(SPEC, made) == "3 prompts of p.txt, sha256 ab" and len(made) == 3


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"prompt_attention_mask": MASK}, ConfigError, r"expected \['prompt_embeds'\]"),
        ({"prompt_embeds": EMBEDS, "other": MASK}, ConfigError, "holds .*'other'"),
        ({"prompt_embeds": EMBEDS[:, :1]}, ShapeError, r"is \(3, 1, 3\) float32, expected \(N, 2, 3\) float32"),
        ({"prompt_embeds": EMBEDS.astype(np.float16)}, ShapeError, "float16, expected"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[:2]}, ShapeError, "one N for all"),
        ({"prompt_embeds": EMBEDS[:0]}, ShapeError, r"is \(0, 2, 3\)"),
        ({"prompt_embeds": np.float32(1)[None][0:1].reshape(())}, ShapeError, r"is \(\)"),
        ({"prompt_embeds": EMBEDS * np.float32("nan")}, ConfigError, "holds NaN or infinity"),
    ],
)
def test_other_tensors_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], error: type[ScmError], message: str
) -> None:
    save_file(tensors, tmp_path / "rows.safetensors")
    with pytest.raises(error, match=message):
        read_examples(tmp_path / "rows.safetensors", SPEC, Prompts(None))


@pytest.mark.parametrize(
    ("name", "data", "spec", "message"),
    [
        ("p.txt", b"a cat\n", PLAIN, "this model takes no prompt"),
        ("p.txt", b"\n  \n", SPEC, r"holds 0 prompts, expected 1\.\.4096"),
        ("p.txt", b"x\n" * 5000, SPEC, "holds 5000 prompts"),
        ("p.txt", b"\xff\xfe", SPEC, "is no UTF-8 text"),
        ("p.txt", b"x" * (5 << 20), SPEC, "bytes, expected prompts of at most"),
        ("p.txt", b"a cat\n", SPEC, "came without its text encoder"),
        ("p.safetensors", b"torn", SPEC, "is no safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, data: bytes, spec: SamplerSpec, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_examples(tmp_path / name, spec, Prompts(None))


def test_a_file_that_is_not_there_and_inputs_that_are_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no file, expected prompts, one a line"):
        read_examples(tmp_path / "absent.txt", SPEC, Prompts(None))
    own = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4), conditioning=(TensorSpec(name="pitch", shape=(4,)),))
    (tmp_path / "p.txt").write_text("a cat", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"this model takes pitch\. Give a \.safetensors file"):
        read_examples(tmp_path / "p.txt", own, Prompts(None))
