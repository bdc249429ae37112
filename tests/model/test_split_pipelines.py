"""Pipelines of diffusers whose decoder is a graph of its own: the images of one graph, from parts loaded in turn."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from helpers.few_step_fixtures import SIZES, STEPS, TOKENS, draw_prompts
from helpers.sana_fixtures import SIZE
from helpers.sana_fixtures import TOKENS as SANA_TOKENS
from scm_sdk.errors import BundleError
from scm_sdk.export.flow_pipeline import import_flow_pipeline
from scm_sdk.export.sana import import_sana
from scm_sdk.inference.generator import Generator
from scm_sdk.model.foreign.prompt_encoder import PromptEncoder

ORT: dict[str, Any] = {"backend": "onnxruntime", "num_threads": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("exported_once")
def test_sana_from_a_picture_in_four_parts(
    sana_folder: Path, sana_image_bundle: Path, sana_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "steps": (2,), "start_time": 1.1, "size": (SIZE, SIZE), "max_sequence_length": SANA_TOKENS, "max_batch": 3,
        "encoder": True, "split": True,
    }  # fmt: skip
    import_sana(sana_folder, tmp_path / "split", **options)
    assert import_sana(sana_folder, tmp_path / "split", reuse=True, **options).unchanged
    with pytest.raises(BundleError, match="exists"):
        import_sana(sana_folder, tmp_path / "split", reuse=True, **(options | {"split": False}))
    picture = np.random.default_rng(5).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    embeds, mask, _ = sana_inputs
    call: dict[str, Any] = {"image": picture, "start_time": 1.1, "seed": 3, "output_type": "raw"}
    words = {"prompt_embeds": embeds[:1], "prompt_attention_mask": mask[:1]}
    with Generator.from_pretrained(sana_image_bundle, **ORT) as gen:
        wanted = gen(2, **call, **words).images
    encoders: list[weakref.ref[Any]] = []
    made = PromptEncoder.__init__

    def watched(self: PromptEncoder, *arguments: Any, **more: Any) -> None:
        made(self, *arguments, **more)
        encoders.append(weakref.ref(self.text_encoder))

    monkeypatch.setattr(PromptEncoder, "__init__", watched)
    with Generator.from_pretrained(tmp_path / "split", offload=True, **ORT) as gen:
        np.testing.assert_array_equal(gen(2, **call, **words).images, wanted)
        assert not encoders
        assert gen(2, **call, prompt="a cat").images.shape == wanted.shape
        assert [each() for each in encoders] == [None], "closed after the prompt"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZImagePipeline", "WanPipeline"])
def test_flow_pipelines_in_two_parts(flow_folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    size = SIZES[name]
    options: dict[str, Any] = {
        "steps": (STEPS[name],), "size": (size["height"], size["width"]), "num_frames": size.get("num_frames", 0),
        "max_sequence_length": TOKENS, "max_batch": 2, "distilled": True,
    }  # fmt: skip
    images = []
    for split in (False, True):
        out = tmp_path / f"split-{split}"
        import_flow_pipeline(flow_folders(name), out, split=split, **options)
        assert import_flow_pipeline(flow_folders(name), out, split=split, reuse=True, **options).unchanged
        with Generator.from_pretrained(out, offload=split, **ORT) as gen:
            embeds = draw_prompts(gen.opened().spec.conditioning[0].shape[1])[:1]
            images.append(gen(3, prompt_embeds=embeds, seed=3, output_type="raw").images)
    np.testing.assert_array_equal(images[1], images[0])
    assert images[0].std() > 0.05
