"""The tangent and the losses, against central differences and a transcription of the paper."""

import dataclasses
import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm_sdk.model.consistency import make_network
from scm_sdk.model.networks.presets import tiny
from scm_sdk.model.networks.transformer import TransformerConfig
from scm_sdk.model.networks.unet import UNet
from scm_sdk.model.solvers import karras_times
from scm_sdk.train.config import TangentConfig, TrainConfig
from scm_sdk.train.objectives.base import Batch, LogVariance, consistency_loss, diffusion_loss, weighted_residual
from scm_sdk.train.objectives.tangent import grid_times, normalize_tangent, scaled_difference, scaled_jvp, tangent

SD = 0.5
MODES = ("jvp", "jvp2", "fd")


TRANSFORMER = TransformerConfig(
    image_size=8, in_channels=1, channels=16, depth=2, head_channels=8, patch_size=2, num_classes=3
)


@pytest.fixture(scope="module", params=[tiny(num_classes=3), TRANSFORMER], ids=["unet", "transformer"])
def network(request) -> torch.nn.Module:
    """A double-precision network whose every parameter is random, so that no branch is silent."""
    torch.manual_seed(0)
    net = make_network(request.param).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def make_batch(seed: int = 0, count: int = 4, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x_0, z = torch.randn(2, count, 1, 8, 8, generator=generator, dtype=dtype) * SD
    t = torch.tensor([0.05, 0.6, 1.2, 1.55], dtype=dtype)[:count]
    return Batch(x_0=x_0, z=z, t=t, class_labels=torch.arange(count) % 3)


def f_theta(net, x_t, t, labels):
    """Eq. 5 written out."""
    cos, sin = torch.cos(t).view(-1, 1, 1, 1), torch.sin(t).view(-1, 1, 1, 1)
    return cos * x_t - sin * SD * net(x_t / SD, t, labels)


def test_tangent_is_cos_times_df_dt_by_central_differences(network):
    """g = cos(t) df/dt along the data's own trajectory x_t = cos(t) x_0 + sin(t) z."""
    b = make_batch()

    def along(shift):
        t = b.t + shift
        c, s = torch.cos(t).view(-1, 1, 1, 1), torch.sin(t).view(-1, 1, 1, 1)
        return f_theta(network, c * b.x_0 + s * b.z, t, b.class_labels)

    with torch.no_grad():
        h = 1e-4
        # Fourth-order central difference: error h^4.
        df_dt = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        cos, sin = torch.cos(b.t).view(-1, 1, 1, 1), torch.sin(b.t).view(-1, 1, 1, 1)
        x_t, dxdt = cos * b.x_0 + sin * b.z, cos * b.z - sin * b.x_0
        F, dF = scaled_jvp(lambda x, t: network(x, t, b.class_labels), x_t, b.t, dxdt, sigma_data=SD)
        g = tangent(F, dF, x_t, b.t, dxdt, sigma_data=SD)
        expected = cos * df_dt
    for sample in range(4):
        error = (g[sample] - expected[sample]).norm() / expected[sample].norm()
        assert error <= 1e-6, f"t = {b.t[sample]}: relative error {error:.1e}"


def test_warmup_zero_leaves_only_the_velocity_mismatch(network):
    b = make_batch()
    cos = torch.cos(b.t).view(-1, 1, 1, 1)
    with torch.no_grad():
        F = network(b.x_0 / SD, b.t, b.class_labels)
        g = tangent(F, torch.full_like(F, torch.nan), b.x_0, b.t, b.z, sigma_data=SD, warmup=0.0).nan_to_num()
        kept = tangent(F, F, b.x_0, b.t, b.z, sigma_data=SD, warmup=0.0)
    torch.testing.assert_close(kept, -cos.square() * (SD * F - b.z))
    assert not torch.equal(g, kept)  # a NaN tangent is not hidden by r = 0


@given(scale=st.floats(1e-3, 1e3), c=st.floats(1e-3, 1.0))
@settings(max_examples=25, deadline=None)
def test_normalization_bounds_each_sample(scale, c):
    g = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    l2 = normalize_tangent(g, norm="l2", c=c).flatten(1).norm(dim=1)
    expected = g.flatten(1).norm(dim=1) / (g.flatten(1).norm(dim=1) + c)
    torch.testing.assert_close(l2, expected)
    rms = normalize_tangent(g, norm="rms", c=c).flatten(1).square().mean(dim=1).sqrt()
    size = g.flatten(1).norm(dim=1) / math.sqrt(32)
    torch.testing.assert_close(rms, size / (size + c))


def config(**changes) -> TrainConfig:
    base = {"objective": "scd", "teacher": "teacher", "network": tiny(num_classes=3)}
    return TrainConfig.from_settings({**base, **changes})


def transcription(net, teacher, logvar, b, *, r, c=0.1):
    """Algorithm 1 line by line; df/dt from the definition (Eq. 6) with the unscaled JVP, in float64."""
    D = b.x_0[0].numel()
    t = b.t.view(-1, 1, 1, 1)
    x_t = t.cos() * b.x_0 + t.sin() * b.z
    with torch.no_grad():
        dxdt = SD * teacher(x_t / SD, b.t, b.class_labels)
        F_minus, dF_dt = torch.func.jvp(  # pyright: ignore[reportAssignmentType]
            lambda x, time: net(x, time, b.class_labels), (x_t / SD, b.t), (dxdt / SD, torch.ones_like(b.t))
        )
        df_dt = -t.cos() * (SD * F_minus - dxdt) - r * t.sin() * (x_t + SD * dF_dt)
        # CM gradient weight: w(t) sigma_d sin(t), with w(t) = 1 / (sigma_d tan t), is cos(t).
        g = (1 / (SD * t.tan())) * SD * t.sin() * df_dt
        g = torch.stack([one / (one.norm() + c) for one in g])
    F = net(x_t / SD, b.t, b.class_labels)
    w = -logvar(b.t)
    per_sample = w.exp() / D * (F - F_minus - g).flatten(1).norm(dim=1) ** 2 - w
    return per_sample.mean()


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_one_scd_step_equals_the_transcription(network, r):
    teacher = UNet(tiny(num_classes=3)).double().eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype) * 0.1)
    logvar = LogVariance().double()
    with torch.no_grad():
        logvar.linear.weight.normal_(std=0.1)
    b, parameters = make_batch(), [*network.parameters(), *logvar.parameters()]

    loss, _ = consistency_loss(network, teacher, logvar, b, config(), r)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected_loss = transcription(network, teacher, logvar, b, r=r)
    expected = torch.autograd.grad(expected_loss, parameters, allow_unused=True)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for a, e in zip(found, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def gradient(network, b, run, teacher=None, r=1.0):
    parameters = [p for p in network.parameters() if p.requires_grad]
    loss, _ = consistency_loss(network, teacher, None, b, run, r)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_the_three_ways_to_the_tangent_agree(network):
    b = make_batch()
    one, two, fd = (gradient(network, b, config(tangent_mode=mode, tangent_step=1e-4), r=0.7) for mode in MODES)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)
    assert (fd - two).norm() < 1e-6 * two.norm()


def test_finite_differences_in_float32_are_good_to_about_a_hundredth(network):
    """The default step balances rounding and truncation; at t near pi/2 the weight of dF/dt is smallest."""
    b = make_batch()
    x_t, dxdt = b.x_0, b.z

    def bound(x, t):
        return network(x, t, b.class_labels)

    with torch.no_grad():
        exact = scaled_jvp(bound, x_t, b.t, dxdt, sigma_data=SD)[1]
        network.float()
        try:
            single = [value.float() for value in (x_t, b.t, dxdt)]
            found = scaled_difference(bound, *single, sigma_data=SD, step=config().tangent.step).double()
        finally:
            network.double()
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert (error < 2e-2).all(), error


@pytest.mark.parametrize("objective", ["scd", "sct"])
def test_discrete_time_tends_to_continuous_time(network, objective):
    """No JVP is taken there, so this is the oracle for all of it: the gradients differ in proportion to the step."""
    teacher = UNet(tiny(num_classes=3)).double().eval() if objective == "scd" else None
    b = make_batch()

    def error(points):
        snapped = dataclasses.replace(b, t=grid_times(b.t, points, sigma_data=SD)[0])
        exact = gradient(network, snapped, config(), teacher, r=0.7)
        return float((gradient(network, b, config(discrete_points=points), teacher, r=0.7) - exact).norm()) / float(
            exact.norm()
        )

    coarse, fine = error(2_000), error(20_000)
    assert fine < 1e-2
    assert 7 < coarse / fine < 14


@given(t=st.floats(1e-5, math.pi / 2), count=st.integers(2, 200))
@settings(max_examples=50, deadline=None)
def test_the_grid_has_each_time_between_its_neighbors(t, count):
    times = torch.tensor([t], dtype=torch.float64)
    above, below = (float(x) for x in grid_times(times, count, sigma_data=SD))
    grid = karras_times(count, SD)
    assert above in grid and grid[grid.index(above) + 1] == below
    assert below < min(t, grid[0]) <= above


def test_clamping_in_place_of_normalization():
    g = torch.tensor([[[[-3.0, 0.5], [1.0, 9.0]]]])
    clamped = normalize_tangent(g, norm="clamp", c=0.1)
    assert clamped.flatten().tolist() == [-1.0, 0.5, 1.0, 1.0]


def test_sct_follows_the_data(network):
    b = make_batch()
    sct, _ = consistency_loss(network, None, None, b, config(), 1.0)

    def oracle(x, t, _labels):  # a "teacher" that knows the very pair
        return (torch.cos(t).view(-1, 1, 1, 1) * b.z - torch.sin(t).view(-1, 1, 1, 1) * b.x_0) / SD

    scd, _ = consistency_loss(network, oracle, None, b, config(), 1.0)
    torch.testing.assert_close(sct, scd, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mode", "points"), [("jvp", 0), ("jvp2", 0), ("fd", 0), ("jvp2", 64)])
def test_dropout_masks_are_shared_between_the_passes(mode, points):
    """With the target's g switched off (t = 0), F - F- is zero only if both passes drop the same."""
    torch.manual_seed(0)
    net = UNet(msgspec.structs.replace(tiny(), dropout=0.5))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    net.train()
    b = dataclasses.replace(make_batch(dtype=torch.float32), class_labels=None)
    g_only = TrainConfig(
        objective="sct", init_from="x", network=tiny(), dropout=0.5, tangent=TangentConfig(c=1e12, mode=mode)
    )
    _, residual = consistency_loss(net, None, None, b, g_only, 1.0)
    assert float(residual) < 1e-10
    free = g_only.with_settings({"tangent_c": 0.1, "discrete_points": points})
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(float(consistency_loss(net, None, None, b, free, 1.0)[1]))
    assert runs[0] == runs[1] and math.isfinite(runs[0])


def test_diffusion_loss_is_zero_for_the_true_velocity():
    b = make_batch()

    def oracle(x, t, _labels):
        return (torch.cos(t).view(-1, 1, 1, 1) * b.z - torch.sin(t).view(-1, 1, 1, 1) * b.x_0) / SD

    loss, residual = diffusion_loss(oracle, None, b, sigma_data=SD)
    assert float(loss) < 1e-30 and float(residual) < 1e-30


def test_adaptive_weight_has_its_optimum_at_the_residual():
    """At the optimum e^w = 1 / mean square: the loss is stationary there."""
    logvar = LogVariance().double()
    with torch.no_grad():
        logvar.linear.bias.fill_(math.log(0.37))
    residual = torch.full((4, 1, 8, 8), math.sqrt(0.37), dtype=torch.float64)
    loss, _ = weighted_residual(residual, logvar(torch.linspace(0.1, 1.5, 4, dtype=torch.float64)))
    (grad,) = torch.autograd.grad(loss, [logvar.linear.bias])
    assert abs(float(grad)) < 1e-12
