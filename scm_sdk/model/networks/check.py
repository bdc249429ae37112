"""Check that a module satisfies the ``Network`` protocol; the error names the first violation and its line.

``scm_sdk.export.check.check_model`` also checks the requirements of a graph.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ..consistency import ConsistencyModel

TIMES = (0.4, 1.3)
"""Times of the test samples, radians."""
ALONE = 1e-3
"""Largest difference of a sample between batch size 1 and a batch, relative to the largest output."""
STEPS, DERIVATIVE = (1e-2, 1e-3, 1e-4), 0.05
"""Steps of the finite differences, radians; one must agree with the derivative to this relative error."""


def check_network(model: ConsistencyModel, *, training: bool = True) -> None:
    """Run the network of a model on two samples and check its output.

    Args:
        model: A float32 model; its mode is not changed.
        training: Also check the requirements of continuous-time distillation: gradients and forward-mode derivatives
            with respect to the time. Inference does not need them.

    Raises:
        ShapeError: If F has another shape or dtype than x.
        ConfigError: If the network fails, draws random numbers, mixes samples, returns NaN or infinity, or has wrong
            derivatives with respect to x and t.
    """
    network, was_training = model.network, model.network.training
    name = type(network).__name__
    x, t, given = _example(model)
    network.eval()
    try:
        with torch.no_grad():
            F = _output(network, name, x, t, given)
            _check_samples(network, name, F, x, t, given)
        if training:
            _check_gradient(network, name, x, t, given)
            _check_derivative(network, name, F, x, t, given)
    finally:
        network.train(was_training)


def _example(model: ConsistencyModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    spec = model.spec(1)
    device = next((p.device for p in model.network.parameters()), torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    given: dict[str, Tensor] = {}
    for tensor in spec.conditioning_inputs:
        shape = (len(TIMES), *tensor.shape)
        if tensor.dtype == "float32":
            given[tensor.name] = torch.randn(shape, generator=draw).to(device)
        else:
            given[tensor.name] = torch.full(shape, int(tensor.kind == "mask"), device=device)
    if spec.num_classes:
        given["class_labels"] = torch.tensor([0, spec.num_classes - 1], device=device)
    if model.config.flow_map:
        given["r"] = torch.tensor(TIMES, device=device) / 2
    x = torch.randn((len(TIMES), *spec.sample_shape), generator=draw).to(device)
    return x, torch.tensor(TIMES, device=device), given


def _output(network: nn.Module, name: str, x: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    arguments = ", ".join(["x", "t", *(f"{key}={key}" for key in given)])
    with _named(f"{name}({arguments}) fails", "Expected F; run it manually on such inputs to see more."):
        F = network(x, t, **given)
    if not isinstance(F, Tensor) or F.shape != x.shape or F.dtype != x.dtype:
        found = f"{tuple(F.shape)} {F.dtype}" if isinstance(F, Tensor) else type(F).__name__
        raise ShapeError(
            f"{name} returned {found} for x of {tuple(x.shape)} {x.dtype}, expected F to be like x. What else it "
            "returns must be left out of forward()."
        )
    if not F.isfinite().all():
        raise ConfigError(f"{name} returned NaN or infinity for standard normal x, expected finite numbers.")
    return F


def _check_samples(network: nn.Module, name: str, F: Tensor, x: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> None:
    if not torch.equal(network(x, t, **given), F):
        raise ConfigError(
            f"{name} gave another F for the same inputs in evaluation mode, expected the same: noise is an input of "
            "the sampler, nothing is drawn inside."
        )
    with _named(f"{name} fails on one sample", "Expected any batch size; take the batch from x.shape[0]."):
        alone = network(x[:1], t[:1], **{key: value[:1] for key, value in given.items()})
    gap = float((alone - F[:1]).abs().max())
    if not gap <= ALONE * float(F.abs().max()):
        raise ConfigError(
            f"{name} gives a sample another F alone than in a batch (by {gap:.1e}), expected each sample on its own: "
            "no norm or attention over the batch axis."
        )


def _check_gradient(network: nn.Module, name: str, x: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> None:
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    with torch.enable_grad():
        F = network(x, t, **given)
        found = torch.autograd.grad(F.sum(), (x, t), allow_unused=True) if F.requires_grad else (None, None)
    for what, gradient in zip(("x", "t"), found, strict=True):
        if gradient is None:
            raise ConfigError(
                f"{name} has no gradient through {what}, expected one: it is not used, or is detached, rounded or "
                "turned into a number on the way. Compute from the tensor itself, without detach(), item() or long()."
            )


def _check_derivative(
    network: nn.Module, name: str, F: Tensor, x: Tensor, t: Tensor, given: Mapping[str, Tensor]
) -> None:
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    one = torch.ones_like(t)

    def at(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = network(x, t, **given)
        return out

    remedy = (
        "Expected operators that have one: attention as MatMul and Softmax or under sdpa_kernel(SDPBackend.MATH), no "
        "in-place writes; custom functions need setup_context and jvp."
    )
    with torch.no_grad():
        with _named(f"{name} has no forward-mode derivative", remedy):
            derivative = torch.func.jvp(at, (x, t), (v, one))[1]
        size = max(float(derivative.norm()), 1e-2 * float(F.norm()), torch.finfo(F.dtype).tiny)
        shares = [
            float(((at(x + e * v, t + e * one) - at(x - e * v, t - e * one)) / (2 * e) - derivative).norm()) / size
            for e in STEPS
        ]
    if not min(shares) <= DERIVATIVE:
        raise ConfigError(
            f"{name}'s forward-mode derivative is {min(shares):.0%} off finite differences, expected at most "
            f"{DERIVATIVE:.0%}: x or t is detached on one of its ways, or a custom function's jvp is wrong."
        )


@contextmanager
def _named(subject: str, remedy: str) -> Iterator[None]:
    """Convert any exception of the network to one line that names its source line."""
    try:
        yield
    except Warning:  # raised if warnings are errors: not a fault of the network
        raise
    except Exception as exc:  # a network may raise anything
        library = str(Path(torch.__file__).parent)
        frames = [
            f for f in traceback.extract_tb(exc.__traceback__) if not f.filename.startswith((library, __file__, "<"))
        ]
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        found = str(exc).strip().split("\n")[0] or type(exc).__name__
        raise ConfigError(f"{subject}{place}: {found}. {remedy}") from exc
