"""Few-step flow pipelines of diffusers: for the same noise our pictures are theirs, in PyTorch and in ONNX."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from helpers.few_step_fixtures import SIZES, STEPS, TOKENS, feeds_of, make_pipeline, pictures_of  # noqa: E402
from scm_sdk import Generator  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError, IntegrityError  # noqa: E402
from scm_sdk.export.cli import main  # noqa: E402
from scm_sdk.export.flow_pipeline import import_flow_pipeline  # noqa: E402
from scm_sdk.export.graph.network import export_samplers  # noqa: E402
from scm_sdk.model.foreign.few_step import load_few_step  # noqa: E402
from scm_sdk.model.foreign.few_step_folder import TABLE, Settings, read_few_step_folder  # noqa: E402
from scm_sdk.model.sampler import Sampler  # noqa: E402

PIPELINES = ["Flux2KleinPipeline", "ZImagePipeline"]
"""Those that are compared with their own call; the videos have files of their own."""


def settings(name: str) -> Settings:
    return Settings(max_sequence_length=TOKENS, distilled=True, **SIZES[name])


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pictures_are_those_of_diffusers(
    flow_folders: Callable[[str], Path], name: str, record_property: Callable[[str, object], None]
) -> None:
    spec = (model := load_few_step(flow_folders(name), settings(name))).spec(STEPS[name])
    feeds = feeds_of(spec)
    wanted = pictures_of(name, feeds, STEPS[name])
    with torch.no_grad():
        found = Sampler(model, spec).eval()(*(torch.from_numpy(feeds[tensor.name]) for tensor in spec.inputs))
    gap = np.abs((found.numpy() / 2 + 0.5).clip(0, 1) - wanted).max()
    record_property("difference", float(gap))
    assert gap <= 1e-5 and wanted.std() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_the_graphs_pictures_are_those_of_diffusers(
    flow_folders: Callable[[str], Path], name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    ort = pytest.importorskip("onnxruntime")
    spec = (model := load_few_step(flow_folders(name), settings(name))).spec(STEPS[name])
    (graph,) = export_samplers(model, [spec], tmp_path)
    feeds = feeds_of(spec)
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    gap = np.abs((found / 2 + 0.5).clip(0, 1) - pictures_of(name, feeds, STEPS[name])).max()
    record_property("difference", float(gap))
    assert gap <= 1e-4
    (one,) = session.run(None, {key: value[1:] for key, value in feeds.items()})
    assert np.abs(one - found[1:]).max() <= 1e-5, "a sample does not depend on its batch"


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_sigmas_are_those_of_the_scheduler(flow_folders: Callable[[str], Path], name: str, steps: int) -> None:
    folder = read_few_step_folder(flow_folders(name), settings(name))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        {key: value for key, value in folder.scheduler.items() if not key.startswith("_")}
    )
    shape = folder.sample_shape
    if name == "Flux2KleinPipeline":
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        mu = compute_empirical_mu(math.prod(shape[1:]), steps)
    else:
        from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

        mu = calculate_shift(math.prod(shape[1:]) // 4)
    for dynamic, kind in ((False, "exponential"), (True, "exponential"), (True, "linear")):
        scheduler.register_to_config(use_dynamic_shifting=dynamic, time_shift_type=kind)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        config = {**folder.scheduler, "use_dynamic_shifting": dynamic, "time_shift_type": kind}
        np.testing.assert_allclose(
            folder.row.sigmas(config, steps, shape), scheduler.sigmas.numpy()[:-1], rtol=1e-6, atol=1e-7
        )
    times = folder.spec(steps).times
    levels = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in times]
    np.testing.assert_allclose(levels, folder.row.sigmas(folder.scheduler, steps, shape), rtol=1e-12)


def test_the_command_makes_a_bundle_that_runs_without_torch(
    flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = flow_folders("Flux2KleinPipeline"), tmp_path / "bundle"
    arguments = ["import", source, "-o", out, "--size", "16x24", "--tokens", TOKENS, "--steps", 2, "--max-batch", 2]
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert again.exit_code == 0 and "unchanged" in again.output
    with Generator.from_pretrained(out, backend="onnxruntime", num_threads=1) as gen:
        spec = gen.opened().spec
        assert spec.renoise == "ode" and spec.image_shape == (3, 16, 24) and gen.source.status.kind == "few-step model"
        feeds = feeds_of(spec)
        found = gen(
            2, noise=[feeds["noise_0"]], prompt_embeds=feeds["prompt_embeds"], output_type="np", seed=None
        ).images
        with pytest.raises(ConfigError, match=r"makes pictures of a text, expected prompt="):
            gen(seed=0)
        with pytest.raises(ConfigError, match=r"'frames', but .* shape \(3, 16, 24\), expected clips"):
            gen(seed=0, output_type="frames")
    wanted = pictures_of("Flux2KleinPipeline", feeds, 2)
    assert np.abs(np.moveaxis(found, -1, 1) - wanted).max() <= 1e-4


def change(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


BROKEN: dict[str, tuple[str, Callable[[Path], object], type[Exception], str]] = {
    "unknown pipeline": (
        "WanPipeline", lambda f: change(f / "model_index.json", {"_class_name": "LTXPipeline"}), ConfigError,
        "is a 'LTXPipeline' of diffusers, expected one of SanaSprintPipeline, Flux2KleinPipeline.* ModuleDenoiser",
    ),
    "no pipeline": (
        "WanPipeline", lambda f: (f / "model_index.json").unlink(), BundleError, "has no model_index.json, expected a",
    ),
    "full FLUX.2": (
        "Flux2KleinPipeline", lambda f: change(f / "model_index.json", {"is_distilled": False}), ConfigError,
        "is the full Flux2KleinPipeline, for about 50 steps .* is_distilled false, expected a few-step student",
    ),
    "component": (
        "WanPipeline", lambda f: shutil.rmtree(f / "vae"), BundleError, "vae holds neither",
    ),
    "other transformer": (
        "WanPipeline", lambda f: change(f / "model_index.json", {"transformer": ["diffusers", "Other"]}),
        ConfigError, "component 'transformer' of .* expected diffusers' WanTransformer3DModel",
    ),
    "shard": (
        "WanPipeline", lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").unlink(), BundleError,
        "transformer holds neither diffusion_pytorch_model.safetensors nor",
    ),
    "scheduler of another family": (
        "WanPipeline", lambda f: change(f / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"}),
        ConfigError, "scheduler of .* is a 'DDIMScheduler', expected UniPC.* or FlowMatchEuler",
    ),
    "noise prediction": (
        "WanPipeline", lambda f: change(
            f / "scheduler" / "scheduler_config.json",
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "epsilon"},
        ), ConfigError, "has prediction_type 'epsilon', expected 'flow_prediction'",
    ),
    "Karras": (
        "ZImagePipeline", lambda f: change(f / "scheduler" / "scheduler_config.json", {"use_karras_sigmas": True}),
        ConfigError, "has use_karras_sigmas = True, which is not supported",
    ),
    "shift": (
        "ZImagePipeline", lambda f: change(f / "scheduler" / "scheduler_config.json", {"shift": -3}),
        ConfigError, "has shift -3, expected a number above 0",
    ),
    "Omni": (
        "ZImagePipeline", lambda f: change(f / "transformer" / "config.json", {"siglip_feat_dim": 8}), ConfigError,
        "has siglip_feat_dim 8, expected None: another variant",
    ),
    "image to video": (
        "WanPipeline", lambda f: change(f / "transformer" / "config.json", {"image_dim": 8}), ConfigError,
        "has image_dim 8, expected None: another variant",
    ),
    "Wan 2.2": (
        "WanPipeline", lambda f: change(f / "model_index.json", {"boundary_ratio": 0.9}), ConfigError,
        "has boundary_ratio 0.9, expected None",
    ),
    "component without a class": (
        "AnyFlowPipeline", lambda f: (f / "vae" / "config.json").write_text("{}", encoding="utf-8"), ConfigError,
        "vae holds a None, expected 'AutoencoderKLWan'",
    ),
    "no JSON": ("WanPipeline", lambda f: (f / "vae" / "config.json").write_bytes(b"["), ConfigError, "no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_folder_is_refused_before_anything_is_loaded(
    flow_folders: Callable[[str], Path], case: str, tmp_path: Path
) -> None:
    name, damage, error, message = BROKEN[case]
    folder = Path(shutil.copytree(flow_folders(name), tmp_path / "pipeline"))
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        read_few_step_folder(folder, settings(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("WanPipeline", {"num_frames": 6}, r"num_frames is 6, expected 4 n \+ 1, such as 5 or 9"),
        ("WanPipeline", {"height": 40}, "images are 40x48 pixels, expected multiples of 16"),
        ("WanPipeline", {"num_frames": -3}, "expected numbers of 0 or more"),
        ("Flux2KleinPipeline", {"num_frames": 5}, "num_frames is 5, but Flux2KleinPipeline makes images"),
        ("Flux2KleinPipeline", {"width": 18}, "images are 16x18 pixels, expected multiples of 4"),
        ("WanPipeline", {"num_frames": 281}, r"num_frames is 71 tokens long, expected at most 64: the transformer has"),
        ("AnyFlowPipeline", {"width": 2064}, r"width is 129 tokens long, expected at most 64: the transformer has"),
        ("ZImagePipeline", {"height": 256}, r"height is 64 tokens long, expected at most 32: the transformer has"),
        ("Flux2KleinPipeline", {"height": 1 << 20}, r"images are 1048576x24 pixels, expected at most 16384 along"),
        ("Flux2KleinPipeline", {"max_sequence_length": 1 << 20}, r"is 1048576, expected at most 65536 tokens"),
        ("ZImagePipeline", {"max_sequence_length": 120}, "max_sequence_length is 120, expected at most 94"),
        (
            "ZImagePipeline",
            {"distilled": False},
            "does not say whether .* few-step student or the full model.*--distilled",
        ),
        (
            "WanPipeline",
            {"distilled": False},
            "does not say whether .* few-step student or the full model.*--distilled",
        ),
    ],
)
def test_wrong_settings_are_refused(
    flow_folders: Callable[[str], Path], name: str, given: dict[str, Any], message: str
) -> None:
    import msgspec

    with pytest.raises(ConfigError, match=message):
        read_few_step_folder(flow_folders(name), msgspec.structs.replace(settings(name), **given))


def test_a_folder_named_as_a_students_needs_no_word(flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flow_folders("WanPipeline"), tmp_path / "pipeline"))
    change(folder / "model_index.json", {"_class_name": "WanDMDPipeline"})
    assert read_few_step_folder(folder, Settings(**SIZES["WanPipeline"])).row is TABLE["WanPipeline"]


def test_weights_of_sparse_attention_are_refused_by_name(flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(flow_folders("WanPipeline"), tmp_path / "pipeline"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"blocks.0.attn1.attn_op.local_attn.proj_l.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ConfigError, match=r"proj_l.weight', a weight of sparse-linear attention \(SLA"):
        load_few_step(folder, settings("WanPipeline"))


def test_weights_of_another_size_are_refused(flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flow_folders("ZImagePipeline"), tmp_path / "pipeline"))
    change(folder / "transformer" / "config.json", {"n_layers": 2})
    with pytest.raises(IntegrityError, match=r"do not fit its config: \d+ tensors differ, first 'layers.1"):
        load_few_step(folder, settings("ZImagePipeline"))


def test_a_refused_import_leaves_no_files(flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rCM has times for 1..4 steps, found 50"):
        import_flow_pipeline(
            flow_folders("WanPipeline"), tmp_path / "out", steps=(50,), size=(32, 48), num_frames=5, distilled=True
        )
    assert not list(tmp_path.iterdir())


FOREIGN = {"Flux2KleinPipeline": "ZImagePipeline", "ZImagePipeline": "WanPipeline", "WanPipeline": "AnyFlowPipeline",
           "AnyFlowPipeline": "Flux2KleinPipeline"}  # fmt: skip
"""By pipeline: another, whose folder is given in its place."""
BAD_CALLS: dict[str, tuple[Callable[[Path, str], object], list[object], int, str]] = {
    "another pipeline's folder": (
        lambda f, name: change(f / "model_index.json", {"_class_name": FOREIGN[name], "is_distilled": True}), [], 2,
        "component 'transformer' of .* expected diffusers' .* Give the folder",
    ),
    "missing shard": (
        lambda f, name: sorted((f / "transformer").glob("*-of-*.safetensors"))[-1].unlink(), [], 6,
        r"1 of \d+ shards are missing in .*, first diffusion_pytorch_model-.* Copy it again",
    ),
    "wrong scheduler": (
        lambda f, name: change(f / "scheduler" / "scheduler_config.json", {"_class_name": "SCMScheduler"}), [], 2,
        "the scheduler of .* is a 'SCMScheduler', expected .*EulerDiscreteScheduler: these weights predict",
    ),
    "start time": (
        lambda f, name: None, ["--start-time", 1.1], 2, "--start-time is given, expected it left out: it is for SANA",
    ),
    "size": (lambda f, name: None, ["--size", "17x16"], 2, "images are 17x16 pixels, expected multiples of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("name", SIZES)
def test_the_command_refuses_bad_input_in_one_line(name: str, case: str, tmp_path: Path) -> None:
    damage, options, code, message = BAD_CALLS[case]
    folder = tmp_path / "pipeline"
    make_pipeline(name).save_pretrained(folder, max_shard_size="20KB")
    damage(folder, name)
    out = tmp_path / "out"
    arguments = ["import", folder, "-o", out, "--tokens", TOKENS, "--distilled", *options]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), done.stderr
    assert not out.exists()


@pytest.mark.parametrize("name", ["WanPipeline", "ZImagePipeline"])
def test_the_command_refuses_a_full_model(flow_folders: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["import", str(flow_folders(name)), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "full model of about 50 steps" in done.stderr and "--distilled" in done.stderr


@pytest.mark.parametrize("name", ["WanPipeline", "AnyFlowPipeline"])
def test_the_command_refuses_an_odd_number_of_frames(
    flow_folders: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    arguments = ["import", flow_folders(name), "-o", tmp_path / "out", "--distilled", "--frames", 6, "--size", "32x48"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 2 and "num_frames is 6, expected 4 n + 1, such as 5 or 9" in done.stderr
