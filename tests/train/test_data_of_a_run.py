"""Which data a run takes, what it says of them, and its progress lines without a terminal."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers.commands import run
from scm_sdk.errors import ConfigError
from scm_sdk.evaluate.quality.held_out import load_held_out
from scm_sdk.evaluate.quality.nets import effnet_lite0
from scm_sdk.export.cli import common
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.spec import SamplerSpec
from scm_sdk.train.config import DataConfig
from scm_sdk.train.data.images import load_data, shortened
from scm_sdk.train.record import describe_data, recorded_data

LENGTH = ("--iterations", "2", "--batch-size", "4", "--sample-every", "0")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with two label columns of three classes, and a teacher of one of them on ten of the twelve pictures."""
    root = tmp_path_factory.mktemp("room")
    columns = {"kind": np.arange(12) % 3, "kind_names": np.array(["a", "b", "c"])}
    columns |= {"size": np.arange(12) % 3, "size_names": np.array(["small", "middle", "large"])}
    columns |= {"pair": np.arange(12) % 2, "pair_names": np.array(["left", "right"])}
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    np.savez(root / "data.npz", images=images, **columns)
    data = ("--data", root / "data.npz", "--label", "kind", "--rows", 0, 10)
    told = run("train", "-o", root / "teacher", "--preset", "tiny", *data, *LENGTH).stderr
    assert "data: data.npz, label kind, rows 0..9: 10 pictures of 8x8x1, 3 classes: a, b, c" in told
    return root


def distilled(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "train.json").read_text("utf-8"))["data"]
    return data


def test_a_student_takes_its_teachers_data(room: Path, tmp_path: Path) -> None:
    told = run("distill", "-o", tmp_path / "run", "--teacher", room / "teacher", *LENGTH).stderr
    assert f"{room / 'teacher'} was trained on data.npz, label kind, rows 0..9\n" in told
    assert distilled(tmp_path / "run") == {"source": str(room / "data.npz"), "label": "kind", "rows": [0, 10]}
    run("distill", "-o", tmp_path / "sct", "--no-teacher", "--init", room / "teacher", *LENGTH)
    assert distilled(tmp_path / "sct") == distilled(tmp_path / "run")
    told = run("distill", "-o", tmp_path / "rows", "--teacher", room / "teacher", "--rows", 2, 8, *LENGTH).stderr
    assert "rows 0..9; this run uses data.npz, label kind, rows 2..7\n" in told
    shutil.copy(room / "data.npz", tmp_path / "more.npz")
    run("distill", "-o", tmp_path / "more", "--teacher", room / "teacher", "--data", tmp_path / "more.npz", *LENGTH)
    assert distilled(tmp_path / "more") == {"source": str(tmp_path / "more.npz"), "label": "kind", "rows": [0, 0]}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("--data", "avatars"), "is no column of"),
        (("--data", "avatars", "--label", "hairColor"), r"are \(C, H, W\) = \(3, 16, 16\)"),
        (("--label", "pair"), "the data has 2 classes, the network 3"),
        (("--label", ""), "the data has 0 classes, the network 3"),
        (("--label", "size"), "the classes of .*teacher are a, b, c, those of the data small, middle, large"),
    ],
)
def test_what_is_not_the_teachers_is_refused(room: Path, tmp_path: Path, given: tuple[str, ...], text: str) -> None:
    error = run("distill", "-o", tmp_path / "run", "--teacher", room / "teacher", *given, *LENGTH, code=2).stderr
    assert re.search(text, error) and "--label" in error, error
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_say_its_data_needs_to_be_given_them(room: Path, tmp_path: Path) -> None:
    model = ConsistencyModel.from_pretrained(room / "teacher")
    model.save_pretrained(tmp_path / "told")
    assert recorded_data(tmp_path / "told", model.config.provenance) == DataConfig(
        source="data.npz", label="kind", rows=(0, 10)
    )
    older = json.loads((room / "teacher" / "train.json").read_text("utf-8")) | {"a field of another version": 1}
    (tmp_path / "told" / "train.json").write_text(json.dumps(older), encoding="utf-8")
    assert recorded_data(tmp_path / "told", {}) == DataConfig(**distilled(tmp_path / "told") | {"rows": (0, 10)})
    model.config = msgspec.structs.replace(model.config, provenance={})
    model.save_pretrained(tmp_path / "bare")
    error = run("distill", "-o", tmp_path / "run", "--teacher", tmp_path / "bare", *LENGTH, code=2).stderr
    assert "bare does not record its training data: it has no readable train.json" in error
    assert "Give the data: --data, --label and --rows." in error
    given = ("--data", room / "data.npz", "--label", "kind")
    run("distill", "-o", tmp_path / "run", "--teacher", tmp_path / "bare", *given, *LENGTH)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("train", "--data", "nowhere"), ("'nowhere' does not exist", "avatars or fashion-mnist (--data)")),
        (("train", "--data", "nowhere.npz"), ("nowhere.npz does not exist", "(--data)")),
        (("train", "--data", "avatars", "--label", "hue"), ("label 'hue'", "hairColor", "(--label)")),
        (("train", "--data", "avatars", "--rows", 0, 10**6), ("rows (--rows)", "20000 images")),
        (("distill", "--teacher", "runs/nope"), ("--teacher is runs/nope, which does not exist", "training run")),
        (("train", "--data", "avatars", "--init", "nope"), ("--init is nope, which does not exist",)),
        (("evaluate", "--data", "nowhere"), ("'nowhere' does not exist", "(--data)")),
        (("evaluate", "--data", "avatars", "--label", "hue"), ("label 'hue'", "hairColor", "(--label)")),
    ],
)
def test_a_wrong_value_is_wrong_usage(
    unet_bundle: Path, tmp_path: Path, arguments: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    verb, *rest = arguments
    where = (unet_bundle,) if verb == "evaluate" else ("-o", tmp_path / "run")
    error = run(verb, *where, *rest, code=2).stderr
    assert all(part in error for part in parts), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("column", ["kind", "hue"])
def test_a_label_that_shards_do_not_have(tmp_path: Path, column: str) -> None:
    images = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, kind=np.array([0, 1]))
    config = DataConfig(source=str(tmp_path), label=column)
    if column == "kind":
        assert load_data(config).num_classes == 2
    else:
        with pytest.raises(ConfigError, match=r"label 'hue' is no column .*'kind'"):
            load_data(config)


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(source="avatars", label="hairColor", rows=(0, 10_000)),
        DataConfig(source="a, label b, rows 1..2.npz", label="c"),
        DataConfig(source="photos"),
    ],
)
def test_a_provenance_says_the_data_and_is_understood(data: DataConfig, tmp_path: Path) -> None:
    assert recorded_data(tmp_path, {"data": describe_data(data)}) == data
    assert recorded_data(tmp_path, {"data": "my own pictures"}) is None and recorded_data(tmp_path, {}) is None


def test_a_network_of_another_size_names_those_that_fit(room: Path, tmp_path: Path) -> None:
    error = run("train", "-o", tmp_path / "run", "--data", "avatars", "--preset", "pixels32", *LENGTH, code=2).stderr
    assert (
        "the network takes (3, 32, 32). Choose a network of the data's size: --preset avatars16 or pixels16." in error
    )
    error = run("train", "-o", tmp_path / "run", "--data", room / "data.npz", *LENGTH, code=2).stderr
    assert "--preset tiny." in error


def test_a_batch_larger_than_the_data_is_said(room: Path, tmp_path: Path) -> None:
    length = ("--iterations", "1", "--batch-size", "24", "--sample-every", "0", "--preset", "tiny")
    told = run("train", "-o", tmp_path / "run", "--data", room / "data.npz", *length).stderr
    assert "12 pictures of 8x8x1, no labels" in told
    assert "warning: --batch-size 24 is larger than the data: each image is used 2 times in every iteration." in told


def test_many_classes_are_named_in_short() -> None:
    assert shortened([str(i) for i in range(8)]) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert shortened([str(i) for i in range(1000)]) == "0, 1, 2, 3, 4, 5, 6, 7, and 992 more"


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "PLAIN_SECONDS", 0.0)
    length = ("--iterations", "50", "--batch-size", "4", "--sample-every", "0", "--preset", "tiny")
    result = run("train", "-o", tmp_path / "run", "--data", room / "data.npz", *length, "--json")
    lines = [line for line in result.stderr.splitlines() if line.startswith("diffusion: ")]
    assert len(lines) > 40 and re.search(r"diffusion: 40 of 50, \d+:\d\d:\d\d so far", "\n".join(lines))
    assert " left" in lines[30]
    assert "residual " in lines[-1] and json.loads(result.stdout)["last"]["iteration"] == 50
    monkeypatch.setattr(common, "PLAIN_SECONDS", 1e6)
    run("train", "-o", tmp_path / "other", "--data", room / "data.npz", *length)


AVATARS = DataConfig(source="avatars", label="hairColor", rows=(0, 10_000))


def spec(**changes: Any) -> SamplerSpec:
    from scm_sdk.train.data.images import HAIR_NAMES

    base = {"sample_shape": (3, 16, 16), "times": (1.5,), "num_classes": 11, "class_names": HAIR_NAMES}
    return SamplerSpec(**(base | changes))


def test_pictures_are_judged_by_the_data_that_the_model_was_not_trained_on() -> None:
    real = load_held_out(spec(), effnet_lite0(), trained_on=AVATARS)
    assert real.about == "avatars, label hairColor: real rows 0..9999, held-out rows 10000..19999"
    assert real.labels is not None and len(real.labels) == 10_000 and real.colors
    less = msgspec.structs.replace(AVATARS, rows=(500, 700))
    assert (
        "real rows 500..699, held-out rows 700..10699" in load_held_out(spec(), effnet_lite0(), trained_on=less).about
    )
    whole = load_held_out(spec(), effnet_lite0(), trained_on=msgspec.structs.replace(AVATARS, rows=(0, 0)))
    assert whole.about.endswith("real rows 0..9999, held-out rows 10000..19999, which the model was trained on")
    rows = load_held_out(spec(), effnet_lite0(), trained_on=AVATARS, reference_rows=(10_000, 10_100))
    assert "held-out rows 10000..10099" in rows.about
    with pytest.raises(ConfigError, match="does not say which data it was trained on"):
        load_held_out(spec(), effnet_lite0())


def test_rows_out_of_range_name_their_option() -> None:
    rows = {"real_rows": (0, 30_000), "reference_rows": (40_000, 50_000)}
    with pytest.raises(ConfigError, match=r"--real-rows\) are 0\.\.30000, .* the 20000 images"):
        load_held_out(spec(), effnet_lite0(), trained_on=AVATARS, **rows)
