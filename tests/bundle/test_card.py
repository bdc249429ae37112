"""The card says what is on record, and names from elsewhere stay text."""

import contextlib
import json

import pytest
import yaml
from click.testing import CliRunner

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.card import CARD_PATH, generated_for, model_card
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import ParityRecord
from scm_sdk.bundle.scores import SCORES_PATH
from scm_sdk.bundle.status import ModelStatus
from scm_sdk.export.cli import main
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


def edit_card(path, text):
    """Put a card of one's own into a bundle, as the SDK's user can: through a draft."""
    with extend_bundle(path) as draft:
        draft.path(CARD_PATH).write_bytes(text)


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("CC0-1.0", {"license": "cc0-1.0"}),
        ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("my own\nlicense: mit", {"license": "other", "license_name": "my own\nlicense: mit"}),
        ("a\u202e<script>", {"license": "other", "license_name": "a\u202e<script>"}),
        ("", {"license": "other"}),
        ("other", {"license": "other"}),
    ],
)
def test_the_license(license, expected):
    card = model_card("toy", SPECS, {"license": license})
    found = head(card)
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected
    assert ("Non-commercial" in card) == ("NC" in license)
    assert ("None is on record" in card) == (license in ("", "other"))
    assert "\u202e" not in card and "<script>" not in card


def test_usage_fits_the_sampler():
    card = model_card("toy", SPECS, {}, where="me/toy")
    assert 'Generator.from_pretrained("me/toy")' in card
    assert "gen(num_images=4, class_labels='cat', seed=0).images" in card
    assert "1 or 2 network calls" in card
    assert "path/to/this/folder" in model_card("toy", SPECS, {})
    audio = model_card("hum", [SamplerSpec(times=(1.5,), sample_shape=(1, 64))], {})
    assert 'gen(num_images=4, seed=0, output_type="raw")' in audio
    assert "pipeline_tag" not in head(audio)


def test_names_stay_in_their_place():
    card = model_card("<script>|\n# x", SPECS, {"data | x": "a\n---\nlicense: mit | <b>", "license": "MIT"})
    assert head(card)["license"] == "mit"
    assert card.count("\n---\n") == 1 and "<script>" not in card and "<b>" not in card
    assert "\n| data \\| x | a --- license: mit \\| &lt;b> |\n" in card
    card = model_card("![x](http://x) [x](http://x)\x1b[2J", SPECS, {})
    assert "\n# !\\[x](http://x) \\[x](http://x) \\[2J\n" in card


def test_a_card_tells_what_was_measured_since(bundle_copy):
    before = Bundle.open(bundle_copy).with_parity(RECORD).with_budgets("p95=25ms@b1")
    with extend_bundle(bundle_copy) as draft:
        draft.path(SCORES_PATH).write_text(json.dumps([SCORE]), encoding="utf-8")
    opened = Bundle.open(bundle_copy).with_card(where="hf:me/toy")
    card = (bundle_copy / "README.md").read_text("utf-8")
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
    card = (bundle_copy / "README.md").read_text("utf-8")
    assert "(FAILED) (loosened: it had to be)" in card and "not compared" in card
    assert "| denoiser | safetensors | fp32 | any | the reference |" in card


# What the model is


TEACHER = {"objective": "diffusion", "iteration": "20", "num_iterations": "60"}


def test_a_teacher_is_not_called_a_consistency_model():
    card = model_card("toy", SPECS, TEACHER)
    assert "A TrigFlow diffusion model" in card and "not a consistency model" in card
    assert "A continuous-time consistency model" not in card and "becomes a sample in" not in card
    assert "training is unfinished: 20 of 60 iterations" in card
    assert "consistency-model" not in head(card)["tags"]


def test_an_objective_that_is_not_on_record_is_not_made_up():
    card = model_card("toy", SPECS, {})
    assert "training objective is not on record" in card and "A continuous-time consistency model" not in card


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({"objective": "scd"}, "A continuous-time consistency model (sCM"),
        (
            {"objective": "scd+vsd"},
            "from a diffusion model, with variational score distillation (VSD)",
        ),
        ({"objective": "sct", "discrete_points": "1024"}, "A discrete-time consistency model (sCM"),
        ({"objective": "cd"}, "A consistency model, distilled from a diffusion model in discrete time"),
        (
            {"objective": "trajectory+vsd"},
            "onto the ends of a diffusion model's trajectories, with variational",
        ),
        ({"objective": "vsd"}, "score distillation (VSD) alone"),
        ({"objective": "my own"}, "A consistency model, objective 'my own'"),
    ],
)
def test_a_card_calls_a_model_what_its_objective_made(provenance, expected):
    card = model_card("toy", SPECS, provenance)
    assert expected in card
    assert ("continuous-time" in card) == (provenance["objective"].partition("+")[0] == "scd")
    assert ("scm" in head(card)["tags"]) == (provenance["objective"].partition("+")[0] in ("scd", "sct"))


def test_every_objective_has_its_words():
    from typing import get_args

    from scm_sdk.train.config import Objective

    for objective in get_args(Objective):
        assert "objective '" not in ModelStatus.of({"objective": objective}).describe("2"), objective


def test_the_card_of_the_shipped_model_says_what_it_is():
    from importlib.resources import files

    config = json.loads((files("scm_sdk.assets") / "avatars" / "config.json").read_text("utf-8"))
    card = model_card("avatars", SPECS, config["provenance"])
    assert "continuous-time" not in card and "diffusion model's trajectories, with variational" in card
    assert "2700, 6500, 2800 and 512 iterations" in card and "not on record" not in card


@pytest.mark.parametrize("quality", [[], [SCORE]])
def test_quality_is_said_to_be_measured_only_where_it_was(quality):
    card = model_card("toy", SPECS, {"objective": "scd"}, quality=quality)
    assert "A continuous-time consistency model" in card and "**Warning:**" not in card
    assert ("| quality | measured |" in card) == bool(quality)
    assert ("| quality | not measured |" in card) == ("Not measured." in card) == (not quality)


# A generated card follows the bundle; an edited one stays


def test_a_card_is_fresh_after_each_change(bundle_copy):
    opened = Bundle.open(bundle_copy).with_card().with_parity(RECORD)
    card = bundle_copy / "README.md"
    assert "onnxruntime: 2.0e-05 of 1.0e-04 allowed" in card.read_text("utf-8")
    opened.with_budgets("p95=25ms@b1")
    assert "`p95=25ms@b1`" in card.read_text("utf-8")
    with extend_bundle(bundle_copy) as draft:
        draft.path(SCORES_PATH).write_text(json.dumps([SCORE]), encoding="utf-8")
    assert "FD-EffLite0@96 12.5" in card.read_text("utf-8") and "| quality | measured |" in card.read_text("utf-8")
    Bundle.open(bundle_copy).verify()


def test_a_place_that_a_card_names_is_kept(bundle_copy):
    Bundle.open(bundle_copy).with_card(where="hf:me/toy").with_parity(RECORD)
    assert 'from_pretrained("hf:me/toy")' in (bundle_copy / "README.md").read_text("utf-8")


@pytest.mark.parametrize("edit", [lambda text: b"# Mine\n", lambda text: text.replace(b"## Usage", b"## How")])
def test_an_edited_card_stays(bundle_copy, edit):
    Bundle.open(bundle_copy).with_card()
    text = edit((bundle_copy / "README.md").read_bytes())
    assert generated_for(text) is None
    edit_card(bundle_copy, text)
    Bundle.open(bundle_copy).with_parity(RECORD).with_budgets("p95=25ms@b1")
    assert (bundle_copy / "README.md").read_bytes() == text
    assert CliRunner().invoke(main, ["bundle", "card", str(bundle_copy)]).exit_code == 0
    card = (bundle_copy / "README.md").read_bytes()
    assert b"`p95=25ms@b1`" in card and generated_for(card) == ""
    Bundle.open(bundle_copy).verify()


@pytest.mark.parametrize("place", ["", "hf:me/toy", "C:\\x y", "--> <script>", "ü"])
def test_a_generated_card_is_recognized(place):
    assert generated_for(model_card("toy", SPECS, {}, where=place).encode()) == place


def test_a_change_that_is_cut_short_leaves_a_whole_bundle(bundle_copy, monkeypatch):
    """At each of the three writes the bundle verifies, with the old card, without one, or with the new one."""
    from scm_sdk.bundle import bundle as module

    write, left = module.atomic_write_bytes, 0

    def write_some(path, data, **options):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        write(path, data, **options)

    Bundle.open(bundle_copy).with_card()
    monkeypatch.setattr(module, "atomic_write_bytes", write_some)
    for number in range(4):
        left = number
        with contextlib.suppress(KeyboardInterrupt):
            Bundle.open(bundle_copy).with_budgets(f"p95={number + 1}ms@b1")
        Bundle.open(bundle_copy).verify()
    assert "p95=4ms@b1" in (bundle_copy / "README.md").read_text("utf-8")
