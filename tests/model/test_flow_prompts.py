"""Prompts of Wan's students: UMT5 apart, embeddings as the pipeline's own, and a bundle that takes a text."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from helpers.few_step_fixtures import SIZES, TOKENS, make_pipeline  # noqa: E402
from scm_sdk import Generator  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError  # noqa: E402
from scm_sdk.export.cli import main  # noqa: E402
from scm_sdk.model.foreign.few_step import load_few_step  # noqa: E402
from scm_sdk.model.foreign.few_step_folder import Settings, read_few_step_folder  # noqa: E402
from scm_sdk.model.foreign.flow_prompts import open_encoder  # noqa: E402

PROMPTS = ["a cat", "a  dog on\nthe moon &amp; a cat"]
SETTINGS = Settings(max_sequence_length=TOKENS, distilled=True, **SIZES["WanPipeline"])


@pytest.fixture(scope="module")
def text() -> dict[str, Any]:
    """A tiny UMT5 and its tokenizer."""
    torch.manual_seed(0)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefghijklmnopqrst&")]
    config = transformers.UMT5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return {
        "tokenizer": transformers.T5TokenizerFast(vocab=words, extra_ids=0),
        "text_encoder": transformers.UMT5EncoderModel(config).eval(),
    }


@pytest.fixture(scope="module")
def folder(text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of Wan with its text encoder; read only."""
    pipeline = make_pipeline("WanPipeline")
    path = tmp_path_factory.mktemp("wan-text") / "pipeline"
    kept = {name: getattr(pipeline, name) for name in ("transformer", "vae", "scheduler")}
    type(pipeline)(**kept, **text).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def imported(folder: Path) -> Path:
    """What an import keeps of it, without graphs; read only."""
    load_few_step(folder, SETTINGS).save_pretrained(folder.parent / "imported")
    return folder.parent / "imported"


def test_embeddings_are_those_of_the_pipeline(text: dict[str, Any], imported: Path) -> None:
    import diffusers

    own = diffusers.WanPipeline(vae=None, transformer=None, scheduler=None, **text)
    with torch.no_grad():
        wanted, _ = own.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    embeds, mask = open_encoder(imported).encode(PROMPTS, TOKENS)
    np.testing.assert_allclose(embeds, wanted.numpy(), atol=1e-6)
    assert embeds.shape == (2, TOKENS, 8) and mask.all() and np.abs(embeds[0] - embeds[1]).max() > 1e-3


def test_a_folder_takes_prompts(imported: Path) -> None:
    with Generator.from_pretrained(imported, backend="torch", num_threads=1) as gen:
        two = gen(2, prompt=PROMPTS, seed=3, output_type="np").images
        embeds, _ = open_encoder(imported).encode(PROMPTS, TOKENS)
        same = gen(2, prompt_embeds=embeds, seed=3, output_type="np").images
    np.testing.assert_array_equal(two, same)
    assert two.shape == (2, 5, 32, 48, 3)


def test_a_copy_without_the_encoder_takes_embeddings_only(folder: Path, tmp_path: Path) -> None:
    model = load_few_step(folder, SETTINGS)
    model.keep_text_encoder = False
    model.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small" / "tokenizer").exists()
    with (
        Generator.from_pretrained(tmp_path / "small", backend="torch", num_threads=1) as gen,
        pytest.raises(ConfigError, match=r"came without its text encoder\. Give prompt_embeds"),
    ):
        gen(prompt="a cat", output_type="frames")


def test_a_lost_component_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "pipeline"))
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(BundleError, match="component 'tokenizer' is missing"):
        read_few_step_folder(copy, SETTINGS)


@pytest.mark.slow
def test_the_commands_make_a_clip_of_a_prompt(
    folder: Path, flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    def run(*arguments: object) -> str:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return str(done.output)

    out = tmp_path / "bundle"
    arguments = ["import", folder, "-o", out, "--distilled", "--size", "32x48", "--frames", 5, "--tokens", TOKENS]
    arguments += ["--steps", 1, "--max-batch", 2]
    run(*arguments)
    assert "unchanged" in run(*arguments)
    run("generate", out, "-o", tmp_path / "cat.gif", "--num-images", 1, "--seed", 1, "--prompt", "a cat", "--backend",
        "onnxruntime")  # fmt: skip
    assert (tmp_path / "cat.gif").read_bytes()[:3] == b"GIF"
    run("generate", out, "-o", tmp_path / "two", "--num-images", 2, "--seed", 1, "--prompt", "a cat")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["1.webp", "2.webp"]
    refused = CliRunner().invoke(main, ["generate", str(out), "-o", str(tmp_path / "cat.png"), "--prompt", "a cat"])
    assert refused.exit_code == 2 and "this model makes clips, expected .gif" in refused.output
