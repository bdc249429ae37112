"""The wheel must hold every package of the checkout and its data, all of it inside scm_sdk."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import scm_sdk
from scm_sdk._lazy import wheel_command

ROOT = Path(__file__).resolve().parents[1]
CODE = ("scm_sdk", "export", "runtimes")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return table


def sources(suffix: str = "") -> set[str]:
    """Files that a wheel must hold, by their path in it."""
    found = set()
    for folder in CODE:
        for path in (ROOT / folder).rglob(f"*{suffix}"):
            below = path.relative_to(ROOT)
            linked = below.parts[:2] in (("scm_sdk", "export"), ("scm_sdk", "runtimes"))
            if path.is_file() and not linked and "__pycache__" not in below.parts:
                found.add(below.as_posix() if folder == "scm_sdk" else f"scm_sdk/{below.as_posix()}")
    return found


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    table = project["tool"]["setuptools"]
    found = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in table["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
        if "scm_sdk" not in folder or init.relative_to(ROOT / folder).parts[0] not in ("export", "runtimes")
    }
    assert found == set(table["packages"])


def test_one_import_name() -> None:
    names = importlib.metadata.distribution("scm-sdk").read_text("top_level.txt") or ""
    assert names.split() == ["scm_sdk"]


def test_the_links_point_at_the_folders() -> None:
    for name in ("export", "runtimes"):
        link = ROOT / "scm_sdk" / name
        if link.is_symlink():  # a clone without symbolic links works too
            assert link.resolve() == ROOT / name
        module = importlib.import_module(f"scm_sdk.{name}")
        assert Path(str(module.__file__)).resolve() == ROOT / name / "__init__.py"


def test_the_installed_package_is_this_checkout() -> None:
    assert Path(scm_sdk.__file__).resolve() == ROOT / "scm_sdk" / "__init__.py"
    assert importlib.metadata.version("scm-sdk") == scm_sdk.__version__


def test_the_wheel_holds_every_module_and_all_data(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="the build library is not in this environment")
    copy = tmp_path / "checkout"
    for name in (*CODE, "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    script = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert f"dist/{wheel.name}[hub]" in wheel_command("hub"), "what cards and documents name"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licences = [name for name in names if name.endswith("licenses/LICENSE")]
        assert archive.read(licences[0]) == (ROOT / "LICENSE").read_bytes()
    held = {name for name in names if ".dist-info/" not in name}
    data = {path for path in sources() if path.startswith("scm_sdk/assets/")} | {"scm_sdk/py.typed"}
    assert "scm_sdk/assets/pixel_art_16.npz" in data
    assert held == sources(".py") | sources(".j2") | data


def test_the_licence_is_apache_2_in_full(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project["project"]["license"] == "Apache-2.0"


def test_the_changelog_knows_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings, "no version at all"
    assert scm_sdk.__version__ in headings[0]


def test_extras_are_named_like_the_backends_that_they_bring(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert {"torch", "onnxruntime", "onnxruntime-gpu", "export", "train", "cpu", "gpu", "test"} <= set(extras)
    core = {re.split("[<>=]", line)[0] for line in project["project"]["dependencies"]}
    assert not core & {"torch", "onnx", "onnxruntime", "tensorrt"}


def test_two_commands_and_ci_run_the_same_thing() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "test-slow", "gpu", "lint", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111, ".ci/run must be executable"
    lines = [line for line in ci.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert lines[-1].split()[-2:] == ["make", "test"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_each_set_of_extras_is_installed_though_another_was(tmp_path: Path) -> None:
    (tmp_path / ".ready-cpu,test").touch()

    def would_do(target: str) -> str:
        command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={tmp_path}"]
        here = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # of a make that runs this
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=here).stdout

    assert "pip install" not in would_do("test")
    gpu = would_do("gpu")
    assert '".[gpu,test,tensorrt]"' in gpu and "uninstall -qq --yes onnxruntime onnxruntime-gpu" in gpu
    assert gpu.index("pytest -m gpu; tests=$?") < gpu.index("benchmarks/gpu.py") < gpu.index("exit $tests")
