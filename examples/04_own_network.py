"""Your own network, of any rank, from training to an engine: sound (1-D) and video (3-D).

python examples/04_own_network.py runs/own sound    # what a network must be: scm_sdk/model/networks/custom.py
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from scm_sdk import (
    BackendUnavailable,
    ConsistencyModel,
    Generator,
    add_engines,
    check_model,
    export_bundle,
    register_network,
    validate,
)
from scm_sdk.model import PositionalEmbedding
from scm_sdk.train import Batch, TangentConfig, TrainConfig, consistency_loss, sample_times

SHAPES = {"sound": (1, 64), "video": (2, 4, 8, 8)}  # (C, samples) and (C, frames, height, width)


@register_network("example/waves")
class Waves(nn.Module):
    """F(x, t): three convolutions along as many axes as the samples have."""

    def __init__(self, channels: int, axes: int, width: int = 16) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.time = nn.Sequential(PositionalEmbedding(width, max_period=10.0), nn.Linear(width, width))
        sizes = ((channels, width), (width, width), (width, channels))
        self.first, self.middle, self.last = (conv(*size, 3, padding=1) for size in sizes)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return F, like x."""
        h = nn.functional.silu(self.first(x)) + self.time(t).reshape(x.shape[0], -1, *[1] * (x.ndim - 2))
        out: Tensor = self.last(nn.functional.silu(h + self.middle(h)))
        return out


def main(out: Path, kind: str, iterations: int = 20) -> None:
    """Train, check, export, validate, run and build one kind."""
    shape = SHAPES[kind]
    size = {"channels": shape[0], "axes": len(shape) - 1}
    model = ConsistencyModel(network=Waves(**size), arguments=size, sigma_data=0.5, sample_shape=shape)
    config = TrainConfig(objective="sct", network=model.config.network, tangent=TangentConfig(norm="rms"))
    optimizer, draw = torch.optim.RAdam(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for i in range(iterations):
        phase = torch.rand((16, *[1] * len(shape)), generator=draw) * 6.28
        x_0 = 0.7 * torch.sin(phase + torch.arange(shape[-1]) / 4).expand(16, *shape)  # deviation 0.5
        z = 0.5 * torch.randn(x_0.shape, generator=draw)
        batch = Batch(x_0=x_0, z=z, t=sample_times(16, config.noise, draw, sigma_data=0.5), class_labels=None)
        loss, _ = consistency_loss(model.network, None, None, batch, config, warmup=i / iterations)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    check_model(model.eval().requires_grad_(False))  # names what is wrong, and where
    export_bundle(model, out / kind, max_batch=4, overwrite=True)
    for parity in validate(out / kind):
        parity.raise_if_failed()
    with Generator.from_pretrained(out / kind, backend="onnxruntime") as gen:
        samples = gen(num_images=3, seed=0, output_type="raw").images
        print(f"{kind}: {samples.shape} from {gen.opened().row.artifact}, deviation {samples.std():.2f}")
    try:
        (engine,) = add_engines(out / kind, ["a10"], precisions=["fp32"], steps=[1])
        print(f"{kind}: {engine.path}, built without a GPU")
    except BackendUnavailable as exc:
        print(exc)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/own"), help="default: %(default)s")
    parser.add_argument("kind", nargs="?", choices=SHAPES, help="both when absent")
    arguments = parser.parse_args()
    for each in [arguments.kind] if arguments.kind else SHAPES:
        main(arguments.out, each)
