"""What the documents promise is run: the demo, each command and each snippet of the README, in order."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from scm_sdk._util.lazy import wheel_command
from scm_sdk.errors import LatencyError
from scm_sdk.export.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "scm_sdk/assets/avatars/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INSTALL = [". .venv/bin/activate", "pip wheel --no-deps --wheel-dir dist .", wheel_command("onnxruntime")]
# Training takes hours. `make test-slow` runs all other commands as they are printed.
SHORT_TRAINING = {"train": ["--iterations", "2"], "distill": ["--iterations", "2"]}
# `make test` keeps the words of a long command and appends options that make it short.
SHORTENED = {
    "train": ["--iterations", "1", "--batch-size", "8"],
    "distill": ["--iterations", "1", "--batch-size", "8"],
    "all": ["--steps", "1", "--precision", "fp16"],
    "quantize": ["--steps", "1", "--num-samples", "32"],
    "validate": ["--num-seeds", "8", "--batch", "8", "--backend", "onnxruntime"],
    "evaluate": ["--num-images", "128", "--rows", "10000", "10400", "--real-rows", "0", "400"],
    "bench": ["--rounds", "10", "--batch", "1"],
    "report": ["--rounds", "2", "--batch", "1", "--num-images", "8", "--backend", "onnxruntime"],
}
pytestmark = [pytest.mark.shared_cache, pytest.mark.usefixtures("exported_once")]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(text):
    """Each command line of the shell blocks, without its comment, continuation lines joined."""
    joined = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    return [line for line in (line.split("  #")[0].split(" # ")[0].strip() for line in joined.splitlines()) if line]


def commands(text):
    """The words of each scm-export command, also of one that torchrun starts."""
    words = [re.sub(r"^torchrun .*-m scm_sdk\.export\.cli ", "scm-export ", line) for line in lines(text)]
    return [shlex.split(line)[1:] for line in words if line.startswith("scm-export ")]


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    for words in commands(page.read_text("utf-8"))
]


@pytest.fixture
def checkout(newcomer, tmp_path):
    """A folder like a checkout after `make demo`, which commands may write into."""
    shutil.copytree(newcomer / "scm-demo", tmp_path / "scm-demo")
    (tmp_path / "scm_sdk").symlink_to(ROOT / "scm_sdk")
    return tmp_path


def test_demo_leaves_pictures_and_a_bundle(newcomer):
    from PIL import Image

    names = {path.name for path in (newcomer / "scm-demo").iterdir()}
    assert names == {"avatars", "avatars-1step.png", "avatars-2step.png"}
    with Image.open(newcomer / "scm-demo" / "avatars-2step.png") as picture:
        assert len(picture.getcolors(1 << 20) or []) > 100
    card = (newcomer / "scm-demo" / "avatars" / "README.md").read_text("utf-8")
    assert "| onnx/fp16/1step/model.onnx | onnx | fp16 | 1 | onnxruntime: " in card, "written before the comparison"


def test_readme_opens_with_the_two_commands():
    assert README.index("```sh\nmake demo ") < README.index("\n", README.index("# scm-sdk")) + 5
    assert lines(README)[:2] == ["make demo", "make check"]


def test_each_line_of_the_readme_is_run():
    """By this file, or by the command that runs this file."""
    others = [line for line in lines(README) if not line.startswith("scm-export ")]
    assert others == ["make demo", "make check", *INSTALL]


@pytest.mark.parametrize("words", COMMANDS)
def test_each_command_parses(words, tmp_path, monkeypatch):
    """Against the real command: its name, its options, their values; a shell variable counts as a number.

    Files that options name, such as an image, exist.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scm_sdk").symlink_to(ROOT / "scm_sdk")
    command, name, above = main, "scm-export", None
    words = [re.sub(r"^\$\w+$", "0", word) for word in words]
    while isinstance(command, click.Group):
        name, *words = words
        assert name in command.commands, f"no command {name}"
        above = click.Context(command, above, **command.context_settings)
        command = command.commands[name]
    for option in command.params:
        for flag in {*option.opts} & {*words} if getattr(option.type, "exists", False) else ():
            Path(words[words.index(flag) + 1]).touch()
    with command.make_context(name, list(words), above):
        pass


def test_readme_commands(checkout, monkeypatch):
    """In order, in one process; the demo was run as a process, as a person does."""
    monkeypatch.chdir(checkout)
    for words in commands(README):
        done = CliRunner().invoke(main, [*words, *SHORTENED.get(words[0], [])])
        fine = {0, LatencyError.exit_code} if words[0] == "bench" else {0}  # its budget is an idle machine's
        assert done.exit_code in fine, f"{words}: {done.output[-2000:]}\n{done.exception!r}"


def test_readme_python(checkout):
    for block in blocks(README, "python"):
        subprocess.run([sys.executable, "-c", block], cwd=checkout, check=True, timeout=600)
    assert (checkout / "red.png").is_file()


@pytest.mark.slow
def test_readme_as_printed(checkout):
    """Each scm-export line by a shell, in order; training alone is made short."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in lines(README):
        if line.startswith("scm-export "):
            verb = line.split()[1]
            done = subprocess.run(
                ["bash", "-c", " ".join([line, *SHORT_TRAINING.get(verb, [])])], cwd=checkout, timeout=3000,
                encoding="utf-8", env=os.environ | {"PATH": path}, capture_output=True,
            )  # fmt: skip
            assert done.returncode in ({0, LatencyError.exit_code} if verb == "bench" else {0}), (
                f"{line}: {done.stderr[-2000:]}"
            )
    assert (checkout / "report.html").is_file() and (checkout / "bundle.scmz").is_file()


@pytest.mark.slow
def test_readme_install(newcomer, tmp_path):
    """A wheel that is built and installed as printed, in an environment of its own, generates without PyTorch."""
    source, away = tmp_path / "source", tmp_path / "away"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if not (ROOT / name).is_dir():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    venv.create(source / ".venv", with_pip=True)
    away.mkdir()
    (away / "scm-demo").symlink_to(newcomer / "scm-demo")
    (python,) = blocks(README, "python")
    (away / "snippet.py").write_text(f"{python}\nimport sys\nassert 'torch' not in sys.modules", encoding="utf-8")
    script = "\n".join(["set -e", *INSTALL, f"cd {shlex.quote(str(away))}", "python snippet.py"])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(["bash", "-c", script], cwd=source, env=env, check=True, timeout=1500)
    assert (away / "red.png").is_file()


def test_every_verb_is_shown():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = {words[0] for page in PAGES for words in commands(page.read_text("utf-8"))}
    assert set(main.commands) <= shown | {"demo"}
    named = set(re.findall(r"`([a-z]+)`", pages))
    assert set(main.commands) <= named, "the table of commands names each"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_exist(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
