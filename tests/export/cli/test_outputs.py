"""Where commands write: outside bundles, and found out before the work."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helpers.commands import invoke
from helpers.containers import run_python
from scm_sdk._util.events import Counter
from scm_sdk._util.files import check_writable
from scm_sdk.errors import ScmError
from scm_sdk.export.cli import common
from scm_sdk.model.consistency import ConsistencyModel


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["file.txt/x.html", "folder"])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file.txt").write_text("", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ScmError, match=r"cannot be written: .*Nothing was changed"):
        check_writable(tmp_path / place)
    check_writable(tmp_path / "new" / "deep" / "x.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "folder"]


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("report", ["-o", "{}/r.html"]),
        ("evaluate", ["--data", "avatars", "-o", "{}/scores.json"]),
        ("evaluate", ["--data", "avatars", "--save-ref", "{}/ref.npz"]),
        ("generate", ["-o", "{}/x.png"]),
        ("handover", ["-o", "{}/folder"]),
    ],
)
def test_an_output_that_cannot_be_written_is_found_out_before_the_work(
    unet_bundle: Path, tmp_path: Path, verb: str, options: list[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = invoke(verb, unet_bundle, *(option.format(tmp_path / "file") for option in options))
    assert done.exit_code == 1 and "cannot be written" in done.stderr, done.output
    assert len(done.stderr.splitlines()) == 1, "no line of progress came before"


@pytest.mark.parametrize(
    "arguments",
    [["bench", "--keep-budget", "--budget", "p95=9s@b1", "--batch", "1"], ["evaluate", "--keep", "--data", "avatars"]],
)
def test_a_bundle_that_cannot_be_written_is_found_out_before_the_work(
    unet_bundle: Path, tmp_path: Path, arguments: list[str]
) -> None:
    import shutil

    verb, *options = arguments
    bundle = Path(shutil.copytree(unet_bundle, tmp_path / "place" / "bundle"))
    bundle.chmod(0o555)
    command = [verb, str(bundle), *options]
    done = run_python(f"from scm_sdk.export.cli import main; main({command!r})", unprivileged=True)
    bundle.chmod(0o755)
    assert done.returncode == 6 and "cannot be written: Permission denied" in done.stderr, done.stderr
    assert done.stdout == "" and "data:" not in done.stderr and "batch" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "where"),
    [("generate", "x.png"), ("generate", ""), ("report", "r.html"), ("evaluate", "s.json"), ("handover", "h"),
     ("onnx", "inner"), ("train", "run"), ("average", "mean")],
)  # fmt: skip
def test_nothing_is_written_into_a_bundle(unet_bundle: Path, verb: str, where: str) -> None:
    before = files_in(unet_bundle)
    source = () if verb == "train" else (unet_bundle,)
    done = invoke(verb, *source, "-o", unet_bundle / where)
    assert done.exit_code == 2 and "is in the bundle" in done.stderr and "outside it" in done.stderr
    assert files_in(unet_bundle) == before


def test_a_name_that_is_no_picture_and_no_folder(unet_bundle: Path, tmp_path: Path) -> None:
    for name in ("a.xyz", "a.png.gz", "v1.2"):
        done = invoke("generate", unet_bundle, "-o", tmp_path / name, "--num-images", 1)
        assert done.exit_code == 2 and ".png, .jpg, .jpeg, .webp" in done.stderr and not (tmp_path / name).exists()
    (tmp_path / "v1.2").mkdir()
    assert invoke("generate", unet_bundle, "-o", tmp_path / "v1.2", "--num-images", 1).exit_code == 0
    for name in ("v1.2", "r.md"):
        done = invoke("report", unet_bundle, "-o", tmp_path / name)
        assert done.exit_code == 2 and "expected the name of an .html file" in done.stderr


@pytest.fixture
def named(unet_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of a model of which the classes have these names."""

    def make(*names: str) -> Path:
        model = ConsistencyModel.from_pretrained(unet_checkpoint)
        model.config = msgspec.structs.replace(model.config, class_names=names)
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def seeds_and_files(model: Path, out: Path, *labels: object) -> dict[str, bytes]:
    done = invoke("generate", model, "-o", out, "--seed", 5, "--num-images", 2, "--steps", 1, *labels)
    assert done.exit_code == 0, done.output
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_png_files_name_what_made_them(unet_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    common = ["generate", unet_bundle, "--num-images", 2, "--class-labels", "dog", "--seed", 2**53, "--json"]
    done = invoke(*common, "-o", tmp_path / "grid.png")
    info = json.loads(done.stdout)["info"]
    invoke(*common, "-o", tmp_path / "many")
    invoke(*common, "-o", tmp_path / "grid.webp")
    seeds = [str(2**53), str(2**53 + 1)]
    for path, held in [("grid.png", seeds), *((f"many/{seed}.png", [seed]) for seed in seeds)]:
        with Image.open(tmp_path / path) as picture:
            assert json.loads(picture.text["scm"]) == {  # type: ignore[attr-defined]
                "build_id": info["build_id"], "seeds": held, "class_labels": [1] * len(held),
                "num_inference_steps": 2, "precision": info["precision"], "backend": info["backend"],
            }  # fmt: skip


def test_class_names_with_commas_and_of_digits(named: Callable[..., Path], tmp_path: Path) -> None:
    model = named("a, b", "2", "c2", "c3")
    first = seeds_and_files(model, tmp_path / "first", "--class-labels", '"a, b",2')
    assert first == seeds_and_files(model, tmp_path / "again", "--class-labels", "0,1"), "by number"
    assert first != seeds_and_files(model, tmp_path / "other", "--class-labels", "0,c2"), "labels count"


def test_errors_of_generate_name_the_options(unet_bundle: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "x.png", "--num-images", 4]
    for options, parts in (
        (["--class-labels", "0,1"], ("--class-labels", "2 labels for 4 images", "--num-images 2")),
        (["--prompt", "a", "--prompt", "b"], ("--prompt", "2 prompts for 4 images")),
        (["--steps", "7"], ("--steps is 7", "or --backend torch, which")),
        (["--guidance-scale", "3"], ("--guidance-scale",)),
    ):
        done = invoke("generate", unet_bundle, *out, *options)
        assert done.exit_code == 2 and all(part in done.stderr for part in parts), done.stderr
        assert "class_labels" not in done.stderr and "num_" not in done.stderr and "guidance_scale" not in done.stderr
    assert not (tmp_path / "x.png").exists()
    plan = json.loads(invoke("generate", unet_bundle, "--plan", "--json").stdout)
    assert plan


@pytest.mark.parametrize("verb", ["bench", "selfcheck"])
def test_errors_of_other_verbs_name_the_options(unet_bundle: Path, verb: str) -> None:
    done = invoke(verb, unet_bundle, "--backend", "onnxruntime", "--steps", 7)
    assert done.exit_code == 2 and "num_inference_steps" not in done.stderr, done.stderr
    assert "--steps is 7" in done.stderr or "7 steps" in done.stderr


def test_a_search_says_how_far_it_is_and_how_long_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "PLAIN_SECONDS", 0.0)
    with common.TerminalEvents() as events:
        events.stage("search the layers")
        counter = Counter(events, 5)
        counter.step("first: 40.0 dB")
        counter.expect(1)
        counter.step("second: 41.0 dB")
        events.stage("write the graph")
    stage, first, second, last = capsys.readouterr().err.splitlines()
    assert (stage, last) == ("  search the layers …", "  write the graph …")
    assert "search the layers: 1 of 5," in first and "first: 40.0 dB" in first
    assert "search the layers: 2 of 2," in second and "left" in second and "second: 41.0 dB" in second
