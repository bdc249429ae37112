"""EDM-style pickles: their weights come out exactly, with their license."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from scm_sdk.bundle.layout import WEIGHTS_NAME
from scm_sdk.errors import ConfigError, IntegrityError
from scm_sdk.export.cli import main
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.pickles.convert import convert_pickle
from scm_sdk.pickles.edm2_layout import edm2_shapes
from scm_sdk.pickles.network import read_network


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_tensors_equal_the_state_dict(edm_pickle, tmp_path, dtype):
    expected = edm_pickle(tmp_path / "net.pkl", dtype=dtype)
    convert_pickle(tmp_path / "net.pkl", tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert list(read_network(tmp_path / "net.pkl").tensors) == list(expected), "in the order of state_dict()"
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        kept = torch.float32 if dtype == torch.bfloat16 else dtype
        assert found[name].dtype == kept
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor.to(kept)), name


def test_views_are_cut_from_their_storage(edm_pickle, tmp_path):
    def transpose(root):
        root["ema"].unet.enc["8x8_block0"].weight.data = torch.arange(40.0).reshape(4, 10)[:, 2:6].T

    edm_pickle(tmp_path / "net.pkl", change=transpose)
    found = read_network(tmp_path / "net.pkl").tensors["unet.enc.8x8_block0.weight"].numpy()
    assert np.array_equal(found, torch.arange(40.0).reshape(4, 10)[:, 2:6].T.numpy())


def test_arguments_and_facts_are_read(pkl):
    network = read_network(pkl)
    assert network.class_name == "TinyPrecond"
    assert network.arguments == {"img_resolution": 8, "label_dim": 10, "channel_mult": [1, 2], "sigma_data": 0.5}
    assert network.facts["encoder"] == {"class_name": "Encoder", "scale": [0.5, 2.0]}
    assert network.facts["dataset_kwargs"] == {"path": "imagenet", "use_labels": True}


def test_the_license_is_recorded_and_printed(pkl, tmp_path):
    result = CliRunner().invoke(main, ["import", str(pkl), "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert "CC-BY-NC-SA-4.0, non-commercial" in result.stderr
    assert json.loads(result.stdout)["license"] == "CC-BY-NC-SA-4.0"
    assert "license: cc-by-nc-sa-4.0" in (tmp_path / "out" / "README.md").read_text("utf-8")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (config["license"], config["license_stated_at_import"]) == ("CC-BY-NC-SA-4.0", False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", WEIGHTS_NAME}


def test_the_user_may_state_another_license(pkl, tmp_path):
    options = ["-o", str(tmp_path / "out"), "--license", "My: own\\ words"]
    result = CliRunner().invoke(main, ["import", str(pkl), *options])
    assert "as stated at import: My: own" in result.stderr
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert 'license: other\nlicense_name: "My: own\\\\ words"' in card


def test_names_and_shapes_are_held_to_the_architecture(pkl, tmp_path):
    shapes = {name: tensor.shape for name, tensor in read_network(pkl).tensors.items()}
    convert_pickle(pkl, tmp_path / "out", expected=shapes)
    other = shapes | {"unet.extra": (1,), "unet.freqs": (5,)}
    del other["unet.out_gain"]
    match = (
        r"1 missing \(first: unet.extra\), 1 unknown \(first: unet.out_gain\), 1 of .*\(4,\), expected \(5,\) of unet"
    )
    with pytest.raises(IntegrityError, match=match):
        convert_pickle(pkl, tmp_path / "other", expected=other)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("channels", "millions"),
    [(64, 31.3), (128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3), (448, 1523.2)],
)
def test_the_layout_of_edm2_has_the_published_size(channels, millions):
    shapes = edm2_shapes({"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": channels})
    assert len(shapes) == 203
    learned = sum(math.prod(s) for name, s in shapes.items() if not name.endswith(("freqs", "phases")))
    assert round(learned / 1e6, 1) == millions


def test_an_edm2_network_is_held_to_its_own_arguments(edm_pickle, tmp_path):
    def rename(root):
        root["ema"].__class__ = type("Precond", (type(root["ema"]),), {})

    edm_pickle(tmp_path / "net.pkl", change=rename)
    with pytest.raises(IntegrityError, match="says it is EDM2's Precond, but img_channels is None"):
        convert_pickle(tmp_path / "net.pkl", tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(edm_pickle, tmp_path):
    def spoil(root):
        root["ema"].unet.out_gain.data.fill_(torch.nan)

    edm_pickle(tmp_path / "net.pkl", change=spoil)
    with pytest.raises(IntegrityError, match=r"unet\.out_gain holds NaN"):
        convert_pickle(tmp_path / "net.pkl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_not_there_is_named(pkl):
    with pytest.raises(ConfigError, match="holds no network 'net', expected one of: ema"):
        read_network(pkl, entry="net")


def test_a_tensor_that_no_state_dict_holds_is_not_lost_silently(edm_pickle, tmp_path):
    edm_pickle(tmp_path / "net.pkl", change=lambda root: setattr(root["ema"].unet, "loose", torch.ones(2)))
    with pytest.raises(ConfigError, match="keeps a tensor 'loose' that is neither parameter nor buffer"):
        read_network(tmp_path / "net.pkl")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_older_protocols_are_read(edm_pickle, tmp_path, protocol):
    expected = edm_pickle(tmp_path / "net.pkl", protocol=protocol)
    found = read_network(tmp_path / "net.pkl").tensors
    assert all(np.array_equal(found[name].numpy(), tensor.numpy()) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "changes", [{"attn_resolutions": []}, {"model_channels": 16, "channels_per_head": 64}], ids=["none", "narrow"]
)
def test_attention_is_where_a_head_fits(changes):
    arguments = {"img_resolution": 16, "img_channels": 3, "label_dim": 0, "model_channels": 64} | changes
    names = [name for name in edm2_shapes(arguments | {"channel_mult": [1, 2]}) if "attn" in name]
    assert sorted({name.split(".")[2] for name in names}) == ([] if "channels_per_head" in changes else ["8x8_in0"])


def test_what_was_imported_is_no_model_and_says_what_it_is(edm_pickle, tmp_path):
    edm_pickle(tmp_path / "net.pkl")
    convert_pickle(tmp_path / "net.pkl", tmp_path / "net")
    with pytest.raises(ConfigError, match=r"an imported EDM or EDM2 network.*ModuleDenoiser"):
        ConsistencyModel.from_pretrained(tmp_path / "net")


def test_a_network_of_countless_blocks_is_refused_at_once():
    with pytest.raises(ValueError, match="num_blocks is 65536"):
        edm2_shapes({"img_resolution": 64, "img_channels": 3, "label_dim": 0, "num_blocks": 65536})
