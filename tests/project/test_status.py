"""A teacher, an unfinished run and a model without scores are described as such in every output."""

import json

import pytest

from helpers.commands import run
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.status import ModelStatus
from scm_sdk.inference.generator import Generator
from scm_sdk.model.consistency import ConsistencyModel

TEACHER = {"objective": "diffusion", "iteration": "20", "num_iterations": "60"}
STUDENT = {"objective": "scd+vsd", "iteration": "60", "num_iterations": "60"}


@pytest.fixture
def checkpoint(unet_checkpoint, tmp_path):
    """Return a maker of checkpoints with a provenance."""

    def make(provenance):
        import msgspec

        model = ConsistencyModel.from_pretrained(unet_checkpoint)
        model.config = msgspec.structs.replace(model.config, provenance=provenance)
        model.save_pretrained(tmp_path / "run")
        return tmp_path / "run"

    return make


@pytest.mark.parametrize(
    ("provenance", "kind", "finished", "training"),
    [
        (TEACHER, "diffusion model", False, "20 of 60 iterations"),
        (STUDENT, "consistency model", True, "60 of 60 iterations"),
        ({"objective": "sct", "iteration": "7"}, "consistency model", None, "7 iterations"),
        ({}, "unknown", None, "length not on record"),
        (STUDENT | {"runs": "mean of 2 runs of 60 and 70 iterations"}, "consistency model", True, "mean of 2 runs"),
        ({"objective": "scd", "iteration": "many", "num_iterations": [1]}, "consistency model", None, "not on record"),
        ({"objective": "scd", "iteration": "-1", "num_iterations": "9" * 99}, "consistency model", None, "not on"),
    ],
)
def test_what_a_provenance_says(provenance, kind, finished, training):
    status = ModelStatus.of(provenance)
    assert (status.kind, status.finished) == (kind, finished) and training in status.training
    assert any("quality: not measured" in text for text in status.warnings)
    assert not any("quality" in text for text in ModelStatus.of(provenance, quality_measured=True).warnings)


def test_a_teacher_says_so_from_export_to_samples(checkpoint, tmp_path):
    folder, bundle = checkpoint(TEACHER), tmp_path / "bundle"
    expected = ("a teacher", "unfinished: 20 of 60 iterations")
    done = run("onnx", folder, "-o", bundle, "--steps", 1, "--json")
    assert all(f"{text}" in done.stderr for text in (*expected, "quality: not measured"))
    status = json.loads(done.stdout)["status"]
    assert status["kind"] == "diffusion model" and status["finished"] is False and len(status["warnings"]) == 3
    assert all(text in (bundle / "README.md").read_text("utf-8") for text in expected)
    shown = run("inspect", bundle).output.replace("\n", " ")
    assert "diffusion model, objective diffusion" in shown and "20 of 60" in shown and "quality: not measured" in shown
    assert json.loads(run("inspect", bundle, "--json").stdout)["status"] == status
    for source in (folder, bundle):
        done = run("generate", source, "-o", tmp_path / "x.png", "--num-images", 1, "--steps", 1, "--json")
        assert all(text in done.stderr for text in expected)
        assert json.loads(done.stdout)["info"]["model"]["kind"] == "diffusion model"
    again = run("all", folder, "-o", bundle, "--steps", 1, "--precision", "fp32", "--no-validate")
    assert all(text in again.stderr for text in (*expected, "quality: not measured"))


def test_a_finished_student_draws_no_warning(checkpoint, tmp_path):
    bundle = tmp_path / "bundle"
    done = run("onnx", checkpoint(STUDENT), "-o", bundle, "--steps", 1)
    assert done.stderr.count("warning:") == 1 and "quality: not measured" in done.stderr
    assert Bundle.open(bundle).status.kind == "consistency model"
    with Generator.from_pretrained(bundle, backend="onnxruntime") as gen:
        assert gen(seed=0).info.model.training_warnings == ()
    assert "warning" not in run("generate", bundle, "-o", tmp_path / "x.png", "--num-images", 1).stderr
