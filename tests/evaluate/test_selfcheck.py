"""Checks that need no data: a sound model passes on every backend, each kind of unsoundness fails its own check."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from scm_sdk import Generator
from scm_sdk.evaluate.selfcheck import SAME, selfcheck
from scm_sdk.export.cli import main
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.unet import UNetConfig


def verdicts(generator: Generator) -> dict[str, bool | None]:
    return {check.name: check.passed for check in selfcheck(generator, num_samples=4)}


ALL = {"repeat", "batch", "permutation", "finite", "labels", "steps", "boundary", "variance", "consistency"}


def test_a_sound_model_passes(ort: Generator, reference: Generator) -> None:
    found = verdicts(reference)
    assert set(found) == ALL and all(found.values())
    found = verdicts(ort)
    assert [name for name, passed in found.items() if passed is None] == ["boundary", "variance", "consistency"]
    assert all(passed is not False for passed in found.values())


def test_an_unsound_backend_fails_its_check(ort: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ort.opened().backend
    right, calls = backend.sample, []

    def only(name: str) -> None:
        failed = [check for check, passed in verdicts(ort).items() if passed is False]
        assert failed[0] == name or name in failed, failed

    def wavers(noise, conditioning):
        calls.append(1)
        return right(noise, conditioning) + len(calls) * 0.01

    def mixes(noise, conditioning):  # samples see the first of their batch
        images = right(noise, conditioning)
        return images + 0.1 * images[:1]

    def overflows(noise, conditioning):
        images = right(noise, conditioning)
        return np.where(images > images.max() - 1e-3, np.inf, images)

    def ignores_labels(noise, conditioning):
        return right(noise, {name: np.zeros_like(array) for name, array in conditioning.items()})

    for name, broken in (
        ("repeat", wavers), ("batch", mixes), ("permutation", mixes), ("finite", overflows), ("labels", ignores_labels)
    ):  # fmt: skip
        monkeypatch.setattr(backend, "sample", broken)
        only(name)
    monkeypatch.setattr(backend, "sample", right)
    assert False not in verdicts(ort).values()


def test_a_network_that_does_not_end_in_its_data_fails(reference: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference.opened().backend.model  # type: ignore[attr-defined]
    right = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x, t, **given: right(self, x, t + 0.1, **given))
    assert verdicts(reference)["boundary"] is False
    assert torch.is_grad_enabled()


def test_an_estimate_that_does_not_stay_the_same_fails(reference: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time gives the end of another trajectory, as no consistency model does."""
    model = reference.opened().backend.model  # type: ignore[attr-defined]
    right = type(model).forward
    calls: list[int] = []

    def wanders(self, x, t, **given):
        calls.append(1)
        moved = right(self, x, t, **given)
        return moved if not float(t[0]) else moved.roll(len(calls), dims=0)

    monkeypatch.setattr(type(model), "forward", wanders)
    found = {check.name: check for check in selfcheck(reference, num_samples=4)}
    assert found["consistency"].passed is False and found["consistency"].value > 1


def test_variance_is_that_of_pictures_too(reference: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is added too weakly shows at every time, whatever the pictures' own deviation."""
    from scm_sdk.model import trigflow

    right = trigflow.add_noise
    assert verdicts(reference)["variance"] is True
    monkeypatch.setattr(trigflow, "add_noise", lambda x, z, t: right(x, 0.8 * z, t))
    assert verdicts(reference)["variance"] is False


def test_the_verb(unet_bundle: Path) -> None:
    run = CliRunner().invoke(main, ["selfcheck", str(unet_bundle), "--backend", "torch", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert {check["name"] for check in report["checks"]} == ALL and report["backend"] == "torch"
    table = CliRunner().invoke(main, ["selfcheck", str(unet_bundle), "--backend", "onnxruntime"])
    assert table.exit_code == 0 and "permutation" in table.stdout and "ask PyTorch" in table.stdout


def test_another_label_of_a_model_of_one_class_is_not_asked_for(tmp_path: Path) -> None:
    """A model of one class is sound, trained or not: neither its labels nor its empty samples may fail it."""
    network = UNetConfig(
        image_size=8, channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=(), num_classes=1
    )
    ConsistencyModel(ModelConfig(network=network, class_names=("only",))).save_pretrained(tmp_path / "model")
    run = CliRunner().invoke(main, ["selfcheck", str(tmp_path / "model"), "--backend", "torch", "--json"])
    (labels,) = (check for check in json.loads(run.stdout)["checks"] if check["name"] == "labels")
    assert run.exit_code == 0 and labels["passed"] is None and "one label" in labels["text"], run.output


def test_a_failure_exits_3(unet_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAME, "fp32", -1.0)
    run = CliRunner().invoke(main, ["selfcheck", str(unet_bundle), "--backend", "torch"])
    assert run.exit_code == 3 and "Error: denoiser on torch: the same call twice" in run.stderr
