"""What the README and the examples promise is run: the demo, every command, every snippet."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from scm_sdk.errors import LatencyError
from scm_sdk.export.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Training takes hours; its commands are run as far as their settings.
HOURS_LONG = {"train": ["--dry-run"], "distill": ["--dry-run"]}
# Other long commands keep their words and are made short by options; `make test-slow` runs them as they are.
SHORTENED = HOURS_LONG | {
    "all": ["--steps", "1", "--precision", "fp16"],
    "validate": ["--num-seeds", "8", "--batch", "8", "--backend", "onnxruntime"],
    "evaluate": ["--num-images", "128", "--rows", "10000", "10400", "--real-rows", "0", "400"],
    "bench": ["--rounds", "10", "--batch", "1"],
    "report": ["--rounds", "2", "--batch", "1", "--num-images", "8", "--backend", "onnxruntime"],
}
pytestmark = [pytest.mark.shared_cache, pytest.mark.usefixtures("exported_once")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("scm-export")]


def call(arguments, cwd):
    done = subprocess.run(
        [str(a) for a in arguments], cwd=cwd, capture_output=True, text=True, timeout=1500, env=os.environ
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done


@pytest.fixture
def workplace(newcomer, edm_pickle, tmp_path):
    """A folder with the demo's results, with runs/ as if the shipped model had been trained there."""
    (tmp_path / "scm-demo").symlink_to(newcomer / "scm-demo")
    (tmp_path / "runs").mkdir()
    for name in ("teacher", "avatars"):
        (tmp_path / "runs" / name).symlink_to(ROOT / "scm_sdk" / "assets" / "avatars")
    edm_pickle(tmp_path / "network.pkl")
    return tmp_path


def test_demo_leaves_pictures_and_a_bundle(newcomer):
    from PIL import Image

    names = {path.name for path in (newcomer / "scm-demo").iterdir()}
    assert names == {"avatars", "avatars-1step.png", "avatars-2step.png"}
    with Image.open(newcomer / "scm-demo" / "avatars-2step.png") as picture:
        assert len(picture.getcolors(1 << 20) or []) > 100


def test_readme_opens_with_the_two_commands():
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


@pytest.mark.parametrize(
    "options",
    [pytest.param(SHORTENED, id="shortened"), pytest.param(HOURS_LONG, id="as-written", marks=pytest.mark.slow)],
)
def test_readme_commands(workplace, monkeypatch, options):
    """One after the other in one process; the demo was run as a process, as a person does."""
    monkeypatch.chdir(workplace)
    for line in commands():
        words = shlex.split(line)
        done = CliRunner().invoke(main, [*words[1:], *options.get(words[1], [])])
        fine = {0, LatencyError.exit_code} if words[1] == "bench" else {0}  # its budget is an idle machine's
        assert done.exit_code in fine, f"{line}: {done.output[-2000:]}\n{done.exception!r}"


def test_every_verb_is_shown():
    """In the README, or in a page of the documents where it takes more than a line."""
    pages = "\n".join([README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))])
    shown = set(re.findall(r"^scm-export (\w+)", pages, re.MULTILINE))
    assert shown == set(main.commands) - {"demo"}


def test_readme_python(workplace):
    for block in blocks("python"):
        call([sys.executable, "-c", block], workplace)


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
