"""Networks that cannot be exported: one line that names the fault and the line of the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scm_sdk.errors import ExportError, ShapeError, UnsupportedGraphError
from scm_sdk.export.graph.network import compose_sampler, export_network
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.unet import UNetConfig


class Bad(nn.Module):
    """A network with one convolution and one fault."""

    def __init__(self, fault: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.fault = fault

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> object:
        return self.fault(self.conv(x), t)  # MARK forward


def _at(marker: str) -> str:
    """Return ``file:line`` of the line of this file that holds ``marker``, as a pattern."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return rf"{Path(__file__).name}:{next(i for i, line in enumerate(lines, 1) if marker in line)}\b"


def _branches(x: Tensor, t: Tensor) -> Tensor:
    return x if x.mean() > 0 else -x  # MARK branch


def _exotic(x: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(x)


def _composite(x: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.svd(x)[0] @ x


def _fails(x: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("out of ideas")  # MARK fails


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (_branches, ExportError, rf"cannot be traced at .*{_at('# MARK branch')}.*torch\.where"),
        (
            _exotic,
            ExportError,
            rf"{_at('# MARK forward')}: operator aten\.linalg_matrix_exp.* has no translation",
        ),
        (
            _composite,
            ExportError,
            rf"at .*{_at('# MARK forward')}: operator aten\._linalg_svd.* has no translation.*with others",
        ),
        (_fails, ExportError, rf"{_at('# MARK fails')}: out of ideas"),
        (lambda x, t: x if x.shape[0] % 2 == 0 else -x, ExportError, "any batch size"),
        (lambda x, t: x.reshape(2, 3, 8, 8).clone(), ExportError, "any batch size"),
        (
            lambda x, t: x[:, :1],
            ShapeError,
            r"Bad returned \(2, 1, 8, 8\) torch.float32 for x of \(2, 3, 8, 8\)",
        ),
        (lambda x, t: x.double(), ShapeError, r"torch.float64 .* expected F to be like x"),
        (lambda x, t: (x, t), ShapeError, "Bad returned tuple"),
        (lambda x, t: x + x[x > 0].sum(), UnsupportedGraphError, r"\(NonZero\) has an output whose size"),
        (lambda x, t: x + torch.randn_like(x), UnsupportedGraphError, "draws random numbers"),
    ],
    ids=["branch", "operator", "composite", "raises", "batch", "parity", "shape", "dtype", "tuple", "size", "random"],
)
def test_networks_that_cannot_be_exported(fault, error, message, capfd):
    model = ConsistencyModel(ModelConfig(network=UNetConfig(image_size=8)), Bad(fault)).eval()
    with pytest.raises(error, match=message) as caught:
        export_network(model)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_trigonometry_of_data_is_named():
    network = Bad(lambda x, t: (x + t[:, None, None, None]).sin())
    model = ConsistencyModel(ModelConfig(network=UNetConfig(image_size=8)), network).eval()
    with pytest.raises(UnsupportedGraphError, match=r"'step0/Sin' \(Sin\) is left"):
        compose_sampler(export_network(model), model.spec(1))


def test_mode_and_type_of_the_weights():
    config = ModelConfig(network=UNetConfig(image_size=8))
    model = ConsistencyModel(config, Bad(lambda x, t: x)).eval()
    with pytest.raises(ExportError, match="'ConsistencyModel' is in training mode"):
        export_network(ConsistencyModel(config, Bad(lambda x, t: x)))
    model.network.conv.train()
    with pytest.raises(ExportError, match=r"'network.conv' is in training mode.*model.eval\(\)"):
        export_network(model)
    with pytest.raises(ExportError, match=r"weight 'network.conv.weight' is torch.float16.*model.float\(\)"):
        export_network(model.eval().half())
