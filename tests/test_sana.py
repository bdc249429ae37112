"""SANA-Sprint folders: our pictures are diffusers' own, in PyTorch and in ONNX; wrong folders are refused in a line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from scm_sdk.bundle import Bundle  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError  # noqa: E402
from scm_sdk.export.cli import main  # noqa: E402
from scm_sdk.export.import_sana import import_sana, parse_size  # noqa: E402
from scm_sdk.export.precision import default_plan  # noqa: E402
from scm_sdk.export.variants import add_precision  # noqa: E402
from scm_sdk.export.write import read_model  # noqa: E402
from scm_sdk.generator import Generator  # noqa: E402
from scm_sdk.model.conversions import SANA  # noqa: E402
from scm_sdk.model.foreign.sana import SanaNetwork, load_sana  # noqa: E402
from scm_sdk.model.foreign.sana_config import Settings  # noqa: E402
from scm_sdk.model.foreign.sana_folder import read_sana_folder  # noqa: E402

SIZE, TOKENS = 32, 16
PROMPTS = ["a cat", "a dog on the moon"]
TRANSFORMER = {
    "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8,
    "caption_channels": 8, "sample_size": 32, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "in_channels": 3, "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.41407,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"], "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
    "encoder_qkv_multiscales": [[], [5]], "decoder_qkv_multiscales": [[], [5]],
    "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1], "downsample_block_type": "conv",
    "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
}  # fmt: skip
LAYOUTS = {
    "0.6B": ((36, 32, 16, 72, 1152, 28), 593.50, 664),
    "1.6B": ((70, 32, 20, 112, 2240, 20), 1610.24, 480),
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A whole pipeline with random weights, all of it tiny, offline."""
    torch.manual_seed(0)
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrst"])}
    encoder = transformers.Gemma2Config(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    made = diffusers.SanaSprintPipeline(
        transformer=diffusers.SanaTransformer2DModel(**TRANSFORMER).eval(),
        vae=diffusers.AutoencoderDC(**AUTOENCODER).eval(),
        scheduler=diffusers.SCMScheduler(),
        text_encoder=transformers.Gemma2Model(encoder).eval(),
        tokenizer=transformers.GemmaTokenizer(vocab=vocabulary, merges=[]),
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def saved(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where diffusers saved it; read only."""
    path = tmp_path_factory.mktemp("sana") / "pipeline"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(saved: Path) -> Path:
    """The bundle that the command makes of it; read only."""
    out = saved.parent / "bundle"
    arguments = ["import", saved, "-o", out, "--size", SIZE, "--tokens", TOKENS, "--max-batch", 3]
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def inputs(pipeline: Any) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Embeddings and mask of two prompts by diffusers, and noise for four steps."""
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=TOKENS, complex_human_instruction=None)
    noise = np.random.default_rng(0).standard_normal((4, 2, 4, SIZE // 2, SIZE // 2)).astype(np.float32)
    return embeds.numpy(), mask.numpy(), list(noise)


def drawn_by_diffusers(pipeline: Any, inputs: Any, steps: int, guidance: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What SanaSprintPipeline makes of the noise: it draws a fresh one after each step, the last is multiplied by 0."""
    embeds, mask, noise = inputs
    waiting = iter([*noise[1:steps], np.zeros_like(noise[0])])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_scm.randn_tensor", lambda *_, **__: torch.from_numpy(next(waiting))
    )
    with torch.no_grad():
        images = pipeline(
            prompt_embeds=torch.from_numpy(embeds), prompt_attention_mask=torch.from_numpy(mask), height=SIZE,
            width=SIZE, num_inference_steps=steps, intermediate_timesteps=1.3 if steps == 2 else None,
            latents=torch.from_numpy(noise[0]), guidance_scale=guidance, use_resolution_binning=False, output_type="np",
        ).images  # fmt: skip
    return images


@pytest.mark.parametrize(("backend", "allowed"), [("torch", 1e-5), ("onnxruntime", 1e-4)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_pictures_are_those_of_diffusers(
    pipeline: Any, bundle: Path, inputs: Any, backend: str, allowed: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds, mask, noise = inputs
    wanted = drawn_by_diffusers(pipeline, inputs, steps, 4.0, monkeypatch)
    with Generator.from_pretrained(bundle, backend=backend, num_threads=1) as gen:
        found = gen(
            2, num_inference_steps=steps, noise=noise[:steps], prompt_embeds=embeds, prompt_attention_mask=mask,
            guidance_scale=4.0, output_type="np",
        ).images  # fmt: skip
        other = gen(
            2, num_inference_steps=steps, noise=noise[:steps], prompt_embeds=embeds, prompt_attention_mask=mask,
            guidance_scale=20.0, output_type="np",
        ).images  # fmt: skip
    assert np.abs(found - wanted).max() <= allowed
    assert np.abs(other - wanted).max() > 10 * allowed, "guidance must matter, or this compares nothing"


def test_a_folder_opens_as_it_is_and_takes_prompts(pipeline: Any, saved: Path) -> None:
    with Generator.from_pretrained(saved, backend="torch", num_threads=1) as gen:
        assert gen.source.steps == (1, 2, 4) and gen.opened().spec.image_shape == (3, 64, 64)
        out = gen(2, prompt=PROMPTS, seed=7)
        one = gen(prompt=PROMPTS[1], seed=8, output_type="uint8")
    assert out.images[0].size == (64, 64) and out.seeds == (7, 8)
    instruction = gen._prompts._encoder._instruction
    assert len(instruction) > 5, "the pipeline's own call puts its instruction before a prompt"
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(PROMPTS[1], complex_human_instruction=instruction)
    again = gen.reopen()(prompt_embeds=embeds.numpy(), prompt_attention_mask=mask.numpy(), seed=8, output_type="uint8")
    np.testing.assert_array_equal(one.images, again.images)
    assert np.abs(np.asarray(out.images[1], int) - one.images[0]).max() <= 1


def test_onnx_runtime_makes_pictures_of_a_prompt(bundle: Path) -> None:
    with Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as gen:
        two = gen(2, prompt="a cat", seed=1, output_type="np").images
        mixed = gen(2, prompt=["a dog", "a cat"], seed=1, output_type="np").images
        (streamed,) = gen.stream([{"prompt": "a cat", "seed": 2, "output_type": "np"}])
    assert np.abs(two[1] - mixed[1]).max() < 1e-5 and np.abs(two[0] - mixed[0]).max() > 1e-4
    assert np.abs(streamed.images[0] - two[1]).max() < 1e-5


def test_the_network_is_the_exact_conversion_of_the_flow(saved: Path) -> None:
    """F computed by ``conversions.SANA``, which is proved on its own, around the bare transformer."""
    model = load_sana(saved, Settings(height=SIZE, width=SIZE, max_sequence_length=TOKENS))
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


def test_half_precision_keeps_its_sums_and_its_guards(bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (variant,) = add_precision(path, default_plan("fp16"), steps=[1], num_samples=2)
    assert variant.psnr_db is not None and variant.psnr_db > 55
    types = {n.name: n.outputs[0].dtype.name for n in read_model(path / variant.path).graph if n.outputs[0].dtype}
    block = "step0/transformer.transformer_blocks.0"
    full = [f"{block}.attn1/MatMul", f"{block}.attn1/Div", f"{block}.attn1.norm_q/ReduceMean"]
    full += [name for name in types if name.startswith("step0/flow_output/")]
    full += [name for name in types if name.startswith("decoder/") and name.endswith("attn/Div")]
    half = [f"{block}.attn1.to_q/MatMul", f"{block}.attn2/MatMul", f"{block}.ff.conv_inverted/Conv"]
    half += ["decoder/module.conv_out/Conv"]
    assert {types[name] for name in full} == {"FLOAT"} and len(full) >= 3 + 4 + 1
    assert {types[name] for name in half} == {"FLOAT16"}


def test_a_bundle_without_the_text_encoder_takes_embeddings_only(saved: Path, bundle: Path, tmp_path: Path) -> None:
    model = load_sana(saved)
    model.keep_text_encoder = False
    model.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small" / "tokenizer").exists()
    with Generator.from_pretrained(tmp_path / "small", backend="torch", num_threads=1) as gen:
        with pytest.raises(ConfigError, match=r"came without its text encoder\. Give prompt_embeds"):
            gen(prompt="a cat")
        assert gen(prompt_embeds=np.zeros((1, 300, 8), np.float32), output_type="raw").images.shape == (1, 3, 64, 64)
    assert any(e.path == "denoiser/text_encoder/model.safetensors" for e in Bundle.open(bundle).manifest.files)


@pytest.mark.parametrize("layout", ["0.6B", pytest.param("1.6B", marks=pytest.mark.slow)])
def test_the_released_sizes_have_the_inputs_that_the_spec_says(saved: Path, layout: str, tmp_path: Path) -> None:
    (heads, width, cross, cross_width, dim, layers), millions, tensors = LAYOUTS[layout]
    folder = Path(shutil.copytree(saved, tmp_path / "big"))
    change(folder / "transformer" / "config.json", {
        "num_attention_heads": heads, "attention_head_dim": width, "num_cross_attention_heads": cross,
        "cross_attention_head_dim": cross_width, "cross_attention_dim": dim, "num_layers": layers, "in_channels": 32,
        "out_channels": 32, "caption_channels": 2304,
    })  # fmt: skip
    change(folder / "vae" / "config.json", {"latent_channels": 32, "encoder_block_out_channels": [8] * 6})
    found = read_sana_folder(folder)
    spec = found.spec(2)
    assert spec.sample_shape == (32, 32, 32) and spec.image_shape == (3, 1024, 1024) and spec.times == (1.5708, 1.3)
    assert [(t.name, t.shape, t.dtype) for t in spec.conditioning_inputs] == [
        ("guidance_scale", (), "float32"), ("prompt_embeds", (300, 2304), "float32"),
        ("prompt_attention_mask", (300,), "int64"),
    ]  # fmt: skip
    with torch.device("meta"):
        transformer = diffusers.SanaTransformer2DModel.from_config(
            {name: getattr(found.transformer, name) for name in found.transformer.__struct_fields__}
        )
        network = SanaNetwork(transformer).eval()
        given = {t.name: torch.zeros((2, *t.shape), dtype=getattr(torch, t.dtype)) for t in spec.conditioning_inputs}
        F = network(torch.zeros(2, *spec.sample_shape), torch.ones(2), **given)
    assert F.shape == (2, 32, 32, 32)
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6, 2) == millions
    assert len(transformer.state_dict()) == tensors


def change(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_shard(folder: Path) -> None:
    """Cut the transformer in two shards, as large ones come, and lose the second."""
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    half = dict(list(tensors.items())[: len(tensors) // 2])
    save_file(half, file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    names = {name: f"diffusion_pytorch_model-0000{1 if name in half else 2}-of-00002.safetensors" for name in tensors}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": names}))


BROKEN = {
    "other pipeline": (
        lambda f: change(f / "model_index.json", {"_class_name": "StableDiffusionPipeline"}), ConfigError,
        "is a 'StableDiffusionPipeline' of diffusers, expected 'SanaSprintPipeline'",
    ),
    "no pipeline": (
        lambda f: (f / "model_index.json").unlink(), BundleError, "has no model_index.json, expected a SANA-Sprint",
    ),
    "component": (
        lambda f: shutil.rmtree(f / "vae"), BundleError, r"component 'vae' is missing in .*: no vae/config.json",
    ),
    "named by nobody": (
        lambda f: change(f / "model_index.json", {"transformer": [None, None]}), ConfigError,
        "component 'transformer' of .* is missing, expected diffusers' SanaTransformer2DModel",
    ),
    "text encoder of others": (
        lambda f: change(f / "model_index.json", {"text_encoder": ["evil", "Model"]}), ConfigError,
        r"component 'text_encoder' of .* is \['evil', 'Model'\], expected transformers' Gemma2Model",
    ),
    "text encoder gone": (
        lambda f: shutil.rmtree(f / "text_encoder"), BundleError, "component 'text_encoder' is missing",
    ),
    "shard": (drop_shard, BundleError, "1 of 2 shards are missing in .*transformer, first .*00002-of-00002"),
    "weights": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), BundleError,
        "vae holds neither diffusion_pytorch_model.safetensors nor",
    ),
    "unknown key": (
        lambda f: change(f / "transformer" / "config.json", {"rope": True, "moe": 8}), ConfigError,
        "transformer has unknown config keys moe, rope, expected only those this scm-sdk knows",
    ),
    "wrong type": (
        lambda f: change(f / "transformer" / "config.json", {"num_layers": "many"}), ConfigError,
        "transformer breaks its config: Expected `int`, got `str` - at `\\$.num_layers`",
    ),
    "no sprint": (
        lambda f: change(f / "transformer" / "config.json", {"guidance_embeds": False}), ConfigError,
        "it is a SANA diffusion model, not a SANA-Sprint one. Distil it first",
    ),
    "other scheduler": (
        lambda f: change(f / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"}), ConfigError,
        "prediction_type 'epsilon'",
    ),
    "other autoencoder": (
        lambda f: change(f / "vae" / "config.json", {"latent_channels": 8}), ConfigError,
        "has 8 latent channels, expected the transformer's 4",
    ),
    "no JSON": (lambda f: (f / "vae" / "config.json").write_text("["), ConfigError, "config.json is no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_folder_is_refused_before_anything_is_loaded(copy: Path, case: str) -> None:
    damage, error, message = BROKEN[case]
    damage(copy)
    with pytest.raises(error, match=message) as caught:
        read_sana_folder(copy)
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_folder_is_never_read(copy: Path) -> None:
    drop_shard(copy)
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    change(index, {"weight_map": {"w": "../vae/diffusion_pytorch_model.safetensors"}})
    with pytest.raises(ScmError, match=r"\.\./vae"):
        read_sana_folder(copy)


def test_weights_of_another_size_are_refused(copy: Path) -> None:
    change(copy / "transformer" / "config.json", {"num_layers": 2})
    with pytest.raises(IntegrityError, match=r"do not fit its config: \d+ tensors differ, first 'transformer_blocks.1"):
        load_sana(copy)


def test_a_failed_import_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    done = CliRunner().invoke(main, ["import", str(copy), "-o", str(tmp_path / "out")])
    assert done.exit_code == 6 and "is truncated or no safetensors file" in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipeline"]


@pytest.mark.parametrize(
    ("text", "message"), [("12x", "size is '12x'"), ("big", "HEIGHTxWIDTH"), ("1x2x3", "768x1344")]
)
def test_sizes_are_read_or_refused(text: str, message: str) -> None:
    assert parse_size("") is None and parse_size("64") == (64, 64) and parse_size("32x64") == (32, 64)
    with pytest.raises(ConfigError, match=message):
        parse_size(text)


def test_a_size_between_the_cells_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"images are 33x32 pixels, expected multiples of 2.*64x64 is the model's own"
    ):
        import_sana(saved, tmp_path / "out", size=(33, 32))


@pytest.fixture(scope="module")
def gen(bundle: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "makes pictures of a text, expected prompt="),
        ({"prompt": ["a", "b"]}, "prompt holds 2 texts, expected num_images = 1"),
        ({"prompt": 3}, "prompt is 3, expected a text"),
        ({"prompt": "a", "prompt_embeds": np.zeros((1, TOKENS, 8), np.float32)}, "prompt and prompt_embeds are both"),
        ({"prompt_attention_mask": np.ones((1, TOKENS), np.int64)}, "is given without prompt_embeds"),
        ({"prompt_embeds": np.zeros((1, 3, 8), np.float32)}, r"is \(1, 3, 8\) float32, expected \(1, 16, 8\)"),
        ({"prompt": "a", "guidance_scale": 99.0}, "guidance_scale is 99.0, expected numbers in"),
    ],
)
def test_wrong_prompts_are_refused(gen: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ScmError, match=message):
        gen(**arguments)


def test_a_prompt_for_a_model_that_takes_none_is_refused(ort: Generator) -> None:
    with pytest.raises(ConfigError, match=r"prompt is given, but this model takes no prompt\. Leave prompt out"):
        ort(prompt="a cat")


@pytest.mark.slow
def test_the_example_runs_offline(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "06_sana_sprint.py"
    done = subprocess.run([sys.executable, str(example), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "beside the fox: True" in done.stdout and (tmp_path / "fox.png").stat().st_size > 1000
