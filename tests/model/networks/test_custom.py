"""Networks of one's own: any rank and inputs of their own, from the check to a bundle; what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scm_sdk import Generator
from scm_sdk.errors import ConfigError, ExportError, ShapeError
from scm_sdk.evaluate.selfcheck import selfcheck
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.bundle_export import export_bundle
from scm_sdk.export.check import check_model
from scm_sdk.inference.output import convert
from scm_sdk.inference.request import check_output_type, make_example
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.networks import custom
from scm_sdk.model.networks.check import check_network
from scm_sdk.model.networks.custom import register_network
from scm_sdk.model.sampler import Sampler
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec, TensorSpec


@register_network("tests/sound")
class Sound(nn.Module):
    """One convolution over time, shifted by the time and by a text."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.text = nn.Linear(3, channels)

    def forward(self, x: Tensor, t: Tensor, *, text: Tensor) -> Tensor:
        return self.conv(x) * t.cos()[:, None, None] + self.text(text)[:, :, None]


TEXT = TensorSpec(name="text", shape=(3,))


def sound(**changes) -> ConsistencyModel:
    torch.manual_seed(0)
    parts = {"sigma_data": 0.5, "sample_shape": (2, 12), "conditioning": (TEXT,), "arguments": {"channels": 2}}
    return ConsistencyModel(network=Sound(), **(parts | changes)).eval().requires_grad_(False)


class Faulty(nn.Module):
    """A network with one fault."""

    def __init__(self, fault) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.fault = fault

    def forward(self, x: Tensor, t: Tensor) -> object:
        return self.fault(self.linear(x), t[:, None])  # MARK forward


class WrongTangent(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 2

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 3


def _raises(x, t):
    raise RuntimeError("out of ideas")  # MARK raises


def _fused(x, t):
    q = x[:, None, None, :]
    return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0, 0] * t  # MARK fused


def _at(marker: str) -> str:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return rf"{Path(__file__).name}:{next(i for i, line in enumerate(lines, 1) if marker in line)}\b"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (lambda x, t: x[:, :3] * t, ShapeError, r"Faulty returned \(2, 3\) torch.float32 for x of \(2, 6\)"),
        (lambda x, t: (x * t).double(), ShapeError, "torch.float64 for x of .*float32, expected F to be like x"),
        (lambda x, t: (x, t), ShapeError, "Faulty returned tuple"),
        (_raises, ConfigError, rf"Faulty\(x, t\) fails at .*{_at('# MARK raises')}: out of ideas"),
        (lambda x, t: x / (t - t), ConfigError, "returned NaN or infinity"),
        (lambda x, t: x * t + torch.rand_like(x), ConfigError, "another F for the same inputs"),
        (lambda x, t: x * t - x.mean(dim=0), ConfigError, "another F alone than in a batch"),
        (lambda x, t: x.reshape(2, 6) * t, ConfigError, "fails on one sample .*take the batch from x.shape"),
        (lambda x, t: x, ConfigError, "no gradient through t, expected one: it is not used"),
        (lambda x, t: x * t.long(), ConfigError, "no gradient through t"),
        (lambda x, t: x.detach() * t, ConfigError, "no gradient through x"),
        (_fused, ConfigError, rf"no forward-mode derivative at .*{_at('# MARK fused')}.*MatMul and Softmax"),
        (lambda x, t: WrongTangent.apply(x * t), ConfigError, "derivative is 3.% off finite differences"),
        (lambda x, t: x * t + 5 * x * t.detach().sin(), ConfigError, "off finite differences.*is detached on one"),
    ],
    ids=[
        "shape", "dtype", "tuple", "raises", "nan", "random", "mixes", "batch", "no-time", "rounded", "no-x", "fused",
        "jvp", "half-detached",
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fault, error, message):
    model = ConsistencyModel(network=Faulty(fault), sigma_data=0.5, sample_shape=(6,))
    with pytest.raises(error, match=message) as caught:
        check_network(model)
    assert "\n" not in str(caught.value)
    assert model.network.training, "the mode is left as it was"


def test_what_is_only_run_needs_no_derivative():
    model = ConsistencyModel(network=Faulty(_fused), sigma_data=0.5, sample_shape=(6,))
    check_network(model, training=False)


def test_an_operator_without_translation_is_named_with_its_line():
    def exotic(x, t):
        return torch.linalg.matrix_exp(x[:, :, None] * x[:, None, :])[:, 0] * t

    model = ConsistencyModel(network=Faulty(exotic), sigma_data=0.5, sample_shape=(6,)).eval()
    with pytest.raises(ExportError, match=rf"{_at('# MARK forward')}: operator aten\.linalg_matrix_exp"):
        check_model(model, training=False)


@pytest.mark.parametrize("shape", [(5,), (2, 7), (3, 4, 4), (2, 3, 4, 4)], ids=["vector", "sound", "image", "video"])
def test_any_rank_samples_and_shows(shape):
    class Scale(nn.Module):
        def forward(self, x, t):
            return x * t.reshape(-1, *[1] * (x.ndim - 1))

    model = ConsistencyModel(network=Scale(), sigma_data=0.5, sample_shape=shape).eval()
    check_network(model)
    spec = model.spec(2)
    images = Sampler(model, spec)(*map(torch.from_numpy, draw_noise(spec, [1, 2]))).numpy()
    assert images.shape == (2, *shape)
    last = np.moveaxis(np.zeros((2, *shape)), 1, -1).shape
    assert convert(images, (-1.0, 1.0), "np").shape == last and convert(images, (-1.0, 1.0), "pt").shape == images.shape
    check_output_type(spec, "np")
    if len(shape) != 3:
        with pytest.raises(ConfigError, match=r"samples of shape .* expected pictures \(C, H, W\)"):
            check_output_type(spec, "pil")


def test_latents_have_no_range_to_be_shown_in():
    spec = SamplerSpec(times=(1.5,), sample_shape=(4, 2, 8, 8), output="latents")
    with pytest.raises(ConfigError, match=r"returns latents of shape \(4, 2, 8, 8\).*Use output_type='raw'"):
        check_output_type(spec, "np")


def test_a_checkpoint_finds_its_code_again(tmp_path, monkeypatch):
    model = sound()
    model.save_pretrained(tmp_path)
    again = ConsistencyModel.from_pretrained(tmp_path)
    assert again.config == model.config and isinstance(again.network, Sound)
    x, t, text = torch.randn(2, 2, 12), torch.tensor([0.5]), torch.randn(2, 3)
    torch.testing.assert_close(again(x, t, text=text), model(x, t, text=text), rtol=0, atol=0)
    monkeypatch.delitem(custom.NETWORKS.factories, "tests/sound")
    with pytest.raises(ConfigError, match=r"'tests/sound'.*register_network"):
        ConsistencyModel.from_pretrained(tmp_path)
    given = ConsistencyModel.from_pretrained(tmp_path, network=Sound())
    torch.testing.assert_close(given(x, t, text=text), model(x, t, text=text), rtol=0, atol=0)


def test_tied_weights_are_stored():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x, t):
            return self.two(self.one(x)) * t[:, None]

    model = ConsistencyModel(network=Tied(), sigma_data=0.5, sample_shape=(4,))
    from scm_sdk.model.checkpoint import _unshared

    stored = _unshared(model.network.state_dict())
    assert len({tensor.data_ptr() for tensor in stored.values()}) == len(stored) == 4


def test_registering_and_describing_go_wrong_clearly():
    with pytest.raises(ConfigError, match=r"'tests/sound' is registered twice.*Faulty"):
        register_network("tests/sound")(Faulty)
    with pytest.raises(ConfigError, match=r"sample_shape.*ConsistencyModel\(network="):
        ConsistencyModel(network=Sound(), sigma_data=0.5)
    with pytest.raises(ConfigError, match=r"cannot be made with \{'rows': 3\}: .*rows"):
        custom.make_own_network(sound(arguments={"rows": 3}).config.network)
    with pytest.raises(ConfigError, match="config is given and sigma_data in addition"):
        ConsistencyModel(sound().config, Sound(), sigma_data=0.5)


def test_a_model_with_inputs_of_its_own_becomes_a_bundle_that_is_proved(tmp_path):
    model = sound()
    check_model(model)
    export_bundle(model, tmp_path / "sound", max_batch=3)
    parities = validate_bundle(tmp_path / "sound", backends=["onnxruntime"], num_seeds=4)
    assert len(parities) == 2 and all(parities)
    text = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    with Generator.from_pretrained(tmp_path / "sound", backend="onnxruntime", verify="full") as gen:
        with pytest.raises(ConfigError, match=r"conditioning holds \[\], expected exactly \['text'\]"):
            gen(num_images=3, output_type="raw")
        images = gen(num_images=3, seed=5, output_type="raw", conditioning={"text": text}).images
        spec = gen.opened().spec
    noise = [torch.from_numpy(array) for array in draw_noise(spec, [5, 6, 7])]
    wanted = Sampler(model, spec)(*noise, torch.from_numpy(text)).numpy()
    np.testing.assert_allclose(images, wanted, atol=1e-5)
    with Generator.from_pretrained(tmp_path / "sound", backend="torch") as gen:
        failed = [check.name for check in selfcheck(gen, num_samples=3) if check.passed is False]
    assert not failed


def test_examples_of_inputs_are_a_function_of_the_seed():
    spec = sound().spec(1)
    together, alone = make_example(spec, [3, 4]), make_example(spec, [4])
    np.testing.assert_array_equal(together.conditioning["text"][1:], alone.conditioning["text"])
    assert together.conditioning["text"].std() > 0.3
