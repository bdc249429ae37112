"""SANA-Sprint with another autoencoder, and with LoRA files merged at import."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from helpers.sana_fixtures import AUTOENCODER, SIZE, TOKENS  # noqa: E402
from scm_sdk.bundle.bundle import Bundle  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError  # noqa: E402
from scm_sdk.export.cli import main  # noqa: E402
from scm_sdk.export.sana import import_sana  # noqa: E402
from scm_sdk.inference.generator import Generator  # noqa: E402
from scm_sdk.model.foreign.sana_parts import with_parts  # noqa: E402

LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.conv_inverted", "proj_out")


@pytest.fixture
def weights(sana_folder: Path) -> dict[str, Any]:
    """Return the tensors of the transformer."""
    return load_file(sana_folder / "transformer" / "diffusion_pytorch_model.safetensors")


def make_lora(weights: dict[str, Any], *, rank: int = 2, prefix: str = "transformer.") -> dict[str, Any]:
    """Return the tensors of a LoRA of three layers, one of them a pointwise convolution."""
    draw, made = torch.Generator().manual_seed(3), {}
    for layer in LAYERS:
        weight = weights[f"{layer}.weight"]
        extra = weight.shape[2:]
        made[f"{prefix}{layer}.lora_A.weight"] = torch.randn((rank, weight.shape[1], *extra), generator=draw)
        made[f"{prefix}{layer}.lora_B.weight"] = torch.randn((weight.shape[0], rank, *extra), generator=draw)
    return made


def merged(source: Path, loras: list[Path], scale: float = 1.0) -> dict[str, Any]:
    with with_parts(source, loras=loras, lora_scale=scale) as folder:
        return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("alpha", "factor"), [("none", 1.0), ("tensor", 4.0), ("metadata", 2.0)], ids=["none", "tensor", "metadata"]
)
def test_weights_are_the_sum(
    sana_folder: Path, weights: dict[str, Any], tmp_path: Path, alpha: str, factor: float
) -> None:
    lora = make_lora(weights)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer.r": 2})}
    more = {f"transformer.{layer}.alpha": torch.tensor(8.0) for layer in LAYERS} if alpha == "tensor" else {}
    save_file(lora | more, tmp_path / "a.safetensors", metadata=metadata if alpha == "metadata" else None)
    found = merged(sana_folder, [tmp_path / "a.safetensors"], scale=0.5)
    assert set(found) == set(weights)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        wanted = weight.numpy().astype(np.float64)
        if layer in LAYERS:
            A, B = (lora[f"transformer.{layer}.lora_{part}.weight"].numpy().astype(np.float64) for part in "AB")
            change = B.reshape(len(B), -1) @ A.reshape(len(A), -1)
            wanted = wanted + 0.5 * factor * change.reshape(wanted.shape)
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_files_add_up(sana_folder: Path, weights: dict[str, Any], tmp_path: Path) -> None:
    save_file(make_lora(weights, prefix="base_model.model."), tmp_path / "a.safetensors")
    save_file(make_lora(weights), tmp_path / "b.safetensors")
    once = merged(sana_folder, [tmp_path / "a.safetensors"], scale=2.0)
    twice = merged(sana_folder, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    for name in weights:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-5, atol=1e-5)


def test_peft_merges_the_same(
    sana_folder: Path, weights: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    lora = make_lora(weights)
    save_file(lora, tmp_path / "a.safetensors")
    pipe = diffusers.SanaSprintPipeline.from_pretrained(sana_folder, text_encoder=None, tokenizer=None)
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    theirs = pipe.transformer.state_dict()
    for name, tensor in merged(sana_folder, [tmp_path / "a.safetensors"], scale=0.7).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)


def _without(tensors: dict[str, Any], end: str) -> dict[str, Any]:
    name = next(name for name in tensors if name.endswith(end))
    return {key: value for key, value in tensors.items() if key != name}


def _resized(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {f"transformer.{LAYERS[0]}.lora_A.weight": torch.zeros(2, 3)}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "another layer": (
        lambda t: t | {f"transformer.x.lora_{part}.weight": torch.zeros(8, 8) for part in "AB"},
        ConfigError, r"changes 'transformer\.x'.*no weight",
    ),
    "another prefix": (lambda t: {f"unet.{k}": v for k, v in t.items()}, ConfigError, r"changes 'unet\.transformer"),
    "half": (lambda t: _without(t, "lora_B.weight"), ConfigError, "no lora_B"),
    "dora": (
        lambda t: t | {f"transformer.{LAYERS[0]}.lora_magnitude_vector": torch.ones(8)}, ConfigError,
        "1 tensors that no sum.*lora_magnitude_vector",
    ),
    "text encoder": (lambda t: t | {"text_encoder.x.weight": torch.ones(8)}, ConfigError, r"first 'text_encoder\.x"),
    "another size": (_resized, ConfigError, r"matrices \(8, 2\) and \(2, 3\).*another model"),
    "no lora": (lambda t: {"w": torch.ones(2)}, ConfigError, "holds no NAME.lora_A.weight but w"),
    "ranks": (
        lambda t: t | {
            f"transformer.{LAYERS[0]}.lora_A.weight": torch.zeros(1, 8),
            f"transformer.{LAYERS[0]}.lora_B.weight": torch.zeros(8, 1),
        },
        ConfigError, r"ranks \[1, 2\] and no alpha",
    ),
    "no rows": (
        lambda t: t | {f"transformer.{LAYERS[0]}.lora_A.weight": torch.zeros(0)}, ConfigError, r"ranks \[0, 2\]",
    ),
    "not finite": (
        lambda t: t | {f"transformer.{LAYERS[0]}.lora_A.weight": torch.full((2, 8), float("nan"))}, IntegrityError,
        "NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_file_is_refused(sana_folder: Path, weights: dict[str, Any], tmp_path: Path, case: str) -> None:
    damage, error, message = BROKEN[case]
    save_file(damage(make_lora(weights)), tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        merged(sana_folder, [tmp_path / "a.safetensors"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [('{"use_dora": true}', "use_dora = True"), ('{"lora_alpha": "x"}', "lora_alpha 'x'"), ("{", "is no JSON")],
)
def test_settings_that_change_the_sum_are_refused(
    sana_folder: Path, weights: dict[str, Any], tmp_path: Path, settings: str, message: str
) -> None:
    save_file(make_lora(weights), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(ConfigError, match=message):
        merged(sana_folder, [tmp_path / "a.safetensors"])


def test_missing_and_foreign_parts_are_refused(sana_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for loras, vae, message in (
        ([tmp_path / "none.safetensors"], None, "no none.safetensors"),
        ([tmp_path / "torn.safetensors"], None, "torn.safetensors is truncated"),
        ([], tmp_path, "holds no config of a model, expected an AutoencoderDC"),
        ([], sana_folder / "transformer", "holds SanaTransformer2DModel, expected an AutoencoderDC"),
    ):
        with pytest.raises(ScmError, match=message), with_parts(sana_folder, vae=vae, loras=loras):
            pass
    with pytest.raises(ConfigError, match="lora_scale is nan"), with_parts(sana_folder, lora_scale=float("nan")):
        pass


def test_the_command_exchanges_parts(
    sana_folder: Path, sana_inputs: Any, weights: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are those of diffusers' pipeline with a narrower decoder and the merged weights."""
    torch.manual_seed(1)
    lite = diffusers.AutoencoderDC(**(AUTOENCODER | {"decoder_block_out_channels": [4, 8]})).eval()
    lite.save_pretrained(tmp_path / "lite")
    save_file(make_lora(weights), tmp_path / "style.safetensors")
    parts = {"vae": tmp_path / "lite", "loras": [tmp_path / "style.safetensors"], "lora_scale": 0.1}
    options = ["--vae", parts["vae"], "--lora", tmp_path / "style.safetensors", "--lora-scale", 0.1, "--steps", 1]
    options += ["--size", SIZE, "--tokens", TOKENS, "--max-batch", 2, "--no-text-encoder"]
    arguments = ["import", sana_folder, "-o", tmp_path / "out", *options]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    told = Bundle.open(tmp_path / "out").manifest.provenance
    assert (
        told["vae"] == "lite" and told["lora"].startswith("style.safetensors (sha256 ") and told["lora_scale"] == "0.1"
    )
    embeds, mask, noise = sana_inputs
    pipe = diffusers.SanaSprintPipeline.from_pretrained(sana_folder, vae=lite, text_encoder=None, tokenizer=None)
    pipe.transformer.load_state_dict(merged(sana_folder, parts["loras"], 0.1))
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        wanted = pipe(
            prompt_embeds=torch.from_numpy(embeds), prompt_attention_mask=torch.from_numpy(mask), height=SIZE,
            width=SIZE, num_inference_steps=1, intermediate_timesteps=None, latents=torch.from_numpy(noise[0]),
            guidance_scale=4.0, use_resolution_binning=False, output_type="np",
        ).images  # fmt: skip
    for backend, allowed in (("torch", 1e-5), ("onnxruntime", 1e-4)):
        with Generator.from_pretrained(tmp_path / "out", backend=backend, num_threads=1) as gen:
            found = gen(
                2, noise=noise[:1], prompt_embeds=embeds, prompt_attention_mask=mask, guidance_scale=4.0,
                output_type="np",
            ).images  # fmt: skip
        assert np.abs(found - wanted).max() <= allowed
    same: dict[str, Any] = {
        "steps": [1], "size": (SIZE, SIZE), "max_sequence_length": TOKENS, "max_batch": 2, "text_encoder": False,
    }  # fmt: skip
    assert import_sana(sana_folder, tmp_path / "out", reuse=True, **same, **parts).unchanged
    for other in (parts | {"lora_scale": 0.2}, {}):
        with pytest.raises(BundleError, match="exists and is not empty"):
            import_sana(sana_folder, tmp_path / "out", reuse=True, **same, **other)
