"""Sizes and scales in a model's files that no model has end in an error that names the field, at once."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load, save_file

from scm_sdk.bundle.layout import CONFIG_NAME, WEIGHTS_NAME
from scm_sdk.errors import ConfigError, IntegrityError
from scm_sdk.model.bounds import MAX_PARAMETERS
from scm_sdk.model.checkpoint import read_config
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig, make_network
from scm_sdk.model.foreign.diffusers_models import DiffusersConfig
from scm_sdk.model.networks.custom import OwnConfig
from scm_sdk.model.networks.presets import PRESETS

HUGE = [2**31, 2**40, 2**62]
NOT_POSITIVE = [0, -1]
NUMBERS = [0.0, -1.0, 1e300]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"type": "unet", "image_size": 8, "channels": 8, "num_blocks": 1, "attention_resolutions": [8]},
    "transformer": {"type": "transformer", "image_size": 8, "channels": 16, "head_channels": 8, "depth": 1},
    "ddpmpp": {"type": "ddpmpp", "image_size": 8, "channels": 8, "num_blocks": 1, "attention_resolutions": [4]},
    "edm2": {"type": "edm2", "image_size": 8, "channels": 8, "num_blocks": 1, "attention_resolutions": [4]},
}
_POSITIVE = {
    "unet": ("image_size", "in_channels", "channels", "num_blocks", "head_channels", "patch_size"),
    "transformer": ("image_size", "in_channels", "channels", "depth", "mlp_ratio", "head_channels", "patch_size"),
    "ddpmpp": ("image_size", "in_channels", "channels", "num_blocks", "head_channels"),
    "edm2": ("image_size", "in_channels", "channels", "num_blocks", "head_channels"),
}


def _bad_networks() -> Iterator[tuple[str, str, object]]:
    for kind, names in _POSITIVE.items():
        for name in names:
            yield from ((kind, name, value) for value in [*NOT_POSITIVE, *HUGE])
        yield from ((kind, "num_classes", value) for value in [-1, *HUGE])
        yield from ((kind, "time_max_period", value) for value in NUMBERS)
        yield from ((kind, "time_fourier_scale", value) for value in NUMBERS[1:])
        yield from ((kind, "dropout", value) for value in NUMBERS[1:])
        if kind != "transformer":
            yield from ((kind, "channel_mult", [value]) for value in [*NOT_POSITIVE, *HUGE])
            yield kind, "channel_mult", []
            yield kind, "channel_mult", [1] * 2**16
    yield "transformer", "depth", 2**20
    yield "unet", "num_blocks", 2**20
    yield "ddpmpp", "dropout_resolution", 2**62


def _write(folder: Path, network: dict[str, Any], **fields: object) -> Path:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({"_class_name": "ScmModel", "network": network, **fields}), encoding="utf-8")
    return path


@contextmanager
def _at_once() -> Iterator[None]:
    """End what hangs, by its processor time: it fails the test in place of stopping all others."""

    def end(number: int, frame: FrameType | None) -> None:
        pytest.fail("it takes more than 30 s of processor time")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_configs_that_are_spoiled_are_whole(kind: str, tmp_path: Path) -> None:
    make_network(read_config(_write(tmp_path, NETWORKS[kind])).network)


@pytest.mark.parametrize(("kind", "name", "value"), [*_bad_networks()], ids=lambda value: str(value)[:24])
def test_sizes_that_no_network_has(kind: str, name: str, value: object, tmp_path: Path) -> None:
    path = _write(tmp_path, NETWORKS[kind] | {name: value})
    with _at_once(), pytest.raises(ConfigError, match=name):
        read_config(path)


@pytest.mark.parametrize("name", ["sigma_data", "mid_time"])
@pytest.mark.parametrize("value", NUMBERS)
def test_scales_that_no_model_has(name: str, value: float, tmp_path: Path) -> None:
    path = _write(tmp_path, NETWORKS["unet"], **{name: value})
    with pytest.raises(ConfigError, match=name):
        read_config(path)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("kind", NETWORKS)
def test_python_is_held_to_the_same_bounds(kind: str, value: float, tmp_path: Path) -> None:
    """JSON has neither NaN nor infinity; Python has both."""
    network = read_config(_write(tmp_path, NETWORKS[kind])).network
    for name in ("time_max_period", "time_fourier_scale", "dropout"):
        with pytest.raises(ConfigError, match=name):
            msgspec.structs.replace(network, **{name: value})
    for name in ("sigma_data", "mid_time", "default_guidance"):
        with pytest.raises(ConfigError, match=name):
            ModelConfig(network=network, **{name: value})
    for name, pair in product(("value_range", "guidance_range"), ((value, 1.0), (0.0, value))):
        with pytest.raises(ConfigError, match=name):
            ModelConfig(network=network, **{name: pair})


@pytest.mark.parametrize("shape", [(), (0, 8), (-1, 8), (2**62,), (2**20, 2**20), (1,) * 100])
def test_samples_of_an_own_network_have_a_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="sample_shape"):
        OwnConfig(name="own", sample_shape=shape)


@pytest.mark.parametrize("kind", NETWORKS)
def test_sizes_that_are_possible_one_by_one_and_too_large_together(kind: str, tmp_path: Path) -> None:
    more = {"channels": 2**14, "head_channels": 2**6}
    more |= {"depth": 256} if kind == "transformer" else {"num_blocks": 32, "channel_mult": [8, 8, 8]}
    config = read_config(_write(tmp_path, NETWORKS[kind] | more))
    with _at_once(), pytest.raises(ConfigError, match=rf"parameters, expected at most {MAX_PARAMETERS}"):
        make_network(config.network)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({name: value}, name) for name in ("layers_per_block", "norm_num_groups", "attention_head_dim")
     for value in (0, -1, 2**20, 2**62)]
    + [({"num_class_embeds": value}, "cannot be made|parameters, expected at most") for value in (-1, 2**40, 2**62)]
    + [({"block_out_channels": [2**40, 2**41]}, "cannot be made|parameters, expected at most")],
)  # fmt: skip
def test_networks_of_diffusers_are_held_to_the_same_bounds(changes: dict[str, Any], message: str) -> None:
    pytest.importorskip("diffusers")
    arguments = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "attention_head_dim": 4,
    }  # fmt: skip
    config = DiffusersConfig(
        class_name="UNet2DModel", arguments=arguments | changes, convention="flow", sample_shape=(1, 8, 8),
        sigma_data=0.5,
    )  # fmt: skip
    with _at_once(), pytest.raises(ConfigError, match=message):
        make_network(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_named_networks_are_within_the_bounds(preset: str, tmp_path: Path) -> None:
    config = ModelConfig(network=PRESETS[preset]())
    with torch.device("meta"):
        assert sum(p.numel() for p in make_network(config.network).parameters()) < MAX_PARAMETERS / 2


@pytest.mark.parametrize("depth", [100, 5_000, 200_000])
def test_deeply_nested_json_is_refused(depth: int, tmp_path: Path) -> None:
    nested = "[" * depth + "]" * depth
    (tmp_path / CONFIG_NAME).write_text(
        f'{{"_class_name": "ScmModel", "network": {json.dumps(NETWORKS["unet"])}, "provenance": {{"data": {nested}}}}}',
        encoding="utf-8",
    )
    with _at_once(), pytest.raises(ConfigError, match=CONFIG_NAME):
        read_config(tmp_path / CONFIG_NAME)


def test_a_kind_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(b'{"_class_name": "Scm\xff"}')
    with pytest.raises(ConfigError, match=rf"{CONFIG_NAME} describes a .*Scm"):
        read_config(tmp_path / CONFIG_NAME)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    ConsistencyModel(read_config(_write(tmp_path, NETWORKS["unet"]))).save_pretrained(tmp_path)
    weights = load((tmp_path / WEIGHTS_NAME).read_bytes())
    weights["conv_in.weight"] = weights["conv_in.weight"].to(dtype)
    save_file(weights, tmp_path / WEIGHTS_NAME)
    with pytest.raises(IntegrityError, match=rf"{WEIGHTS_NAME}.*'conv_in.weight'.*{dtype}"):
        ConsistencyModel.from_pretrained(tmp_path)
