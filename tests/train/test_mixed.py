"""Mixed precision: what the rearranged tangent is worth in half precision, and whole runs in it."""

import json
import math

import numpy as np
import pytest
import torch

from scm_sdk.model.consistency import make_network
from scm_sdk.model.networks.edm2 import EDM2Config
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.config import OptimizerConfig, TrainConfig
from scm_sdk.train.data.images import ImageData
from scm_sdk.train.loop import Hooks, train
from scm_sdk.train.objectives.tangent import scaled_jvp
from scm_sdk.train.parallel.mixed import in_precision, loss_scale, unscale

SD = 0.5
EDM2 = EDM2Config(
    image_size=8, in_channels=1, channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,),
    head_channels=16, num_classes=3,
)  # fmt: skip
TIMES = torch.tensor([1e-4, 0.02, 0.7, 1.2, 1.5645, 1.5707])


@pytest.fixture(scope="module", params=[tiny(num_classes=3), EDM2], ids=["unet", "edm2"])
def network(request):
    torch.manual_seed(0)
    net = make_network(request.param).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


@pytest.mark.parametrize(("precision", "close"), [("bf16", 0.08), ("fp16", 0.01)])
def test_the_tangent_in_half_precision_is_near_at_every_time(network, precision, close):
    """Near t = 0 and pi/2 too, where the scaled tangent goes to zero: there it counts against a thousandth of F, below
    which fp16 has no full precision left. The output is float32; what is off is the rounding of the trunk.
    """
    generator = torch.Generator().manual_seed(0)
    x_t, dxdt = torch.randn(2, len(TIMES), 1, 8, 8, generator=generator) * SD
    labels = torch.arange(len(TIMES)) % 3

    def pair(kind):
        net = in_precision(network, kind)
        with torch.no_grad():
            return scaled_jvp(lambda x, t: net(x, t, labels), x_t, TIMES, dxdt, sigma_data=SD)

    F = pair("fp32")[0].flatten(1).norm(dim=1)
    for found, exact in zip(pair(precision), pair("fp32"), strict=True):
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        error = (found - exact).flatten(1).norm(dim=1) / (exact.flatten(1).norm(dim=1) + 1e-3 * F)
        assert 0 < error.max() < close, error


def test_time_and_its_embedding_stay_float32(network):
    """These two times are equal in bfloat16: sigma 80 and 60."""
    seen = []
    embed = network.embed
    network.embed = lambda *told: seen.append(embed(*told)) or seen[-1]
    try:
        x, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
        in_precision(network, "bf16")(x, torch.tensor([1.5645464, 1.5625]), labels)
    finally:
        del network.embed
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], embed(torch.tensor([1.5645464, 1.5625]), labels, None), rtol=0, atol=0)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_the_gradient_keeps_its_size():
    p = torch.nn.Parameter(torch.tensor([3.0]))
    (p.square().sum() * loss_scale("fp16")).backward()
    unscale([p], "fp16")
    assert p.grad is not None and p.grad.item() == 6.0 and loss_scale("bf16") == loss_scale("fp32") == 1.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_follows_the_one_in_single(tmp_path, precision):
    rng = np.random.default_rng(0)
    data = ImageData(images=rng.integers(0, 256, (16, 8, 8, 1), np.uint8))
    lines = {}
    for kind in ("fp32", precision):
        config = TrainConfig(
            objective="diffusion",
            network=tiny(),
            batch_size=8,
            num_iterations=4,
            precision=kind,
            optimizer=OptimizerConfig(warmup_iterations=0),
        )
        logged = []
        train(config, tmp_path / kind, Hooks(on_log=logged.append, log_every=1), data)
        assert logged[-1].skipped == 0
        lines[kind] = [(line.loss, line.grad_norm) for line in logged]
        assert json.loads((tmp_path / kind / "train.json").read_text("utf-8"))["precision"] == kind
    single, half = (np.array(lines[kind]) for kind in ("fp32", precision))
    assert half == pytest.approx(single, rel=0.03) and not math.isclose(half[-1, 1], single[-1, 1], rel_tol=1e-9)
