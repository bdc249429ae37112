"""A decoder stage: latents of any autoencoder to pixels, inside the one sampler graph and apart from it."""

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm_sdk.errors import ConfigError, ShapeError
from scm_sdk.export.graph.compose import compose_sampler
from scm_sdk.export.graph.decoder import write_decoder
from scm_sdk.export.graph.io import write_model
from scm_sdk.export.graph.network import NetworkGraph, export_network
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.decoder import Decoder, LatentScale, sd_vae_ft_mse
from scm_sdk.model.networks.presets import tiny
from scm_sdk.model.sampler import Sampler
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec

TAEF2 = "SCM_TAEF2"
"""Environment variable with the folder of taef2_encoder.safetensors and taef2_decoder.safetensors."""
SCALE = LatentScale(scale=(2.0, 0.5), shift=(0.25, -1.0))


class Autoencoder(nn.Module):
    """8x8 gray pictures to 2x4x4 latents and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 2, 3, 1, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(2, 16, 3, 1, 1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 3, 1, 1)
        )


@pytest.fixture(scope="module")
def trained() -> tuple[Autoencoder, Tensor]:
    """An autoencoder that has learnt smooth pictures, and such pictures."""
    torch.manual_seed(0)
    coarse = torch.rand(64, 1, 3, 3) * 2 - 1
    pictures = nn.functional.interpolate(coarse, size=8, mode="bilinear", align_corners=True)
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = (model.decoder(model.encoder(pictures)) - pictures).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    return model.eval().requires_grad_(False), pictures


@pytest.fixture(scope="module")
def latent_model(trained: tuple[Autoencoder, Tensor]) -> ConsistencyModel:
    """A consistency model of its latents, untrained, with the decoder behind it."""
    autoencoder, _ = trained
    network = tiny(image_size=4, in_channels=2)
    decoder = Decoder(autoencoder.decoder, SCALE, (1, 8, 8))
    model = ConsistencyModel(ModelConfig(network=network, output="latents"), decoder=decoder)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network(latent_model: ConsistencyModel) -> NetworkGraph:
    return export_network(latent_model)


def run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images: np.ndarray = session.run(None, feeds)[0]
    return images


def feeds(spec: SamplerSpec, batch: int) -> dict[str, np.ndarray]:
    return {t.name: noise for t, noise in zip(spec.noise_inputs, draw_noise(spec, range(batch)), strict=True)}


def test_training_data_comes_back_as_pictures(trained: tuple[Autoencoder, Tensor]) -> None:
    """What a latent model is trained on, decoded: the pictures, as well as the autoencoder can."""
    autoencoder, pictures = trained
    latents = autoencoder.encoder(pictures)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    decoder = Decoder(autoencoder.decoder, LatentScale.of_data(mean.tolist(), std.tolist(), sigma_data=0.5), (1, 8, 8))
    x_0 = decoder.from_latents(latents)
    torch.testing.assert_close(x_0.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x_0.std(dim=(0, 2, 3)), torch.full((2,), 0.5))
    torch.testing.assert_close(decoder(x_0), autoencoder.decoder(latents), atol=1e-5, rtol=1e-5)
    assert (decoder(x_0) - pictures).square().mean() < 0.02


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(-5, 5)), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_latents_go_there_and_back(numbers: list[tuple[float, float]], seed: int) -> None:
    scale, shift = zip(*numbers, strict=True)
    decoder = Decoder(nn.Identity(), LatentScale(scale=scale, shift=shift), (len(scale), 2, 2)).double()
    x_0 = torch.randn(2, len(scale), 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(decoder.from_latents(decoder(x_0)), x_0, atol=1e-6, rtol=1e-6)


def test_the_preset_holds_the_papers_numbers() -> None:
    preset = sd_vae_ft_mse()
    assert preset.scale == (10.54, 11.82, 8.42, 8.62) and preset.shift == (1.56, -0.695, 0.483, 0.729)
    decoder = Decoder(nn.Identity(), preset, (4, 64, 64))
    latents = torch.tensor([1.56 + 5.27, -0.695, 0.483 - 4.21, 0.729]).reshape(1, 4, 1, 1).expand(1, 4, 64, 64)
    wanted = torch.tensor([0.5, 0, -0.5, 0]).reshape(1, 4, 1, 1).expand(1, 4, 64, 64)
    torch.testing.assert_close(decoder.from_latents(latents), wanted)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_graph_ends_with_the_decoder(
    latent_model: ConsistencyModel, network: NetworkGraph, tmp_path: Path, steps: int
) -> None:
    spec = latent_model.spec(steps, max_batch=3)
    assert (spec.output, spec.image_shape, spec.sample_shape) == ("pixels", (1, 8, 8), (2, 4, 4))
    write_model(compose_sampler(network, spec), tmp_path / "model.onnx")
    given_ = feeds(spec, 3)
    with torch.no_grad():
        wanted = Sampler(latent_model, spec)(*map(torch.from_numpy, given_.values())).numpy()
    found = run(tmp_path / "model.onnx", given_)
    assert found.shape == (3, 1, 8, 8) and wanted.std() > 0.01
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_latents_and_a_decoder_apart_make_the_same(
    latent_model: ConsistencyModel, network: NetworkGraph, tmp_path: Path
) -> None:
    spec = latent_model.spec(2, max_batch=3)
    apart = msgspec.structs.replace(spec, output="latents", output_shape=())
    write_model(compose_sampler(network, apart), tmp_path / "latents.onnx")
    write_model(compose_sampler(network, spec), tmp_path / "whole.onnx")
    assert network.decoder is not None
    write_decoder(network.decoder, tmp_path / "decoder.onnx")
    given_ = feeds(spec, 3)
    latents = run(tmp_path / "latents.onnx", given_)
    with torch.no_grad():
        x_0 = Sampler(latent_model, apart)(*map(torch.from_numpy, given_.values())).numpy()
    assert latents.shape == (3, 2, 4, 4)
    np.testing.assert_allclose(latents, x_0, atol=1e-5)
    images = run(tmp_path / "decoder.onnx", {"latents": latents})
    np.testing.assert_allclose(images, run(tmp_path / "whole.onnx", given_), atol=1e-6)


def test_a_spec_without_the_decoder_says_latents(latent_model: ConsistencyModel) -> None:
    bare = ConsistencyModel(latent_model.config, latent_model.network)
    assert bare.spec(1).output == "latents" and bare.spec(1).image_shape == (2, 4, 4)


def test_a_spec_of_another_picture_is_refused(latent_model: ConsistencyModel, network: NetworkGraph) -> None:
    wrong = msgspec.structs.replace(latent_model.spec(1), output_shape=(3, 8, 8))
    with pytest.raises(ConfigError, match=r"output_shape \(3, 8, 8\), expected \(1, 8, 8\)"):
        compose_sampler(network, wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (), "shift": ()}, "expected finite numbers, as many of each"),
        ({"scale": (1.0,), "shift": (1.0, 2.0)}, "as many of each"),
        ({"scale": (float("nan"),), "shift": (0.0,)}, "expected finite numbers"),
        ({"scale": (1.0, 0.0), "shift": (0.0, 0.0)}, "expected none of them 0"),
    ],
)
def test_scales_that_cannot_be_undone_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatentScale(**changes)


def test_wrong_shapes_are_refused() -> None:
    decoder = Decoder(nn.Upsample(scale_factor=2), SCALE, (2, 4, 4))
    with pytest.raises(ShapeError, match="x_0 has 3 channels, expected 2"):
        decoder(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ShapeError, match=r"latents of \(2, 4, 4\) into \(2, 8, 8\)"):
        decoder(torch.zeros(1, 2, 4, 4))


class Block(nn.Module):
    """A residual block of TAEF2; some have a normalized side path."""

    def __init__(self, n: int, pool: bool) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.conv = nn.Sequential(conv(n), relu, conv(n), relu, conv(n))
        self.pool = (
            nn.Sequential(
                nn.Conv2d(n, 4 * n, 1, bias=False),
                nn.GroupNorm(4, 4 * n),
                nn.ReLU(),
                nn.Conv2d(4 * n, n, 1, bias=False),
            )
            if pool
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def conv(n: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n, n, 3, stride, 1, bias=bias)


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def taef2(folder: Path) -> tuple[nn.Module, nn.Module]:
    """The real tiny autoencoder of FLUX.2: pictures in [0, 1] to 32 channels of an eighth of the size, and back."""
    from safetensors.torch import load_file

    encoder: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1), Block(64, False)]
    decoder: list[nn.Module] = [Squash(), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU()]
    for level in range(3):
        encoder += [conv(64, 2, False), *(Block(64, level == 2) for _ in range(3))]
        decoder += [*(Block(64, level == 0) for _ in range(3)), nn.Upsample(scale_factor=2), conv(64, bias=False)]
    encoder.append(nn.Conv2d(64, 32, 3, 1, 1))
    decoder += [Block(64, False), nn.Conv2d(64, 3, 3, 1, 1)]
    made = []
    for name, layers in (("encoder", encoder), ("decoder", decoder)):
        module = nn.Sequential(*layers).eval().requires_grad_(False)
        weights = load_file(folder / f"taef2_{name}.safetensors")
        module.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
        made.append(module)
    return made[0], made[1]


@pytest.mark.skipif(not os.environ.get(TAEF2), reason=f"{TAEF2} names no folder with the TAEF2 autoencoder")
def test_a_real_autoencoder_decodes_inside_the_graph(tmp_path: Path) -> None:
    """Real pictures through its latents and back, and the same decoder behind a sampler in ONNX."""
    encoder, decode = taef2(Path(os.environ[TAEF2]))
    assets = Path(__file__).resolve().parents[2] / "scm_sdk" / "assets" / "pixel_art_16.npz"
    pixels = np.load(assets)["images"][:4]
    pictures = nn.functional.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0, scale_factor=4)
    latents = encoder(pictures)
    assert latents.shape == (4, 32, 8, 8)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    decoder = Decoder(decode, LatentScale.of_data(mean.tolist(), std.tolist(), sigma_data=0.5), (3, 64, 64)).eval()
    error = (decoder(decoder.from_latents(latents)) - pictures).square().mean()
    assert error < 10 ** (-22 / 10), "it must know pictures: 22 dB"

    config = ModelConfig(network=tiny(image_size=8, in_channels=32), output="latents", value_range=(0.0, 1.0))
    model = ConsistencyModel(config, decoder=decoder).eval().requires_grad_(False)
    spec = model.spec(1, max_batch=2)
    write_model(compose_sampler(export_network(model), spec), tmp_path / "model.onnx")
    given_ = feeds(spec, 2)
    wanted = Sampler(model, spec)(*map(torch.from_numpy, given_.values())).numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", given_), wanted, atol=2e-4)
