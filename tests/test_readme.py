"""What the README and the examples promise is run: the demo, every command, every snippet."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scm_sdk.export.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SCM_EXPORT = Path(sys.executable).with_name("scm-export")
# Long commands keep their words and are made short by one more option.
SHORTENED = {
    "all": ["--steps", "1", "--precision", "fp16"],
    "train": ["--dry-run"],
    "distill": ["--dry-run"],
    "evaluate": ["--num-images", "128", "--rows", "10000", "10400", "--real-rows", "0", "400"],
    "bench": ["--rounds", "10", "--batch", "1"],
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("scm-export")]


def call(arguments, cwd, **changes):
    done = subprocess.run(
        [str(a) for a in arguments], cwd=cwd, capture_output=True, text=True, timeout=500, env={**os.environ, **changes}
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, edm_pickle):
    """A folder in which the demo has run, with runs/ as if the shipped model had been trained there."""
    root = tmp_path_factory.mktemp("newcomer")
    shipped = ROOT / "scm_sdk" / "assets" / "avatars"
    (root / "runs").mkdir()
    for name in ("teacher", "avatars"):
        (root / "runs" / name).symlink_to(shipped)
    edm_pickle(root / "network.pkl")
    call([SCM_EXPORT, "demo"], root)
    return root


def test_demo_leaves_pictures_and_a_bundle(workplace):
    from PIL import Image

    names = {path.name for path in (workplace / "scm-demo").iterdir()}
    assert names == {"avatars", "avatars-1step.png", "avatars-2step.png"}
    with Image.open(workplace / "scm-demo" / "avatars-2step.png") as picture:
        assert len(picture.getcolors(1 << 20) or []) > 100


def test_readme_opens_with_the_two_commands():
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_readme_commands(workplace):
    ran: list[str] = []
    for line in commands():
        words = shlex.split(line)
        call([SCM_EXPORT, *words[1:], *SHORTENED.get(words[1], [])], workplace)
        ran.append(words[1])
    assert set(ran) == set(main.commands) - {"demo"}, "every verb is shown"


def test_readme_python(workplace):
    for block in blocks("python"):
        call([sys.executable, "-c", block], workplace)


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_examples(workplace):
    folder = ROOT / "examples"
    one = call([sys.executable, folder / "01_generate.py", "scm-demo/avatars"], workplace)
    assert "seed 1236 alone equals seed 1236 among four: True" in one.stdout
    call([sys.executable, folder / "02_train_and_distill.py", "tiny"], workplace)
    call([sys.executable, folder / "03_export_and_validate.py", "tiny/student", "tiny/bundle"], workplace)
    assert (workplace / "tiny" / "bundle" / "scm_manifest.json").exists()
    own = call([sys.executable, folder / "04_own_network.py", "own", "sound"], workplace)
    assert "sound: (3, 1, 64)" in own.stdout and "model.engine" in own.stdout
    assert {path.name for path in folder.glob("*.py")} == {
        "01_generate.py", "02_train_and_distill.py", "03_export_and_validate.py", "04_own_network.py",
        "06_sana_sprint.py",
    }  # fmt: skip
    for path in folder.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path
