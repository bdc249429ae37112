"""Sections of a training config, their flat names, and records of runs before there were sections."""

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from scm_sdk.errors import ConfigError
from scm_sdk.model.networks.presets import tiny
from scm_sdk.train.config import (
    OBJECTIVES,
    SETTINGS,
    NoiseConfig,
    ObjectiveName,
    OptimizerConfig,
    TangentConfig,
    TrainConfig,
)
from scm_sdk.train.objectives.select import LOSSES
from scm_sdk.train.record import read_run

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parents[1] / "golden" / "train"
"""``train.json`` as 0.1.0.dev wrote it before sections, one of each objective."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recorded_run_of_each_objective_is_read(name: str, tmp_path: Path) -> None:
    old = json.loads((RECORDED / f"{name}.json").read_text("utf-8"))
    (tmp_path / "train.json").write_text(json.dumps(old), encoding="utf-8")
    run = read_run(tmp_path)
    assert run is not None and run.objective == name
    plain = msgspec.to_builtins(run)
    for field, value in old.items():
        found = plain
        for section in SETTINGS.get(field, ("optimizer", "name") if field == "optimizer" else (field,)):
            found = found[section]
        assert json.loads(json.dumps(found)) == value, field
    assert TrainConfig.from_json(run.to_json()) == run


@pytest.mark.parametrize(
    "path", ["scm_sdk/assets/avatars", *(f"benchmarks/teachers/avatars-{n}" for n in ("first", "second", "fourth"))]
)
def test_the_recorded_runs_of_this_repository_are_read(path: str) -> None:
    run = read_run(ROOT / path)
    assert run is not None and run.objective in OBJECTIVES


def test_every_flat_name_leads_to_a_setting() -> None:
    base = TrainConfig(objective="diffusion", network=tiny())
    for name, path in SETTINGS.items():
        value: object = base
        for field in path:
            value = getattr(value, field)
        assert base.with_settings({name: value}) == base


def test_settings_change_what_they_name_and_nothing_else() -> None:
    base = TrainConfig(objective="scd", teacher="x", network=tiny())
    changed = base.with_settings(
        {"learning_rate": 0.5, "optimizer": "radam", "tangent_c": 0.3, "p_std": 2.0, "seed": 4}
    )
    assert changed == msgspec.structs.replace(
        base,
        optimizer=OptimizerConfig(name="radam", learning_rate=0.5),
        tangent=TangentConfig(c=0.3),
        noise=NoiseConfig(p_std=2.0),
        seed=4,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1.0}, "'lerning_rate'.*Did you mean learning_rate"),
        ({"learning_rate": "fast"}, r"optimizer\.learning_rate"),
        ({"objective": "gan"}, r"'gan'.*objective"),
        ({"tangent": 3}, "tangent"),
        ({"learning_rate": float("nan")}, r"optimizer\.learning_rate is nan"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_settings({"objective": "diffusion", "network": tiny(), **settings})


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"objective": "diffusion", "tangent": 1, "tangent_c": 2}', "[" * 10_000]
)
def test_no_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="training config"):
        TrainConfig.from_json(text)


def test_each_objective_has_a_loss_and_a_name_for_type_checkers() -> None:
    assert tuple(OBJECTIVES) == get_args(ObjectiveName) and OBJECTIVES.keys() == LOSSES.keys()
