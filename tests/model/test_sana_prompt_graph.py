"""The text encoder of SANA-Sprint as a graph: the embeddings of transformers, by ONNX Runtime and tokenizers alone."""

import base64
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from helpers.sana_fixtures import PROMPTS, SIZE, TOKENS
from helpers.servers import running
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import ConfigError, IntegrityError
from scm_sdk.export.sana import import_sana
from scm_sdk.images import encode_picture
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.prompt_graph import PromptGraph
from scm_sdk.model.foreign.prompt_encoder import PromptEncoder

GRAPH, START = "text_encoder/model.onnx", 1.1


@pytest.fixture(scope="module")
def bundle(
    sana_folder: Path, tmp_path_factory: pytest.TempPathFactory, exports: Callable[[], AbstractContextManager[None]]
) -> Path:
    """Return a bundle with the graphs of both encoders, that of the text in place of its weights; read only."""
    out = tmp_path_factory.mktemp("prompts") / "bundle"
    with exports():
        import_sana(
            sana_folder, out, times=(START,), size=(SIZE, SIZE), max_sequence_length=TOKENS, max_batch=2,
            text_encoder=False, onnx_text_encoder=True, encoder=True,
        )  # fmt: skip
    return out


def test_embeddings_are_those_of_transformers(bundle: Path, sana_folder: Path) -> None:
    texts = [*PROMPTS, "  An UPPER case cat ", "", "a" * 400]
    embeds, mask = PromptEncoder(sana_folder).encode(texts, TOKENS)
    graph = PromptGraph(bundle / GRAPH)
    found, kept = graph.encode(texts, TOKENS)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_allclose(found, embeds, rtol=0, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-2 and 0 < mask[0].sum() < TOKENS == mask[4].sum()
    with pytest.raises(ConfigError, match="prompts of 7 tokens are asked for, expected 16"):
        graph.encode(["a cat"], 7)


def test_a_prompt_needs_neither_torch_nor_transformers(bundle: Path, sana_folder: Path) -> None:
    code = f"""
import sys
for name in ("torch", "transformers", "diffusers"):
    sys.modules[name] = None
import numpy as np
from scm_sdk import Generator
with Generator.from_pretrained({str(bundle)!r}, backend="onnxruntime") as gen:
    images = gen(2, prompt={PROMPTS!r}, seed=1, output_type="raw").images
np.save(sys.argv[1], images)
"""
    target = bundle.parent / "images.npy"
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    embeds, mask = PromptEncoder(sana_folder).encode(PROMPTS, TOKENS)
    with Generator.from_pretrained(bundle, backend="torch") as gen:
        wanted = gen(2, prompt_embeds=embeds, prompt_attention_mask=mask, seed=1, output_type="raw").images
    np.testing.assert_allclose(np.load(target), wanted, rtol=0, atol=1e-4)


def pixels_of(image: dict[str, Any]) -> np.ndarray:
    """Return the picture of an answer, (H, W, 3), int64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))).astype(int)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_server_takes_prompts_and_images_without_torch(bundle: Path) -> None:
    pytest.importorskip("starlette")
    picture = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image = {"image": base64.b64encode(encode_picture(picture, ".png")).decode(), "start_time": START}
    url = "/v1/images/generations"
    with (
        running(bundle, "--backend", "onnxruntime") as server,
        Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as gen,
    ):
        model = server.http.get("/v1/models").json()["data"][0]
        assert (model["takes_prompt"], model["start_times"], model["default_steps"]) == (True, {"1": START}, 1)
        for asked, told in (({}, {}), (image, {"image": picture, "start_time": START})):
            body = {"prompt": PROMPTS[0], "seed": 5, "n": 2} | asked
            found = server.http.post(url, json=body).json()["data"]
            wanted = gen(2, prompt=PROMPTS[0], seed=5, output_type="uint8", **told).images
            blocks = server.http.post(url, json=body | {"stream": True}).text.split("\n\n")
            events = [
                json.loads(block.partition("\ndata: ")[2]) for block in blocks if block.startswith("event: image")
            ]
            streamed = sorted(events, key=lambda event: event["index"])
            for one, other, expected in zip(found, streamed, wanted, strict=True):
                for made in (one, other):  # of other batches and threads: equal up to rounding
                    assert np.abs(pixels_of(made) - expected.astype(int)).max() <= 1
        loaded = Path(f"/proc/{server.process.pid}/maps").read_text(encoding="utf-8")
        assert "onnxruntime" in loaded and "torch" not in loaded


def test_the_bundle_holds_no_weights_of_the_encoder(bundle: Path) -> None:
    files = {entry.path: entry.role for entry in Bundle.open(bundle).manifest.files}
    own = {path: role for path, role in files.items() if "text_encoder" in path or "tokenizer" in path}
    assert own == {
        GRAPH: "graph", "text_encoder/prompt.json": "config", "text_encoder/tokenizer.json": "config",
    }  # fmt: skip


def test_a_server_needs_no_other_text_encoder(bundle: Path) -> None:
    pytest.importorskip("starlette")
    from scm_sdk.serve.service import _check_inputs

    with Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as gen:
        _check_inputs(gen)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompt.json", "{}", "tokenizer next to .* cannot be loaded"),
        ("prompt.json", "[" * 100_000, "tokenizer next to .* cannot be loaded"),
        ("tokenizer.json", "{}", "tokenizer next to .* cannot be loaded"),
        ("model.onnx", "no graph", r"cannot load .*model\.onnx"),
    ],
)
def test_damaged_parts_are_refused(bundle: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = Path(shutil.copytree(bundle / "text_encoder", tmp_path / "text_encoder"))
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(IntegrityError, match=message):
        PromptGraph(folder / "model.onnx")
    whole = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    data = bytearray((whole / "text_encoder" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (whole / "text_encoder" / name).write_bytes(data)
    with (
        Generator.from_pretrained(whole, backend="onnxruntime", num_threads=1) as gen,
        pytest.raises(IntegrityError, match=f"text_encoder.{name}"),
    ):
        gen(prompt="a cat")


def test_settings_of_another_size_are_refused(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle / "text_encoder", tmp_path / "text_encoder"))
    settings = json.loads((folder / "prompt.json").read_bytes())
    for change, error, message in (
        ({"length": 2**20}, ConfigError, "max_sequence_length <= length"),
        ({"width": 9}, IntegrityError, "has inputs and output"),
        ({"length": settings["length"] + 1}, IntegrityError, "has inputs and output"),
    ):
        (folder / "prompt.json").write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(error, match=message):
            PromptGraph(folder / "model.onnx")
