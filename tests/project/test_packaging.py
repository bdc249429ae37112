"""The wheel must hold every package of the checkout and its data, all of it inside scm_sdk."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import scm_sdk
from scm_sdk._util.lazy import wheel_command

ROOT = Path(__file__).resolve().parents[2]
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
    done = subprocess.run(command, cwd=copy, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert f"dist/{wheel.name}[hub]" in wheel_command("hub"), "what cards and documents name"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licenses = [name for name in names if name.endswith("licenses/LICENSE")]
        assert archive.read(licenses[0]) == (ROOT / "LICENSE").read_bytes()
    held = {name for name in names if ".dist-info/" not in name}
    edge = tuple(f"scm_sdk/export/edge/{name}/" for name in ("web", "coreml_files", "orin_files"))
    folders = ("scm_sdk/assets/", *edge)
    data = {path for path in sources() if path.startswith(folders)} | {"scm_sdk/py.typed"}
    assert {"scm_sdk/assets/pixel_art_16.npz", "scm_sdk/export/edge/web/scm/noise.js"} <= data
    assert held == sources(".py") | sources(".j2") | sources(".html") | data


def test_the_license_is_apache_2_in_full(project: dict[str, Any]) -> None:
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
    for target in ("demo", "check", "test", "test-slow", "gpu", "lint", "types", "docs", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111, ".ci/run must be executable"
    lines = [line for line in ci.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert lines[-1].split()[-2:] == ["make", "check"]
    assert re.search(r"^check: lint types docs test$", makefile, re.MULTILINE)


SUPPORTED = ("3.10", "3.11", "3.12", "3.13", "3.14")
SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"))


def requirements(lines: list[str], environment: dict[str, str]) -> list[Requirement]:
    """Return the requirements whose markers hold."""
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": "", **environment})]


def pins(environment: dict[str, str], file: str = "constraints.txt") -> dict[str, Version]:
    """Return the release of each package that a constraints file holds there; one each."""
    held = requirements((ROOT / file).read_text(encoding="utf-8").splitlines(), environment)
    versions: dict[str, Version] = {}
    for requirement in held:
        (exact,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        assert exact.operator == "==" and name not in versions, f"{requirement}: expected one exact release"
        versions[name] = Version(exact.version)
    return versions


def reached(extras: set[str], environment: dict[str, str]) -> Iterator[Requirement]:
    """Every requirement of the package with some extras, through what is installed here."""
    seen, todo = set(), [("scm-sdk", frozenset({"", *extras}))]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            holds = [
                e
                for e in wanted
                if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": e})
            ]
            if holds:
                name_ = canonicalize_name(requirement.name)
                if name_ != "scm-sdk":
                    yield requirement
                with suppress(importlib.metadata.PackageNotFoundError):
                    importlib.metadata.version(name_)
                    todo.append((name_, frozenset({"", *requirement.extras})))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda pair: "-".join(pair))
@pytest.mark.parametrize("python", SUPPORTED)
def test_everything_that_the_two_commands_install_is_pinned(python: str, system: tuple[str, str]) -> None:
    """For each supported Python and system one release of each direct requirement, which the package accepts."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"sys_platform": system[0], "platform_machine": system[1]}
    held = pins(environment)
    here = importlib.metadata.requires("scm-sdk") or []
    for extra in ("", "cpu", "gpu", "test", "bench"):
        for requirement in requirements(here, {**environment, "extra": extra}):
            name = canonicalize_name(requirement.name)
            if name != "scm-sdk":
                assert name in held, f"{name} has no release in constraints.txt. Run: make lock"
                assert held[name] in requirement.specifier, f"{requirement}, not {held[name]}. Run: make lock"


def installed_from() -> str:
    """Return the constraints file whose release of every direct requirement is the installed one."""
    named = {canonicalize_name(r.name) for r in map(Requirement, importlib.metadata.requires("scm-sdk") or [])}
    here: dict[str, Version] = {}
    for name in named:
        with suppress(importlib.metadata.PackageNotFoundError):
            here[name] = Version(importlib.metadata.version(name))
    for file in ("constraints.txt", "constraints-lowest.txt"):
        held = pins({}, file)
        if all(here[name].public == held[name].public for name in here.keys() & held.keys()):
            return file
    pytest.skip("this environment was made of other releases than those of a constraints file")


def test_what_test_edge_installs_is_pinned(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    held = pins({"python_version": "3.11", "python_full_version": "3.11.0"}, "constraints-edge.txt")
    seen, todo = set(), ["test-edge"]
    while todo:
        for line in extras[(extra := todo.pop())]:
            requirement = Requirement(line)
            todo += [each for each in requirement.extras if each not in seen]
            if requirement.name != "scm-sdk":
                assert held[canonicalize_name(requirement.name)] in requirement.specifier, requirement
        seen.add(extra)
    assert {"litert-export", "executorch", "coreml", "mnn", "openvino"} <= seen


def test_what_requirements_bring_is_pinned_too() -> None:
    file = installed_from()
    held = pins({}, file)
    loose = {str(r) for r in reached({"cpu", "test"}, {}) if canonicalize_name(r.name) not in held}
    assert not loose, f"not in {file}. Run: make lock"


def test_the_lowest_releases_are_the_declared_ones() -> None:
    """``make test-lowest`` tests what pyproject.toml says, on the oldest Python."""
    environment = {"python_version": "3.10", "python_full_version": "3.10.0", "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64"}
    held = pins(environment, "constraints-lowest.txt")
    for requirement in requirements(importlib.metadata.requires("scm-sdk") or [], {**environment, "extra": "export"}):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                assert held[canonicalize_name(requirement.name)] >= Version(bound.version)


def test_the_supported_pythons_are_said_alike(project: dict[str, Any]) -> None:
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    assert tuple(listed) == SUPPORTED
    assert project["project"]["requires-python"] == f">={SUPPORTED[0]}"
    assert f"Python {SUPPORTED[0]} to {SUPPORTED[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{SUPPORTED[0]} to {SUPPORTED[-1]}" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_each_set_of_extras_is_installed_though_another_was(tmp_path: Path) -> None:
    (tmp_path / ".ready-cpu,test").touch()

    def would_do(target: str) -> str:
        command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={tmp_path}"]
        here = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # of a make that runs this
        return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True, env=here).stdout

    assert "pip install" not in would_do("test")
    gpu = would_do("gpu")
    assert '".[gpu,test,tensorrt]"' in gpu and "uninstall -qq --yes onnxruntime onnxruntime-gpu" in gpu
    assert gpu.index("pytest -m gpu; tests=$?") < gpu.index("benchmarks/speed/gpu.py") < gpu.index("exit $tests")
