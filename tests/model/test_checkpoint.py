"""Networks inside ``torch.compile`` or data parallelism are saved as what they wrap."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import nn

from scm_sdk.bundle.layout import WEIGHTS_NAME
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.custom import own_config
from scm_sdk.model.networks.presets import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # the compiler's own
compiled = functools.partial(torch.compile, backend="eager")
"""The default backend reads its own files in the encoding of the locale, and fails where that is ASCII."""
WRAPPERS = {
    "compile": compiled,
    "parallel": nn.DataParallel,
    "both": lambda network: nn.DataParallel(compiled(network)),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ConsistencyModel(ModelConfig(network=tiny())).eval().requires_grad_(False)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_is_saved_bare(wrap, model, tmp_path):
    weights = {name: p.clone() for name, p in model.network.state_dict().items()}
    model.network = wrap(model.network)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(ConsistencyModel.from_pretrained(tmp_path).network.state_dict(), weights, rtol=0, atol=0)


def test_wrapped_parts_are_saved_bare(model, tmp_path):
    weights = {name: p.clone() for name, p in model.network.state_dict().items()}
    name, child = next(iter(model.network.named_children()))
    setattr(model.network, name, nn.DataParallel(child))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS_NAME).keys() == weights.keys()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_files_with_the_names_of_wrappers_are_read(prefix, model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load((tmp_path / WEIGHTS_NAME).read_bytes())  # no view of the file, which is written over
    save_file({prefix + name: p for name, p in weights.items()}, tmp_path / WEIGHTS_NAME)
    torch.testing.assert_close(ConsistencyModel.from_pretrained(tmp_path).network.state_dict(), weights, rtol=0, atol=0)


def test_an_own_network_is_named_by_its_class():
    assert own_config(compiled(nn.Linear(2, 2)), sample_shape=(2,)).name == "Linear"
