"""Clips that are decoded one latent frame after the other are those of the whole decoder."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from helpers.commands import run  # noqa: E402
from helpers.few_step_fixtures import SIZES, TOKENS, draw_prompts, make_pipeline  # noqa: E402
from scm_sdk import Generator  # noqa: E402
from scm_sdk._util.files import sha256_file  # noqa: E402
from scm_sdk.bundle.bundle import Bundle, write_bundle  # noqa: E402
from scm_sdk.bundle.layout import FIRST_FRAME_PATH, FRAMES_PATH, NEXT_FRAMES_PATH  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError  # noqa: E402
from scm_sdk.export.build_all import build_all  # noqa: E402
from scm_sdk.export.flow_pipeline import import_flow_pipeline  # noqa: E402
from scm_sdk.export.graph.decoder import export_frame_decoder  # noqa: E402
from scm_sdk.inference.backends import open_graph  # noqa: E402
from scm_sdk.inference.frames import FrameSettings, frame_inputs, frame_outputs  # noqa: E402
from scm_sdk.model.foreign.few_step import FewStepModel, load_few_step  # noqa: E402
from scm_sdk.model.foreign.few_step_folder import Settings  # noqa: E402
from scm_sdk.model.sampler import Sampler  # noqa: E402

FRAMES = 13
"""Four latent frames: the first, the second, whose caches hold what the first left out, and two more."""


def settings(name: str = "WanPipeline", *, frame_decoder: bool = False, **changes: int) -> Settings:
    return Settings(max_sequence_length=TOKENS, distilled=True, frame_decoder=frame_decoder, **SIZES[name] | changes)


@pytest.fixture(scope="module")
def model(flow_folders: Callable[[str], Path]) -> FewStepModel:
    return load_few_step(flow_folders("WanPipeline"), settings(num_frames=FRAMES, frame_decoder=True))


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((2, 16, 4, 4, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def clips(latents: np.ndarray) -> np.ndarray:
    """What diffusers' autoencoder makes of the latents."""
    vae = make_pipeline("WanPipeline").vae
    mean, std = (
        torch.tensor(getattr(vae.config, f"latents_{name}")).reshape(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    with torch.no_grad():
        decoded: np.ndarray = vae.decode(torch.from_numpy(latents) * std + mean, return_dict=False)[0].numpy()
    return decoded


def test_frame_by_frame_is_the_whole_clip(model: FewStepModel, latents: np.ndarray, clips: np.ndarray) -> None:
    frames = model.frame_decoder
    assert frames is not None and (frames.sample_shape, frames.output_shape) == (latents.shape[1:], clips.shape[1:])
    caches: tuple[Any, ...] = ()
    found = []
    with torch.no_grad():
        for frame in torch.from_numpy(latents).split(1, dim=2):
            pixels, *kept = frames.module(frame, caches)
            caches = tuple(kept)
            assert tuple(tuple(cache.shape[1:]) for cache in caches) == frames.cache_shapes
            found.append(pixels)
    assert [part.shape[2] for part in found] == [1, 4, 4, 4]
    assert np.abs(torch.cat(found, dim=2).numpy() - clips).max() <= 1e-6 and clips.std() > 0.05


@pytest.mark.slow
def test_the_graphs_decode_the_clip(
    model: FewStepModel, latents: np.ndarray, clips: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    assert model.frame_decoder is not None
    assert export_frame_decoder(model.frame_decoder, tmp_path) == {FRAMES_PATH: "config"}
    shapes = msgspec.json.decode((tmp_path / FRAMES_PATH).read_bytes(), type=FrameSettings)
    first, following = (
        open_graph(
            tmp_path / path, frame_inputs(shapes, first=i == 0), frame_outputs(shapes, first=i == 0), num_threads=1
        )
        for i, path in enumerate((FIRST_FRAME_PATH, NEXT_FRAMES_PATH))
    )
    sessions = [graph._infer.func.__self__ for graph in (first, following)]
    kept_by_library = [session.get_session_options().enable_cpu_mem_arena for session in sessions]
    assert kept_by_library == [False, False], "memory of a frame is freed, not kept for later"
    found, caches = [], {}
    for i in range(latents.shape[2]):
        pixels, *kept = (following if i else first).run({"latents": latents[:, :, i : i + 1], **caches})
        caches = {f"cache_{index}": cache for index, cache in enumerate(kept)}
        found.append(pixels)
    assert np.abs(np.concatenate(found, axis=2) - clips).max() <= 1e-5


GOOD = {"sample_shape": (16, 3, 4, 6), "output_shape": (3, 9, 32, 48), "cache_shapes": ((4, 2, 4, 6),)}
BAD = {
    "rank": ({"output_shape": (3, 32, 48)}, "shapes, the first .* expected at most 1024 of four axes"),
    "axis": ({"cache_shapes": ((4, 0, 4, 6),)}, "expected at most 1024 of four axes >= 1"),
    "number": ({"cache_shapes": ((1, 1, 1, 1),) * 1025}, "has 1027 shapes"),
    "frames": ({"output_shape": (3, 10, 32, 48)}, "makes 10 frames of 3 latent ones"),
    "one frame": ({"sample_shape": (16, 1, 4, 6)}, "makes 9 frames of 1 latent ones"),
    "clip": ({"output_shape": (3, 9, 1 << 20, 1 << 20)}, "has a clip of"),
    "caches": ({"cache_shapes": ((1 << 15, 2, 1 << 15, 1 << 15),)}, "caches of more than"),
}


@pytest.mark.parametrize("case", BAD)
def test_shapes_that_cannot_be_are_refused(case: str) -> None:
    assert FrameSettings(**GOOD).frames_each == 4
    changed, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        FrameSettings(**GOOD | changed)


def test_one_frame_and_images_have_no_frame_decoder(flow_folders: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"WanPipeline makes a clip of 1 frame, expected a clip of more frames"):
        load_few_step(flow_folders("WanPipeline"), settings(num_frames=1, frame_decoder=True))
    with pytest.raises(ConfigError, match=r"Flux2KleinPipeline makes images.*--frame-decoder"):
        load_few_step(flow_folders("Flux2KleinPipeline"), settings("Flux2KleinPipeline", frame_decoder=True))


@pytest.fixture(scope="module")
def bundle(flow_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frames") / "bundle"
    run("import", flow_folders("WanPipeline"), "-o", out, "--distilled", "--size", "32x48", "--frames", FRAMES,
        "--tokens", TOKENS, "--steps", 2, "--max-batch", 2, "--frame-decoder")  # fmt: skip
    return out


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
from scm_sdk import Generator
bundle, inputs, out = sys.argv[1:]
given = np.load(inputs)
with Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1, verify="smoke") as gen:
    np.save(out, gen(2, noise=given["noise"], prompt_embeds=given["embeds"], output_type="raw").images)
"""


@pytest.mark.slow
def test_the_bundles_clips_are_those_of_pytorch(
    bundle: Path, flow_folders: Callable[[str], Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("onnxruntime")
    noise = np.random.default_rng(0).standard_normal((2, 2, 16, 4, 4, 6)).astype(np.float32)
    whole = load_few_step(flow_folders("WanPipeline"), settings(num_frames=FRAMES))
    inputs = [*noise, draw_prompts(8)]
    with torch.no_grad():
        wanted = Sampler(whole, whole.spec(2)).eval()(*map(torch.from_numpy, inputs)).numpy()
    np.savez(tmp_path / "inputs.npz", noise=noise, embeds=draw_prompts(8))
    command = [sys.executable, "-c", _WITHOUT_TORCH, bundle, tmp_path / "inputs.npz", tmp_path / "clips.npy"]
    subprocess.run([str(part) for part in command], check=True)
    found = {"onnxruntime, no torch": np.load(tmp_path / "clips.npy")}
    with Generator.from_pretrained(bundle, backend="torch", num_threads=1) as gen:
        found["torch"] = gen(2, noise=noise, prompt_embeds=draw_prompts(8), output_type="raw").images
        frames = gen(1, seed=0, prompt_embeds=draw_prompts(8, 1), output_type="frames")
        (together,) = gen.stream(
            [{"num_images": 2, "noise": noise, "prompt_embeds": draw_prompts(8), "output_type": "raw"}]
        )
    np.testing.assert_array_equal(together.images, found["torch"])
    assert [len(clip) for clip in frames.images] == [FRAMES] and frames.images[0][0].size == (48, 32)
    assert wanted.shape == (2, 3, FRAMES, 32, 48) and wanted.std() > 0.05
    for name, clips in found.items():
        gap = float(np.abs(clips - wanted).max())
        record_property(f"difference, {name}", gap)
        assert gap <= 1e-4, name


@pytest.mark.slow
def test_the_other_commands_take_the_bundle(bundle: Path, flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    whole = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    run("bundle", "verify", whole)
    run("precision", whole, "--num-samples", 1)
    assert "fp16" in run("validate", whole, "--num-seeds", 2, "--batch", 2).output
    given = {"steps": (2,), "size": (32, 48), "num_frames": FRAMES, "max_sequence_length": TOKENS, "max_batch": 2,
             "distilled": True}  # fmt: skip
    folder = flow_folders("WanPipeline")
    assert import_flow_pipeline(folder, whole, frame_decoder=True, reuse=True, **given).unchanged
    with pytest.raises(BundleError, match="overwrite"):
        import_flow_pipeline(folder, whole, reuse=True, **given)
    (again,) = build_all(whole, tmp_path / "again", steps=(1,), precisions=("fp32",)).manifest.samplers
    assert again.num_inference_steps == 1 and Bundle.open(tmp_path / "again").manifest.has_frame_decoder
    run("bundle", "pack", whole, "-o", tmp_path / "cut", "--only", "onnx/fp16")
    with Generator.from_pretrained(tmp_path / "cut", backend="onnxruntime", num_threads=1) as gen:
        assert gen(1, seed=0, prompt_embeds=draw_prompts(8, 1), output_type="np").images.shape == (1, FRAMES, 32, 48, 3)


def forged(bundle: Path, out: Path, damage: Callable[[Path], object], *, sealed: bool) -> Path:
    """Return a damaged copy; ``sealed`` with a manifest that fits, as a hostile maker would write it."""
    copy = Path(shutil.copytree(bundle, out))
    damage(copy)
    old = Bundle.open(bundle, verify="none").manifest
    roles = {entry.path: entry.role for entry in old.files if (copy / entry.path).exists()}
    if sealed:
        write_bundle(copy, name=old.name, samplers=old.samplers, artifacts=old.artifacts, provenance=old.provenance,
                     roles=roles)  # fmt: skip
    return copy


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(path: Path, **values: object) -> None:
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | values))


FORGED: dict[str, tuple[Callable[[Path], object], bool, type[ScmError], str]] = {
    "damaged graph": (lambda b: flip(b / NEXT_FRAMES_PATH), False, IntegrityError, r"next.model\.onnx"),
    "damaged shapes": (lambda b: flip(b / FRAMES_PATH), False, IntegrityError, r"frames\.json"),
    "no graph": (lambda b: (b / NEXT_FRAMES_PATH).unlink(), True, IntegrityError, r"has no frame_decoder/next"),
    "graph of another kind": (
        lambda b: shutil.copyfile(b / FIRST_FRAME_PATH, b / NEXT_FRAMES_PATH), True, IntegrityError,
        r"has inputs and outputs",
    ),
    "no JSON": (lambda b: (b / FRAMES_PATH).write_bytes(b"["), True, IntegrityError, r"frames\.json cannot be read"),
    "huge file": (lambda b: (b / FRAMES_PATH).write_bytes(b" " * (9 << 20)), True, IntegrityError, r"More than"),
    "other latents": (
        lambda b: change(b / FRAMES_PATH, sample_shape=[16, 4, 8, 6]), True, IntegrityError,
        r"decodes latents of",
    ),
    "other clip": (
        lambda b: change(b / FRAMES_PATH, output_shape=[3, 10, 32, 48]), True, IntegrityError, r"decodes latents of",
    ),
    "other caches": (
        lambda b: change(b / FRAMES_PATH, cache_shapes=[[4, 2, 4, 6]]), True, IntegrityError, r"has inputs and outputs",
    ),
    "no clip": (
        lambda b: change(b / FRAMES_PATH, output_shape=[3, 12, 32, 48]), True, ConfigError, r"makes 12 frames",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", FORGED)
def test_a_forged_frame_decoder_is_refused(bundle: Path, tmp_path: Path, case: str) -> None:
    pytest.importorskip("onnxruntime")
    damage, sealed, error, message = FORGED[case]
    copy = forged(bundle, tmp_path / "bundle", damage, sealed=sealed)
    assert sealed or any(sha256_file(copy / e.path) != e.sha256 for e in Bundle.open(bundle).manifest.files)

    def use() -> None:
        with Generator.from_pretrained(copy, backend="onnxruntime", num_threads=1) as gen:
            gen(1, seed=0, prompt_embeds=draw_prompts(8, 1), output_type="raw")

    with pytest.raises(error, match=message):
        use()


@pytest.mark.slow
def test_a_bundle_without_recorded_samples_says_so(flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    given = {"size": (32, 48), "num_frames": 5, "max_sequence_length": TOKENS, "steps": (1,), "distilled": True,
             "frame_decoder": True, "max_batch": 1}  # fmt: skip
    folder, out = flow_folders("WanPipeline"), tmp_path / "bundle"
    import_flow_pipeline(folder, out, goldens=False, **given)
    assert import_flow_pipeline(folder, out, goldens=False, reuse=True, **given).unchanged
    with pytest.raises(BundleError, match="overwrite"):
        import_flow_pipeline(folder, out, reuse=True, **given)
    with pytest.raises(BundleError, match="records no sample of 1 steps"):
        Generator.from_pretrained(out, backend="onnxruntime", verify="smoke", num_threads=1)


@pytest.mark.slow
def test_a_clip_is_needed_for_a_frame_decoder(flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clip of 1 frame"):
        import_flow_pipeline(
            flow_folders("WanPipeline"), tmp_path / "out", num_frames=1, size=(32, 48), max_sequence_length=TOKENS,
            distilled=True, frame_decoder=True,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
