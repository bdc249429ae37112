"""SANA-Sprint: for the same noise our pictures are diffusers' own, in PyTorch and in ONNX; prompts."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from helpers.sana_fixtures import PROMPTS, SIZE, TOKENS, pictures_of_sana  # noqa: E402
from scm_sdk.bundle.bundle import Bundle  # noqa: E402
from scm_sdk.errors import ConfigError, ScmError  # noqa: E402
from scm_sdk.inference.generator import Generator  # noqa: E402
from scm_sdk.model.conversions import SANA  # noqa: E402
from scm_sdk.model.foreign.prompt_encoder import PromptEncoder  # noqa: E402
from scm_sdk.model.foreign.sana import SanaNetwork, load_sana  # noqa: E402
from scm_sdk.model.foreign.sana_folder import Settings  # noqa: E402


@pytest.mark.parametrize(("backend", "allowed"), [("torch", 1e-5), ("onnxruntime", 1e-4)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_pictures_are_those_of_diffusers(
    sana_pipeline: Any,
    sana_bundle: Path,
    sana_inputs: Any,
    backend: str,
    allowed: float,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    embeds, mask, noise = sana_inputs
    wanted = pictures_of_sana(steps, 4.0)
    with Generator.from_pretrained(sana_bundle, backend=backend, num_threads=1) as gen:
        found = gen(
            2, num_inference_steps=steps, noise=noise[:steps], prompt_embeds=embeds, prompt_attention_mask=mask,
            guidance_scale=4.0, output_type="np",
        ).images  # fmt: skip
        other = gen(
            2, num_inference_steps=steps, noise=noise[:steps], prompt_embeds=embeds, prompt_attention_mask=mask,
            guidance_scale=20.0, output_type="np",
        ).images  # fmt: skip
    record_property("difference", float(np.abs(found - wanted).max()))
    record_property("allowed", allowed)
    assert np.abs(found - wanted).max() <= allowed
    assert np.abs(other - wanted).max() > 10 * allowed, "guidance must matter, or this compares nothing"


def test_a_folder_opens_as_it_is_and_takes_prompts(sana_pipeline: Any, sana_folder: Path) -> None:
    with Generator.from_pretrained(sana_folder, backend="torch", num_threads=1) as gen:
        assert gen.source.steps == (1, 2, 3, 4) and gen.opened().spec.image_shape == (3, 64, 64)
        out = gen(2, prompt=PROMPTS, seed=7)
        one = gen(prompt=PROMPTS[1], seed=8, output_type="uint8")
        with gen._prompts._encoder.use() as encoder:
            assert isinstance(encoder, PromptEncoder)
            instruction = encoder.instruction
    assert out.images[0].size == (64, 64) and out.seeds == (7, 8)
    assert len(instruction) > 5, "the pipeline's own call puts its instruction before a prompt"
    with torch.no_grad():
        embeds, mask = sana_pipeline.encode_prompt(PROMPTS[1], complex_human_instruction=instruction)
    again = gen.reopen()(prompt_embeds=embeds.numpy(), prompt_attention_mask=mask.numpy(), seed=8, output_type="uint8")
    np.testing.assert_array_equal(one.images, again.images)
    assert np.abs(np.asarray(out.images[1], int) - one.images[0]).max() <= 1


def test_onnx_runtime_makes_pictures_of_a_prompt(sana_bundle: Path) -> None:
    with Generator.from_pretrained(sana_bundle, backend="onnxruntime", num_threads=1) as gen:
        two = gen(2, prompt="a cat", seed=1, output_type="np").images
        mixed = gen(2, prompt=["a dog", "a cat"], seed=1, output_type="np").images
        (streamed,) = gen.stream([{"prompt": "a cat", "seed": 2, "output_type": "np"}])
    assert np.abs(two[1] - mixed[1]).max() < 1e-5 and np.abs(two[0] - mixed[0]).max() > 1e-4
    assert np.abs(streamed.images[0] - two[1]).max() < 1e-5


def test_the_command_takes_prompts(sana_bundle: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from scm_sdk.export.cli import main

    arguments = ["generate", str(sana_bundle), "--num-images", "2", "--seed", "1", "--backend", "onnxruntime"]
    done = CliRunner().invoke(main, [*arguments, "--prompt", "a cat", "--prompt", "a dog", "-o", str(tmp_path / "two")])
    assert done.exit_code == 0 and len(list((tmp_path / "two").iterdir())) == 2, done.output
    bare = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "none.png")])
    assert bare.exit_code == 2 and "makes pictures of a text, expected prompt=" in bare.output


def test_the_network_is_the_exact_conversion_of_the_flow(sana_folder: Path) -> None:
    """F computed by ``conversions.SANA``, which is proved on its own, around the bare transformer."""
    model = load_sana(sana_folder, Settings(height=SIZE, width=SIZE, max_sequence_length=TOKENS))
    assert isinstance(model.network, SanaNetwork)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.config.sample_shape, generator=draw)
    embeds, mask = torch.randn(2, TOKENS, 8, generator=draw), torch.ones(2, TOKENS, dtype=torch.int64)
    t, scale = torch.tensor([1.5, 0.4]), torch.tensor([4.0, 5.0])
    with torch.no_grad():
        found = model.network(x, t, guidance_scale=scale, prompt_embeds=embeds, prompt_attention_mask=mask)
        (v,) = model.network.transformer(
            SANA.model_input(x * 0.5, t, 0.5), encoder_hidden_states=embeds, encoder_attention_mask=mask,
            timestep=SANA.time(t, 0.5), guidance=scale * 0.1, return_dict=False,
        )  # fmt: skip
    torch.testing.assert_close(found, SANA.to_trigflow(x * 0.5, v, t, 0.5), atol=2e-6, rtol=1e-5)


def test_a_bundle_without_the_text_encoder_takes_embeddings_only(
    sana_folder: Path, sana_bundle: Path, tmp_path: Path
) -> None:
    model = load_sana(sana_folder)
    model.keep_text_encoder = False
    model.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small" / "tokenizer").exists()
    with Generator.from_pretrained(tmp_path / "small", backend="torch", num_threads=1) as gen:
        with pytest.raises(ConfigError, match=r"came without its text encoder\. Give prompt_embeds"):
            gen(prompt="a cat")
        assert gen(prompt_embeds=np.zeros((1, 300, 8), np.float32), output_type="raw").images.shape == (1, 3, 64, 64)
    assert any(e.path == "denoiser/text_encoder/model.safetensors" for e in Bundle.open(sana_bundle).manifest.files)


@pytest.fixture(scope="module")
def gen(sana_bundle: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(sana_bundle, backend="onnxruntime", num_threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "makes pictures of a text, expected prompt="),
        ({"prompt": ["a", "b"]}, "prompt holds 2 texts, expected num_images = 1"),
        ({"prompt": 3}, "prompt is 3, expected a text"),
        ({"prompt": "a", "prompt_embeds": np.zeros((1, TOKENS, 8), np.float32)}, "prompt and prompt_embeds are both"),
        ({"prompt_attention_mask": np.ones((1, TOKENS), np.int64)}, "is given without prompt_embeds"),
        (
            {
                "prompt_embeds": np.zeros((1, TOKENS, 8), np.float32),
                "prompt_attention_mask": np.full((1, TOKENS), 2, np.int64),
            },
            "expected 1 for tokens and 0 for padding",
        ),
        ({"prompt_embeds": np.zeros((1, 3, 8), np.float32)}, r"is \(1, 3, 8\) float32, expected \(1, 16, 8\)"),
        ({"prompt": "a", "guidance_scale": 99.0}, "guidance_scale is 99.0, expected numbers in"),
    ],
)
def test_wrong_prompts_are_refused(gen: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ScmError, match=message):
        gen(**arguments)


def test_a_prompt_for_a_model_that_takes_none_is_refused(ort: Generator) -> None:
    with pytest.raises(ConfigError, match=r"prompt is given, but this model takes no prompt"):
        ort(prompt="a cat")


@pytest.mark.slow
def test_the_example_runs_offline(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "06_sana_sprint.py"
    done = subprocess.run(
        [sys.executable, str(example), str(tmp_path)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "with the fox: True" in done.stdout and (tmp_path / "fox.png").stat().st_size > 1000
