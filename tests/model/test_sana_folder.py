"""Folders of a SANA-Sprint pipeline: the released sizes say what they should, wrong ones are refused in a line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError  # noqa: E402
from scm_sdk.export.cli import main  # noqa: E402
from scm_sdk.export.sana import import_sana, parse_size  # noqa: E402
from scm_sdk.model.foreign.sana import SanaNetwork, load_sana  # noqa: E402
from scm_sdk.model.foreign.sana_folder import read_sana_folder  # noqa: E402

LAYOUTS = {
    "0.6B": ((36, 32, 16, 72, 1152, 28), 593.50, 664),
    "1.6B": ((70, 32, 20, 112, 2240, 20), 1610.24, 480),
}


@pytest.mark.parametrize("layout", ["0.6B", pytest.param("1.6B", marks=pytest.mark.slow)])
def test_the_released_sizes_have_the_inputs_that_the_spec_says(sana_folder: Path, layout: str, tmp_path: Path) -> None:
    (heads, width, cross, cross_width, dim, layers), millions, tensors = LAYOUTS[layout]
    folder = Path(shutil.copytree(sana_folder, tmp_path / "big"))
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
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def drop_shard(folder: Path) -> None:
    """Cut the transformer in two shards, as large ones come, and lose the second."""
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    half = dict(list(tensors.items())[: len(tensors) // 2])
    save_file(half, file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    names = {name: f"diffusion_pytorch_model-0000{1 if name in half else 2}-of-00002.safetensors" for name in tensors}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")


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
    "not named": (
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
        "transformer breaks its config: .*num_layers",
    ),
    "no sprint": (
        lambda f: change(f / "transformer" / "config.json", {"guidance_embeds": False}), ConfigError,
        "it is a SANA diffusion model, not a SANA-Sprint one. Distill it first",
    ),
    "other scheduler": (
        lambda f: change(f / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"}), ConfigError,
        "prediction_type 'epsilon'",
    ),
    "other autoencoder": (
        lambda f: change(f / "vae" / "config.json", {"latent_channels": 8}), ConfigError,
        "has 8 latent channels, expected the transformer's 4",
    ),
    "no JSON": (lambda f: (f / "vae" / "config.json").write_bytes(b"["), ConfigError, "config.json is no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_folder_is_refused_before_anything_is_loaded(sana_copy: Path, case: str) -> None:
    damage, error, message = BROKEN[case]
    damage(sana_copy)
    with pytest.raises(error, match=message) as caught:
        read_sana_folder(sana_copy)
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_folder_is_never_read(sana_copy: Path) -> None:
    drop_shard(sana_copy)
    index = sana_copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    change(index, {"weight_map": {"w": "../vae/diffusion_pytorch_model.safetensors"}})
    with pytest.raises(ScmError, match=r"\.\./vae"):
        read_sana_folder(sana_copy)


def test_weights_of_another_size_are_refused(sana_copy: Path) -> None:
    change(sana_copy / "transformer" / "config.json", {"num_layers": 2})
    with pytest.raises(IntegrityError, match=r"\d+ tensors differ, first 'transformer_blocks\.1"):
        load_sana(sana_copy)


@pytest.mark.parametrize(
    ("component", "field", "value"),
    [
        ("transformer", "num_layers", 2**40),
        ("transformer", "attention_head_dim", 0),
        ("transformer", "mlp_ratio", 1e300),
        ("vae", "encoder_layers_per_block", [2**40, 1, 1]),
        ("vae", "decoder_block_out_channels", [2**40, 8, 8]),
        ("vae", "in_channels", -1),
    ],
)
def test_sizes_that_no_pipeline_has_are_refused(sana_copy: Path, component: str, field: str, value: object) -> None:
    change(sana_copy / component / "config.json", {field: value})
    with pytest.raises(ConfigError, match=field):
        load_sana(sana_copy)


def test_a_failed_import_leaves_nothing(sana_copy: Path, tmp_path: Path) -> None:
    (sana_copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    done = CliRunner().invoke(main, ["import", str(sana_copy), "-o", str(tmp_path / "out")])
    assert done.exit_code == 6 and "is truncated or no safetensors file" in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipeline"]


@pytest.mark.parametrize(
    ("text", "message"), [("12x", "size is '12x'"), ("big", "HEIGHTxWIDTH"), ("1x2x3", "768x1344")]
)
def test_sizes_are_read_or_refused(text: str, message: str) -> None:
    assert parse_size("64") == (64, 64) and parse_size("32x64") == (32, 64)
    with pytest.raises(ConfigError, match=message):
        parse_size(text)


def test_a_size_between_the_cells_is_refused(sana_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"33x32 pixels, expected multiples of 2.*64x64"):
        import_sana(sana_folder, tmp_path / "out", size=(33, 32))
