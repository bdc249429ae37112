"""The card says what is on record, and names from elsewhere stay text."""

import json

import pytest
import yaml
from click.testing import CliRunner

from scm_sdk.bundle import Bundle
from scm_sdk.card import model_card
from scm_sdk.export.card import refresh_card
from scm_sdk.export.cli import main
from scm_sdk.extend import extend_bundle
from scm_sdk.manifest import ParityRecord
from scm_sdk.report.quality import QUALITY_PATH
from scm_sdk.spec import SamplerSpec, default_times

SPECS = tuple(
    SamplerSpec(times=default_times(n), sample_shape=(3, 8, 8), num_classes=2, class_names=("cat", "dog"))
    for n in (1, 2)
)
RECORD = ParityRecord(
    artifact="onnx/fp32/2step/model.onnx", reference="denoiser", backend="onnxruntime", threshold=1e-4,
    noise_floor=1e-5, max_abs=2e-5, num_samples=32, passed=True,
)  # fmt: skip
SCORE = {
    "sampler": "2 steps", "network_calls": 2,
    "quality": {"metric": "FD-EffLite0@96", "fd": 12.5, "kid": 0.001, "precision": None, "num_generated": 64},
}  # fmt: skip


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CC0-1.0", {"license": "cc0-1.0"}),
        ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("my own\nlicense: mit", {"license": "other", "license_name": "my own\nlicense: mit"}),
        ("", {"license": "other"}),
        ("other", {"license": "other"}),
    ],
)
def test_the_licence(licence, expected):
    card = model_card("toy", SPECS, {"license": licence})
    found = head(card)
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected
    assert ("Non-commercial" in card) == ("NC" in licence)
    assert ("None is on record" in card) == (licence in ("", "other"))


def test_usage_fits_the_sampler():
    card = model_card("toy", SPECS, {}, where="me/toy")
    assert 'Generator.from_pretrained("me/toy")' in card
    assert "gen(num_images=4, class_labels='cat', seed=0).images" in card
    assert "1 or 2 network calls" in card
    audio = model_card("hum", [SamplerSpec(times=(1.5,), sample_shape=(1, 64))], {})
    assert 'gen(num_images=4, seed=0, output_type="raw")' in audio
    assert "pipeline_tag" not in head(audio)


def test_names_stay_in_their_place():
    card = model_card("<script>|\n# x", SPECS, {"data | x": "a\n---\nlicense: mit | <b>", "license": "MIT"})
    assert head(card)["license"] == "mit"
    assert card.count("\n---\n") == 1 and "<script>" not in card and "<b>" not in card
    assert "\n| data \\| x | a --- license: mit \\| &lt;b> |\n" in card


def test_a_card_tells_what_was_measured_since(bundle_copy):
    before = Bundle.open(bundle_copy).with_parity(RECORD).with_budgets("p95=25ms@b1")
    with extend_bundle(bundle_copy) as draft:
        draft.path(QUALITY_PATH).write_text(json.dumps([SCORE]))
    opened = refresh_card(bundle_copy, where="me/toy")
    card = (bundle_copy / "README.md").read_text()
    assert "onnxruntime: 2.0e-05 of 1.0e-04 allowed" in card
    assert "p95=25ms@b1" in card and "FD-EffLite0@96 12.5" in card
    metrics = head(card)["model-index"][0]["results"][0]["metrics"]
    assert metrics[0] == {"type": "FD-EffLite0@96", "value": 12.5, "name": "FD-EffLite0@96, 2 steps"}
    assert opened.manifest.build_id == before.manifest.build_id
    assert opened.manifest.parity == before.manifest.parity
    Bundle.open(bundle_copy).verify()


def test_what_failed_is_not_hidden(bundle_copy):
    import msgspec

    Bundle.open(bundle_copy).with_parity(msgspec.structs.replace(RECORD, passed=False, reason="it had to be"))
    result = CliRunner().invoke(main, ["bundle", "card", str(bundle_copy)])
    assert result.exit_code == 0, result.output
    card = (bundle_copy / "README.md").read_text()
    assert "(FAILED) (loosened: it had to be)" in card and "not compared" in card
    assert "| denoiser | safetensors | fp32 | any | the reference |" in card
