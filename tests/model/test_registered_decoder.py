"""A latent model of your own: its decoder is stored with the checkpoint, or refused before a bundle is written."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.latent_models import Pictures, latent_model
from scm_sdk.errors import ConfigError, IntegrityError
from scm_sdk.export.bundle_export import export_bundle
from scm_sdk.export.diagnose.validate import validate_bundle
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.decoder import DECODERS


@pytest.mark.usefixtures("exported_once")
def test_bundle_of_a_latent_model_is_validated_and_runs_in_torch(tmp_path) -> None:
    model = latent_model()
    export_bundle(model, tmp_path / "bundle", steps=(1,), max_batch=2)
    parities = validate_bundle(tmp_path / "bundle", backends=["onnxruntime", "torch"], num_seeds=4)
    assert parities and all(parities)
    images = {}
    for backend in ("torch", "onnxruntime"):
        with Generator.from_pretrained(tmp_path / "bundle", backend=backend, verify="full") as gen:
            images[backend] = gen(2, seed=1, num_inference_steps=1, output_type="raw").images
    assert images["torch"].shape == (2, 3, 8, 8)
    np.testing.assert_allclose(images["torch"], images["onnxruntime"], rtol=0, atol=1e-5)
    again = ConsistencyModel.from_pretrained(tmp_path / "bundle")
    assert again.decoder is not None and again.decoder.config == model.decoder.config
    x_0 = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(again.decoder(x_0), model.decoder(x_0), rtol=0, atol=0)


def test_checkpoint_folder_opens_with_its_decoder(tmp_path, monkeypatch) -> None:
    latent_model().save_pretrained(tmp_path)
    with Generator.from_pretrained(tmp_path, backend="torch") as gen:
        assert gen(1, seed=0, num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)
    monkeypatch.delitem(DECODERS.factories, "tests/pictures")
    with pytest.raises(ConfigError, match=r"decoder is 'tests/pictures'.*register_decoder"):
        ConsistencyModel.from_pretrained(tmp_path)
    given = ConsistencyModel.from_pretrained(tmp_path, decoder=Pictures(4))
    assert given.decoder is not None and given.spec(1).image_shape == (3, 8, 8)
    with pytest.raises(IntegrityError, match=r"decoder.*tensors differ.*different decoders"):
        ConsistencyModel.from_pretrained(tmp_path, decoder=Pictures(5))


class Unknown(Pictures):
    """Registered nowhere."""


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (Unknown(4), {"width": 4}, r"decoder 'Unknown' .* cannot be opened again .*register_decoder\('Unknown'\)"),
        (Pictures(4), {}, r"decoder 'tests/pictures' .* cannot be opened again .*tensors differ.*arguments"),
        (Pictures(4), {"depth": 2}, r"decoder 'tests/pictures' .* cannot be opened again .*cannot be made with"),
    ],
)
def test_decoder_that_a_bundle_cannot_open_again_is_refused(tmp_path, module, arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        export_bundle(latent_model(module, arguments=arguments), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_network_that_a_bundle_cannot_open_again_is_refused(tmp_path) -> None:
    class Scale(nn.Module):
        def forward(self, x, t):
            return x * t[:, None]

    model = ConsistencyModel(network=Scale(), sigma_data=0.5, sample_shape=(4,)).eval()
    with pytest.raises(ConfigError, match=r"network '.*Scale' .* cannot be opened again .*register_network"):
        export_bundle(model, tmp_path / "bundle")
