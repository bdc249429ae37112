"""Prompts of few-step flow pipelines: embeddings as the pipeline's own, by PyTorch and by a graph, and bundles."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from helpers.commands import run  # noqa: E402
from helpers.few_step_fixtures import (  # noqa: E402
    CHAT,
    SIZES,
    TOKENS,
    encode_by_diffusers,
    save_with_text,
)
from scm_sdk import Generator  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError  # noqa: E402
from scm_sdk.export.graph.text_encoder import export_text_encoder  # noqa: E402
from scm_sdk.export.precision.calibration import Calibration  # noqa: E402
from scm_sdk.export.precision.probe import bundle_examples  # noqa: E402
from scm_sdk.inference.prompt_graph import PromptGraph  # noqa: E402
from scm_sdk.model.foreign.few_step import load_few_step  # noqa: E402
from scm_sdk.model.foreign.few_step_folder import FewStepFolder, Settings, read_few_step_folder  # noqa: E402
from scm_sdk.model.foreign.flow_prompts import FlowPromptEncoder, open_encoder  # noqa: E402

PROMPTS = ["a cat", "a  dog on\nthe moon &amp; a cat"]
SETTINGS = Settings(max_sequence_length=TOKENS, distilled=True, **SIZES["WanPipeline"])


def read_with_text(name: str, folder: Path, tokens: int) -> FewStepFolder:
    """Save a pipeline with its text encoder and read its folder."""
    settings = Settings(max_sequence_length=tokens, distilled=True, **SIZES[name])
    return read_few_step_folder(save_with_text(name, folder / "pipeline"), settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of Wan with its text encoder; read only."""
    return save_with_text("WanPipeline", tmp_path_factory.mktemp("wan-text") / "pipeline")


@pytest.fixture(scope="module")
def imported(folder: Path) -> Path:
    """What an import keeps of it, without graphs; read only."""
    load_few_step(folder, SETTINGS).save_pretrained(folder.parent / "imported")
    return folder.parent / "imported"


@pytest.mark.parametrize("name", SIZES)
def test_embeddings_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    tokens, prompts = 40, [*PROMPTS, "", "caf\u00e9 \u201cschÃ¶n\u201d " + "long " * 80]
    wanted, kept = encode_by_diffusers(name, prompts, tokens)
    found = read_with_text(name, tmp_path, tokens)
    embeds, mask = FlowPromptEncoder(found).encode(prompts, tokens)
    np.testing.assert_allclose(embeds, wanted, atol=1e-6)
    np.testing.assert_array_equal(mask, kept)
    assert np.abs(embeds[0] - embeds[1]).max() > 1e-2
    assert mask.all() == (name != "ZImagePipeline")


@pytest.mark.parametrize("name", [
    pytest.param("Flux2KleinPipeline", marks=pytest.mark.slow), "ZImagePipeline", "WanPipeline",
    pytest.param("AnyFlowPipeline", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_graphs_embeddings_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tokenizers")
    tokens, prompts = 40, [*PROMPTS, "", "caf\u00e9 \u201cschÃ¶n\u201d " + "long " * 80]
    wanted, kept = encode_by_diffusers(name, prompts, tokens)
    found = read_with_text(name, tmp_path, tokens)
    export_text_encoder(FlowPromptEncoder(found), tmp_path, max_sequence_length=tokens)
    embeds, mask = PromptGraph(tmp_path / "text_encoder" / "model.onnx").encode(prompts, tokens)
    np.testing.assert_allclose(embeds, wanted, atol=1e-5)
    np.testing.assert_array_equal(mask, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "has no chat template, expected one: ZImagePipeline encodes a prompt inside it"),
        ({"chat_template": CHAT.replace("message.content", "message.content | upper")}, "changes a prompt, expected"),
    ],
)
def test_a_tokenizer_that_a_graph_cannot_follow_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    found = read_with_text("ZImagePipeline", tmp_path, TOKENS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.path / "tokenizer")
    for key, value in change.items():
        setattr(tokenizer, key, value)
    shutil.rmtree(found.path / "tokenizer")
    tokenizer.save_pretrained(found.path / "tokenizer")
    with pytest.raises(ConfigError, match=message):
        export_text_encoder(FlowPromptEncoder(found), tmp_path / "bundle", max_sequence_length=TOKENS)
    assert not (tmp_path / "bundle").exists()


def test_a_tokenizer_that_pads_on_the_left_is_refused(tmp_path: Path) -> None:
    encoder = FlowPromptEncoder(read_with_text("ZImagePipeline", tmp_path, TOKENS))
    encoder.tokenizer.padding_side = "left"
    with pytest.raises(ConfigError, match=r"pads on the left, expected the right\. Leave out --onnx-text-encoder"):
        export_text_encoder(encoder, tmp_path / "bundle", max_sequence_length=TOKENS)


def test_an_encoder_of_few_layers_is_refused(tmp_path: Path) -> None:
    encoder = FlowPromptEncoder(read_with_text("Flux2KleinPipeline", tmp_path, TOKENS))
    encoder.text_encoder.model.layers = encoder.text_encoder.model.layers[:20]
    with pytest.raises(ConfigError, match="the text encoder has 20 layers, expected 27"):
        export_text_encoder(encoder, tmp_path / "bundle", max_sequence_length=TOKENS)


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
    out = tmp_path / "bundle"
    arguments = ["import", folder, "-o", out, "--distilled", "--size", "32x48", "--frames", 5, "--tokens", TOKENS]
    arguments += ["--steps", 1, "--max-batch", 2]
    run(*arguments)
    assert "unchanged" in run(*arguments).output
    run("generate", out, "-o", tmp_path / "cat.gif", "--num-images", 1, "--seed", 1, "--prompt", "a cat", "--backend",
        "onnxruntime")  # fmt: skip
    assert (tmp_path / "cat.gif").read_bytes()[:3] == b"GIF"
    run("generate", out, "-o", tmp_path / "two", "--num-images", 2, "--seed", 1, "--prompt", "a cat")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["1.webp", "2.webp"]
    refused = run("generate", out, "-o", tmp_path / "cat.png", "--prompt", "a cat", code=2)
    assert "this model makes clips, expected .gif" in refused.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZImagePipeline", "WanPipeline"])
def test_a_prompt_needs_neither_torch_nor_transformers(name: str, tmp_path: Path) -> None:
    source, out = save_with_text(name, tmp_path / "pipeline"), tmp_path / "bundle"
    size = SIZES[name]
    arguments: list[object] = ["import", source, "-o", out, "--size", f"{size['height']}x{size['width']}", "--steps", 1]
    arguments += ["--tokens", 40, "--max-batch", 2, "--no-text-encoder", "--onnx-text-encoder"]
    arguments += ["--distilled", *(("--frames", size["num_frames"]) if name == "WanPipeline" else ())]
    for word in ("build", "unchanged"):
        assert word in run(*arguments).output
    code = f"""
import sys
for name in ("torch", "transformers", "diffusers", "jinja2"):
    sys.modules[name] = None
import numpy as np
from scm_sdk import Generator
with Generator.from_pretrained({str(out)!r}, backend="onnxruntime", num_threads=1) as gen:
    np.save(sys.argv[1], gen(2, prompt={PROMPTS!r}, seed=1, output_type="raw").images)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "made.npy")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    embeds, mask = encode_by_diffusers(name, PROMPTS, 40)
    masks = {"prompt_attention_mask": mask} if name == "ZImagePipeline" else {}
    with Generator.from_pretrained(out, backend="torch", num_threads=1) as gen:
        wanted = gen(2, prompt_embeds=embeds, **masks, seed=1, output_type="raw").images
    np.testing.assert_allclose(np.load(tmp_path / "made.npy"), wanted, rtol=0, atol=1e-4)
    (tmp_path / "prompts.txt").write_text("\n".join(["a cat", "a dog"]), encoding="utf-8")
    encoded = bundle_examples(out, tmp_path / "prompts.txt").rows([0])["prompt_embeds"]
    np.testing.assert_allclose(encoded[0], embeds[0], rtol=0, atol=1e-4)
    run("quantize", out, "--to", "int8", "--to", "int4", "--num-samples", 2, "--prompts", tmp_path / "prompts.txt")
    record = Calibration.from_json((out / "calibration" / "int8-1step.json").read_bytes())
    assert record.conditioning.startswith("2 prompts of prompts.txt, sha256 ")
    for precision in ("int8", "int4"):
        with Generator.from_pretrained(out, backend="onnxruntime", precision=precision, num_threads=1) as gen:
            low = gen(2, prompt=PROMPTS, seed=1, output_type="raw").images
        assert 0 < np.sqrt(np.square(low - wanted).mean()) < 0.25 * wanted.std()


def test_a_pipeline_without_the_encoder_is_refused_before_its_export(
    flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["import", flow_folders("Flux2KleinPipeline"), "-o", tmp_path / "out", "--onnx-text-encoder"]
    done = run(*arguments, code=2)
    assert "has no text encoder that is known here, expected one for" in done.output
    assert not list(tmp_path.iterdir())
