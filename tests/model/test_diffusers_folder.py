"""A folder that diffusers saved: read with care, distilled, and refused with one clear line."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load, load_file, save_file

from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError
from scm_sdk.export.cli import main
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.foreign import diffusers_folder
from scm_sdk.model.foreign.diffusers_folder import is_diffusers_folder, load_diffusers
from scm_sdk.model.foreign.schedule import VpIndex
from scm_sdk.model.trigflow import predict_data
from scm_sdk.train.config import DataConfig, TrainConfig
from scm_sdk.train.prepare import resolve

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers under numpy 2

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A class-conditional pipeline of a tiny U-Net, as diffusers writes it."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, attention_head_dim=4, num_class_embeds=3, dropout=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def test_pipeline_and_component_are_one_model(saved):
    assert is_diffusers_folder(saved) and is_diffusers_folder(saved / "unet")
    pipeline, component = load_diffusers(saved), load_diffusers(saved / "unet")
    assert pipeline.config.network == component.config.network
    assert pipeline.config.network.schedule.beta_schedule == "squaredcos_cap_v2"
    assert (pipeline.sigma_data, pipeline.config.num_classes, pipeline.config.sample_shape) == (0.5, 3, (1, 8, 8))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.2]), torch.tensor([0, 2])
    torch.testing.assert_close(pipeline(x, t, labels), component(x, t, labels), rtol=0, atol=0)
    weights = load_file(saved / "unet" / WEIGHTS)
    torch.testing.assert_close(dict(pipeline.network.denoiser.module.named_parameters()), weights, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_weights_saved_from_inside_a_wrapper_are_the_same_model(saved, folder, prefix):
    path = folder / "unet" / WEIGHTS
    save_file({prefix + name: tensor for name, tensor in load(path.read_bytes()).items()}, path)
    found, expected = load_diffusers(folder).state_dict(), load_diffusers(saved).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_shards_are_one_model(folder):
    whole = load_diffusers(folder)
    tensors = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / "unet" / f"part-{i}.safetensors")
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.2]), torch.tensor([0, 2])
    torch.testing.assert_close(load_diffusers(folder)(x, t, labels), whole(x, t, labels), rtol=0, atol=0)
    (folder / "unet" / "part-1.safetensors").unlink()
    with pytest.raises(BundleError, match=r"1 of 2 shards .*first part-1\.safetensors"):
        load_diffusers(folder)


def _no_scheduler(folder):
    shutil.rmtree(folder / "scheduler")


def _pickle(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _other_weights(folder):
    tensors = load((folder / "unet" / WEIGHTS).read_bytes())
    tensors["conv_in.bias"] = torch.zeros(9)
    save_file(tensors, folder / "unet" / WEIGHTS)


def _lead_out(folder):
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../x.safetensors"}}), encoding="utf-8"
    )


def _garbage(folder):
    (folder / "unet" / "config.json").write_text("[1", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_no_scheduler, BundleError, r"no scheduler_config\.json in .*scheduler.*which noise levels"),
        (
            _pickle,
            BundleError,
            r"holds neither diffusion_pytorch_model\.safe.*\.bin is a pickle, which is never loaded",
        ),
        (_other_weights, IntegrityError, r"1 tensors differ, first 'conv_in\.bias': found \(9,\), expected \(8,\)"),
        (_lead_out, ScmError, r"\.\./\.\./x\.safetensors"),
        (_garbage, ConfigError, r"unet/config\.json is no JSON object"),
        (
            lambda f: change(f / "unet" / "config.json", _class_name="UNet2DConditionModel"),
            ConfigError,
            "holds a 'UNet2DConditionModel', expected one of UNet2DModel, DiT.*ModuleDenoiser",
        ),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", _class_name="SCMScheduler"),
            ConfigError,
            "scheduler is a 'SCMScheduler', expected one of DDIMScheduler",
        ),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", prediction_type="flux"),
            ConfigError,
            "prediction_type 'flux', expected one of epsilon, v_prediction, sample",
        ),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid"),
            ConfigError,
            "breaks its config: .*beta_schedule",
        ),
        (
            lambda f: change(f / "unet" / "config.json", sample_size=None),
            ConfigError,
            r"names no sample_size, expected sample_shape=\(C, H, W\)",
        ),
        (
            lambda f: change(f / "model_index.json", unet=None),
            ConfigError,
            "a 'DDPMPipeline' with none of unet, transformer, expected one denoiser",
        ),
    ],
)
def test_folders_that_cannot_be_read(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load_diffusers(folder)


def test_schedulers_say_what_is_predicted(folder):
    path = folder / "scheduler"
    shutil.rmtree(path)
    diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500).save_pretrained(path)
    network = load_diffusers(folder).config.network
    assert (network.convention, network.schedule, network.num_train_timesteps) == ("flow", None, 500)
    diffusers.EDMEulerScheduler(sigma_data=0.7).save_pretrained(path)
    assert load_diffusers(folder).sigma_data == 0.7
    with pytest.raises(ConfigError, match=r"sigma_data is 0\.5, expected 0\.7"):
        load_diffusers(folder, sigma_data=0.5)


DISCRETE = sorted(diffusers_folder._VP_SCHEDULERS)


def own_levels(scheduler, folder):
    """Read a scheduler that the library saved; return al of each of its steps, and the network's config."""
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    network = load_diffusers(folder).config.network
    return network.schedule.alphas(), network


@pytest.mark.parametrize("name", DISCRETE)
def test_every_discrete_scheduler_has_the_librarys_levels_and_times(folder, name):
    """With its defaults, ``-Infinity`` in some of them, and with zero terminal SNR where it has that."""
    kind = getattr(diffusers, name)
    for zero_snr in (False, True)[: 1 + ("rescale_betas_zero_snr" in inspect.signature(kind).parameters)]:
        scheduler = kind(beta_schedule="scaled_linear", **({"rescale_betas_zero_snr": True} if zero_snr else {}))
        alphas, network = own_levels(scheduler, folder)
        torch.testing.assert_close(alphas.square().float(), scheduler.alphas_cumprod, rtol=1e-6, atol=1e-12)
        steps = torch.tensor([0, 1, 500, 998, 999])
        torch.testing.assert_close(VpIndex(network.schedule)(alphas[steps]), steps.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.01, "sigma_max": 60.0},
        {"prediction_type": "epsilon", "timestep_type": "continuous"},
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "beta_schedule": "scaled_linear",
        },
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())),
)
def test_estimates_of_the_data_are_those_of_the_librarys_step(folder, settings):
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas="timestep_spacing" not in settings, **settings)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    model = load_diffusers(folder)
    unet, labels = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval(), torch.tensor([0, 2])
    scheduler.set_timesteps(6)
    noisy = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        sample = noisy * (sigma**2 + 0.25).sqrt()
        with torch.no_grad():
            out = unet(scheduler.scale_model_input(sample, timestep), timestep, labels).sample
        wanted = scheduler.step(out, timestep, sample).pred_original_sample
        t = torch.atan(sigma / model.sigma_data).expand(2)
        x_t = sample * torch.cos(t)[:, None, None, None]
        with torch.no_grad():
            F = model.network(x_t / model.sigma_data, t, labels)
        found = predict_data(x_t, F, t, sigma_data=model.sigma_data)
        # t near pi/2 is rounded to float32: sigma, 4096 with zero SNR, has the relative error of its cosine.
        gap = ((found - wanted).abs().max() / wanted.abs().max()).item()
        assert gap < 2e-4 + 3e-7 * float(sigma), (float(sigma), gap)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "log"}, "timestep_type 'log', expected 'discrete'"),
        ({"rescale_levels": 2.0}, "rescale_levels = 2.0, a setting that is not known here"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_a_setting_that_may_change_the_model_is_refused(folder, changes, message):
    change(folder / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        load_diffusers(folder)


def test_clipping_of_the_librarys_sampler_is_said_to_be_left_out(folder):
    assert load_diffusers(folder).config.provenance["scheduler_settings_not_applied"] == "clip_sample"
    change(folder / "scheduler" / "scheduler_config.json", clip_sample=False)
    assert "scheduler_settings_not_applied" not in load_diffusers(folder).config.provenance


def test_variants_and_files_in_the_root_are_found(folder):
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.2]), torch.tensor([0, 2])
    wanted = load_diffusers(folder)(x, t, labels)

    def same(where):
        torch.testing.assert_close(load_diffusers(where)(x, t, labels), wanted, rtol=0, atol=0)

    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    (folder / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*-of-*"))) > 1 and not (folder / "unet" / WEIGHTS).exists()
    same(folder)
    for path in (folder / "unet").glob("*pytorch*"):
        path.unlink()
    unet.save_pretrained(folder / "unet", variant="fp16")
    same(folder)
    shutil.copy(folder / "unet" / WEIGHTS.replace(".s", ".fp16.s"), folder / "unet" / WEIGHTS.replace(".s", ".ema.s"))
    with pytest.raises(BundleError, match=r"several variants, .*\.ema\..*, .*\.fp16\."):
        load_diffusers(folder)
    (folder / "unet" / WEIGHTS.replace(".s", ".ema.s")).rename(folder / "unet" / WEIGHTS)
    root = folder.parent / "root"
    root.mkdir()
    for path in (*folder.glob("*.json"), *folder.glob("unet/*"), *folder.glob("scheduler/*")):
        shutil.copy(path, root / path.name)
    (root / "model_index.json").unlink()
    same(root)
    shutil.copy(folder / "model_index.json", root)
    same(root)


def test_distill_from_the_folder(saved, npz, tmp_path):
    out = tmp_path / "student"
    arguments = ["distill", "-o", out, "--teacher", saved, "--data", npz, "--label", "kind", "--iterations", "2",
                 "--batch-size", "4", "--tangent-warmup", "1", "--sample-every", "0"]  # fmt: skip
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["skipped"] == 0 and lines[-1]["iteration"] == 2
    student, teacher = ConsistencyModel.from_pretrained(out), load_diffusers(saved)
    assert student.config.network.class_name == "UNet2DModel" and student.config.class_names == ("a", "b", "c")
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.2]), torch.tensor([0, 2])
    gap = (student(x, t, labels) - teacher(x, t, labels)).abs().max()
    assert 0 < gap < 0.1, "two small steps from the teacher"


@pytest.mark.parametrize(
    ("label", "changes", "message"),
    [
        ("", {}, r"the data has 0 classes, the network 3"),
        ("kind", {"label_dropout": 0.1}, r"label_dropout is 0\.1, expected 0: the network has no label for none"),
    ],
)
def test_teachers_that_do_not_fit_the_data(saved, npz, label, changes, message):
    config = TrainConfig(
        objective="scd", teacher=str(saved), data=DataConfig(source=str(npz), label=label), num_iterations=1, **changes
    )
    with pytest.raises(ConfigError, match=message):
        resolve(config)


def test_a_teacher_may_be_another_network_than_the_student(saved, npz, tmp_path, unet_checkpoint):
    from scm_sdk.model.consistency import ModelConfig
    from scm_sdk.model.networks.presets import tiny

    own = ConsistencyModel(ModelConfig(network=tiny(num_classes=3)))
    own.save_pretrained(tmp_path / "own")
    data = DataConfig(source=str(npz), label="kind")
    config = TrainConfig(objective="scd", teacher=str(saved), init_from=str(tmp_path / "own"), data=data)
    start = resolve(config)
    assert start.model_config.network == tiny(num_classes=3)
    other = TrainConfig(objective="scd", teacher=str(unet_checkpoint), init_from=str(tmp_path / "own"), data=data)
    with pytest.raises(ConfigError, match=r"are cat, dog, robot, rocket, .* a, b, c"):
        resolve(other)


@pytest.mark.slow
def test_a_wrapped_network_becomes_a_graph_for_any_batch(saved, tmp_path):
    import onnx
    import onnxruntime

    from scm_sdk.export.graph.network import export_onnx
    from scm_sdk.model.sampler import Sampler
    from scm_sdk.noise import draw_noise

    model = load_diffusers(saved)
    spec = model.spec(1)
    export_onnx(model, spec, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.DOUBLE}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for seeds in ([1], [1, 2, 3]):
        (noise,), labels = draw_noise(spec, seeds), torch.arange(len(seeds)) % 3
        (found,) = session.run(None, {"noise_0": noise, "class_labels": labels.numpy()})
        wanted = Sampler(model, spec)(torch.from_numpy(noise), labels)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
