"""Students of Wan 2.1: our frames are those of rCM's sampler, written from its formulas in float64."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from helpers.commands import run  # noqa: E402
from helpers.few_step_fixtures import RCM_TIMES, SIZES, TOKENS, draw_prompts, frames_by_rcm  # noqa: E402
from scm_sdk import Generator  # noqa: E402
from scm_sdk.errors import ConfigError, ScmError  # noqa: E402
from scm_sdk.model.foreign.few_step import load_few_step  # noqa: E402
from scm_sdk.model.foreign.few_step_folder import Settings, read_few_step_folder  # noqa: E402
from scm_sdk.model.foreign.few_step_networks import Wan  # noqa: E402
from scm_sdk.model.sampler import Sampler  # noqa: E402


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """(steps, B, C, T, H, W)."""
    return np.random.default_rng(0).standard_normal((4, 2, 16, 2, 4, 6)).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_frames_are_those_of_rcms_sampler(
    flow_folders: Callable[[str], Path], noise: np.ndarray, steps: int, record_property: Callable[[str, object], None]
) -> None:
    settings = Settings(max_sequence_length=TOKENS, distilled=True, **SIZES["WanPipeline"])
    model = load_few_step(flow_folders("WanPipeline"), settings)
    spec = model.spec(steps)
    assert spec.renoise == "fresh" and spec.image_shape == (3, 5, 32, 48)
    np.testing.assert_allclose(spec.times, RCM_TIMES[:steps], rtol=1e-12)
    inputs = (*noise[:steps], draw_prompts(8))
    with torch.no_grad():
        found = Sampler(model, spec).eval()(*map(torch.from_numpy, inputs)).numpy()
    wanted = frames_by_rcm(noise, steps)
    record_property("difference", float(np.abs(found - wanted).max()))
    assert np.abs(found - wanted).max() <= 1e-5 and wanted.std() > 0.05


@pytest.fixture(scope="module")
def bundle(flow_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wan") / "bundle"
    run("import", flow_folders("WanPipeline"), "-o", out, "--distilled", "--size", "32x48", "--frames", 5, "--tokens",
        TOKENS, "--steps", 2, "--max-batch", 2)  # fmt: skip
    return out


@pytest.mark.slow
def test_the_bundles_clips_are_those_of_rcm_down_to_fp16(
    bundle: Path, noise: np.ndarray, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("onnxruntime")
    wanted = np.moveaxis((frames_by_rcm(noise, 2) / 2 + 0.5).clip(0, 1), 1, -1)
    whole = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    run("precision", whole, "--num-samples", 1)
    for backend, precision, allowed in (
        ("torch", "fp32", 1e-5), ("onnxruntime", "fp32", 1e-4), ("onnxruntime", "fp16", 2e-2),
    ):  # fmt: skip
        with Generator.from_pretrained(whole, backend=backend, precision=precision, num_threads=1) as gen:
            clips = gen(2, noise=noise[:2], prompt_embeds=draw_prompts(8), output_type="np").images
            frames = gen(2, noise=noise[:2], prompt_embeds=draw_prompts(8), output_type="frames")
        assert clips.shape == (2, 5, 32, 48, 3)
        gap = float(np.abs(clips - wanted).max())
        record_property(f"difference_{backend}_{precision}", gap)
        assert gap <= allowed
    assert [len(clip) for clip in frames.images] == [5, 5] and frames.images[0][0].size == (48, 32)
    assert all(file.stat().st_size > 100 for file in frames.save(tmp_path / "clip.webp"))
    validated = run("validate", whole, "--num-seeds", 2, "--batch", 2)
    assert "fp16" in validated.output


@pytest.mark.slow
def test_a_clip_is_no_picture(bundle: Path, tmp_path: Path) -> None:
    with Generator.from_pretrained(bundle, backend="torch", num_threads=1) as gen:
        with pytest.raises(ScmError, match=r"samples of shape \(3, 5, 32, 48\), expected pictures.*'frames'"):
            gen(seed=0, prompt_embeds=draw_prompts(8, 1))
        with pytest.raises(ConfigError, match="makes pictures of a text, expected prompt="):
            gen(seed=0, output_type="frames")


def test_the_released_size_has_the_inputs_that_the_spec_says(
    flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wan 2.1 1.3B at its own size, 81 frames of 480x832, without memory for weights."""
    import diffusers

    folder = Path(shutil.copytree(flow_folders("WanPipeline"), tmp_path / "pipeline"))
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text("utf-8")) | {
        "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096,
        "freq_dim": 256, "rope_max_seq_len": 1024,
    }  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")
    found = read_few_step_folder(folder, Settings(distilled=True))
    spec = found.spec(4)
    assert (spec.sample_shape, spec.image_shape) == ((16, 21, 60, 104), (3, 81, 480, 832))
    assert [tensor.shape for tensor in spec.conditioning_inputs] == [(512, 4096)]
    with torch.device("meta"):
        transformer = diffusers.WanTransformer3DModel.from_config(found.transformer)
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6) == 1419
    network = Wan(transformer, found).to("meta").eval()
    given = torch.zeros(1, 16, 21, 60, 104, device="meta"), torch.ones(1, device="meta")
    with torch.no_grad():
        assert network(*given, torch.zeros(1, 512, 4096, device="meta")).shape == (1, 16, 21, 60, 104)
